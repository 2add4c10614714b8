"""Images in: decoding and preprocessing of photographs, and the seeded generator of synthetic ones."""
