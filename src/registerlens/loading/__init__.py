"""Loading: families as data, one engine, every source library's names."""

from registerlens.loading.pretrained import from_pretrained
from registerlens.loading.registry import FAMILIES, from_module, supported_families, to_state_dict

__all__ = ["FAMILIES", "from_module", "from_pretrained", "supported_families", "to_state_dict"]
