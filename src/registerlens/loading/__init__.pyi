from .modules import to_state_dict as to_state_dict
from .registry import FAMILIES as FAMILIES
from .registry import supported_families as supported_families
