"""One pass over images: clean prefixes, what fits into memory, crews of workers, and the store of their parts."""
