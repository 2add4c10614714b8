from .browsing import ModelSummary as ModelSummary
