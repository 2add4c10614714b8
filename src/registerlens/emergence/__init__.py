"""Register neurons that emerge by training: a tiny ViT, its recipe, the criteria it must meet, and the way there."""
