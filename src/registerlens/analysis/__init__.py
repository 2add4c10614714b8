"""Measurements on a running ViT: streaming traces, outlier tokens, attention sinks."""
