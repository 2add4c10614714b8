"""The commands behind `registerlens`; heavy imports are inside the functions, so that --help answers at once."""
