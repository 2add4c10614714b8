"""Settings: frozen, checked when they are made or changed, from files that may hold anything, and without torch."""

import subprocess
import sys

import pytest

from registerlens.errors import ConfigError
from registerlens.settings import Count, Named, Number, Settings


class Inner(Settings):
    size: Count = 1


class Outer(Settings):
    inner: Inner = Inner()
    share: Number | None = None
    names: Named[Count] | None = None


def test_they_are_frozen_and_what_is_changed_is_checked_anew():
    outer = Outer(inner={"size": 3})
    assert outer.changed(share=0.5) == Outer(inner=Inner(size=3), share=0.5) != outer
    assert hash(outer) == hash(Outer(inner=Inner(size=3)))
    with pytest.raises(ValueError, match="frozen"):
        outer.share = 1.0
    with pytest.raises(ConfigError, match=r"^Unknown key 'shore'. Did you mean 'share'"):
        outer.changed(shore=1.0)
    with pytest.raises(ConfigError, match=r"^'inner.size' is 0, .* from 1.\n'share' is 'x', expected"):
        Outer(inner={"size": 0}, share="x")


def test_what_no_file_may_hold_is_refused_with_its_line():
    for text, said in (
        ("share: 1\ninner: &a {inner: *a}", "line 2, column 8: No valid YAML: found unconstructable recursive node"),
        ("names: " + 5000 * "[", "line 1, column 1: No valid YAML: maximum recursion depth"),
        ("{share: 1, share: 2, inner: {size: 1, size: 2}}", "line 1, column 12: 'share' stands twice, first in line 1"),
        ("names: {a: 1, b: 0}\nshare: 1\n", "line 1, column 15: 'names.b' is 0, expected a whole number from 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            Outer.from_text(text, "some.yaml")
        assert said in str(caught.value)


def test_wrong_keys_are_told_without_torch():
    """Which takes seconds to import."""
    code = """
import sys
from registerlens.emergence.config import TrainingConfig
from registerlens.errors import ConfigError
from registerlens.sweep.yaml_config import SweepConfig
for kind in (TrainingConfig, SweepConfig):
    try:
        kind.from_text("sed: 1", "some.yaml")
    except ConfigError as error:
        print(error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Did you mean 'seed'") == 2 and done.stdout.count("False") == 2
