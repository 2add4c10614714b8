"""Interventions: frozen descriptions of edits, in force inside `vit.edit(...)` or `attach(...)`."""
