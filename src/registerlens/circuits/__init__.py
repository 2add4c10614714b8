"""Circuits: the path from register neurons to [CLS], and generic tools: patching, lenses, direct contributions."""
