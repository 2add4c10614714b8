from .scaling import Scale as Scale
