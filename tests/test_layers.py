"""A room knows only the rooms below it: no module imports upward, and next to no function does."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import registerlens

PACKAGE = Path(registerlens.__file__).parent
ROOMS = (
    *("ground", "model", "loading", "data", "stats", "engine", "analysis", "interventions", "theory", "evaluation"),
    *("circuits", "diagnosis", "sweep", "emergence", "explorer", "viz", "commands"),
)
"""From the bottom up. The ground is every module that stands in no room; `cli` and `demo` are commands."""
COMMANDS = ("cli", "demo")
ROOF = "registerlens"
LAZY = {
    ("model/vit.py", "edit"): "`with vit.edit(...)`: every model has it, what it does is the room of interventions",
    **{
        ("model/vit.py", name): "every model has it; how a family's models are read and written is the room of loading"
        for name in ("from_pretrained", "from_module", "save_pretrained", "to_state_dict")
    },
}
"""Imports upward that a function may make beside a result's `plot...`, which may load viz; and why."""


def climbs(package, lazy=LAZY):
    """Every import upward, in words."""
    return [found for path in sorted(package.rglob("*.py")) for found in climbs_in(path, package, lazy)]


def climbs_in(path, package, lazy):
    own = path.relative_to(package)
    if own.name == "__init__.py" and len(own.parts) == 1:
        return
    here = room(own.with_suffix("").parts)
    for line, function, target in imports(ast.parse(path.read_text()).body):
        name, above = target.removeprefix(f"{ROOF}."), ROOF
        if target != ROOF:
            module = package.joinpath(*name.split("."))
            # `from registerlens import trace` is of the roof, `from registerlens import errors` of a module.
            known = module.with_suffix(".py").exists() or module.is_dir() or "." in name
            above = room(name.split(".")) if known else ROOF
        height = len(ROOMS) if above == ROOF else ROOMS.index(above)
        plot = function.startswith("plot") and above == "viz"
        if height > ROOMS.index(here) and not plot and (own.as_posix(), function) not in lazy:
            yield (
                f"{path}:{line}: '{here}' imports '{target}', which is above it. Move what both need down to '{here}' "
                f"or below, or the code that needs it up; only a result's plot() may load viz, when it is called."
            )


def room(parts):
    if len(parts) > 1:
        return parts[0]
    return parts[0] if parts[0] in ROOMS else "commands" if parts[0] in COMMANDS else "ground"


def imports(statements, function=""):
    """(line, function it stands in, what is imported) of all imports of our own, but those for type checkers."""
    for node in statements:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{ROOF}."):
            one = node.module == ROOF
            yield from ((node.lineno, function, f"{ROOF}.{name.name}" if one else node.module) for name in node.names)
        elif isinstance(node, ast.Import):
            ours = (name.name for name in node.names if f"{name.name}.".startswith(f"{ROOF}."))
            yield from ((node.lineno, function, name) for name in ours)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from imports(ast.iter_child_nodes(node), inner)


def test_no_room_knows_a_room_above_it():
    assert not (found := climbs(PACKAGE)), "\n".join(found)


def test_every_room_has_its_place_in_the_order():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == set(ROOMS) - {"ground"}, "say in ROOMS where a new room stands"


def test_every_exception_is_needed():
    for excused in LAZY:
        assert climbs(PACKAGE, {key: why for key, why in LAZY.items() if key != excused}), f"{excused} climbs no more"


PLANTED = {
    "from registerlens.sweep import grid": True,
    "from registerlens.sweep.grid import product": True,
    "import registerlens.viz.theme": True,
    "import registerlens as rl": True,
    "from registerlens import trace": True,
    "try:\n    from registerlens.viz import theme\nexcept ImportError:\n    pass": True,
    "def plot(self):\n    from registerlens.sweep import grid": True,
    "def figure(self):\n    from registerlens.viz import theme": True,
    "def plot(self):\n    from registerlens.viz import theme": False,
    "if TYPE_CHECKING:\n    from registerlens.viz import theme": False,
    "from registerlens import errors": False,
    "from registerlens.evaluation.metrics import Metric": False,
}


@pytest.mark.parametrize(("code", "wrong"), PLANTED.items())
def test_an_import_upward_is_found_and_told_where(tmp_path, code, wrong):
    for name in ("circuits", "sweep", "viz", "evaluation"):
        (tmp_path / name).mkdir()
    for name in ("errors.py", "sweep/grid.py", "circuits/lens.py"):
        (tmp_path / name).touch()
    (tmp_path / "circuits/lens.py").write_text(f"\n{code}\n")
    found = climbs(tmp_path)
    assert len(found) == wrong
    assert all(f"{tmp_path / 'circuits/lens.py'}:" in one and "'circuits' imports" in one for one in found)


def test_a_class_name_stands_for_one_class():
    """Two rooms may both have a private `_Sums`; a name that others import means one thing."""
    trees = (ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, n in names.items() if n > 1 and not name.startswith("_")] == []
