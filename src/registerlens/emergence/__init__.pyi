from .config import TrainingConfig as TrainingConfig
from .criteria import EmergenceCriteria as EmergenceCriteria
from .criteria import emergence_criteria as emergence_criteria
from .dynamics import Dynamics as Dynamics
from .dynamics import training_dynamics as training_dynamics
from .research import results_table as results_table
from .run import TrainingRun as TrainingRun
from .training import train as train
