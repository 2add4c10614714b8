from .ablation import Scale as Scale
