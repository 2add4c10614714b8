from .summary import ModelSummary as ModelSummary
