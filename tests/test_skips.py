"""Where skips are refused, a test that would be skipped fails and says what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

def test_passes():
    pass

def test_lacks_something():
    pytest.skip("needs a cluster")

@pytest.mark.skip(reason="needs a GPU: not on this machine")
def test_may_be_skipped():
    pass

@pytest.mark.xfail
def test_known_to_fail():
    assert False

def example():
    '''
    >>> 1 / 0  # doctest: +SKIP
    '''
"""


@pytest.mark.parametrize(
    ("setting", "outcome"),
    [("refused", "2 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors"), ("", "1 passed, 5 skipped, 1 xfailed")],
)
def test_a_skip_fails_where_it_is_refused(tmp_path, setting, outcome):
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_module.py").write_text(
        "import pytest\npytest.importorskip('no_such_module', reason='needs it')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "skips",
        "--doctest-modules",
        "-rf",
        "--continue-on-collection-errors",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "REGISTERLENS_SKIPS": setting}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert outcome in ran.stdout.splitlines()[-1]
    assert ("needs a cluster" in ran.stdout) == bool(setting)
