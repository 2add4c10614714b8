"""What RegisterLens costs beside its peers, in ratios taken within one run: `python -m benchmarks`."""
