"""What an edit does to a model, measured against controls."""
