"""One pass over images: reducers, clean prefixes, what fits into memory, crews of workers, the store of their parts."""
