"""Ablation sweeps: many edits of one model on many images, nothing computed twice, nothing lost."""
