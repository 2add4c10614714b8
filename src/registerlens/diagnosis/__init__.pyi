from .findings import CauseFinding as CauseFinding
from .findings import Diagnosis as Diagnosis
