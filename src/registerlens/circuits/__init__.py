"""Circuits: which parts of a model make what happens at outlier tokens, and tools to test such claims."""
