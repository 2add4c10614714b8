"""Pure functions of arrays: moments, intervals, permutation tests."""
