"""The image explorer: click a patch, see whom it looks at; live in a notebook, or as a page of its own."""
