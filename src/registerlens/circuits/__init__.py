"""Circuits: which parts of a model act on which, along exact paths."""
