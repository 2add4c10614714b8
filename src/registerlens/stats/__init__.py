"""Pure functions of arrays: histograms, moments, intervals, permutation tests."""
