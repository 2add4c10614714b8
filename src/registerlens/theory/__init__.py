"""Models with known answers, and the propositions."""
