"""The wheel does the main job where only what it requires is installed."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_without_extras(tmp_path):
    """Built from the tracked files alone, and run where nothing but the wheel and what it requires can be imported.

    So what the package forgets to pack or to require is found. What pip would choose and download is not: the required
    packages are those of this environment, shown to the new one by links.
    """
    wheel = _wheel(tmp_path)
    installed = tmp_path / "installed"
    _run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheel)
    (metadata,) = importlib.metadata.distributions(name="registerlens", path=[str(installed)])
    required = _required_by(metadata)
    assert "torch" in required and not required & {"timm", "open-clip-torch", "onnx", "scikit-image", "ray", "pytest"}
    _link(required, tmp_path / "required")

    path = os.pathsep.join(str(tmp_path / folder) for folder in ("installed", "required"))
    # -S: without this environment's own site-packages.
    ran = _run("-S", installed / "bin" / "registerlens", "demo", "--out", tmp_path / "demo", PYTHONPATH=path)
    assert "present" in ran and f"Wrote {tmp_path / 'demo' / 'tiny.html'}" in ran
    assert "pip install 'registerlens[demo]'" in ran
    assert [page.name for page in (tmp_path / "demo").glob("*.html")] == ["tiny.html"]


def _wheel(folder):
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    _run("-m", "pip", "wheel", *how, folder / "clone")
    return next(folder.glob("registerlens-*.whl"))


def _required_by(distribution):
    """The names of all that it requires without extras, and of what those require in their turn."""
    found, waiting = set(), [(distribution, "")]
    while waiting:
        holder, extra = waiting.pop()
        for requirement in map(Requirement, holder.requires or ()):
            name = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for wanted in {"", *requirement.extras} - {seen for other, seen in found if other == name}:
                found.add((name, wanted))
                waiting.append((importlib.metadata.distribution(name), wanted))
    return {name for name, _ in found}


def _link(names, folder):
    """A folder like site-packages with these distributions in it."""
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(distribution.locate_file(entry))


def _run(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
