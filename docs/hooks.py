"""What MkDocs adds to the written pages: the API reference, the error pages and the list of tutorials.

All three come from what there is, so that no public name, no class of error and no notebook can be forgotten.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import registerlens
from registerlens import errors

ROOT = Path(__file__).parent.parent


def public_names() -> dict[str, list[str]]:
    """Page of the API reference -> where each of its names is defined; every public name is on exactly one page.

    There is a page for the package itself and one for each of its rooms, `rl.analysis` and so on.
    """
    rooms = [name for name in registerlens.__all__ if isinstance(getattr(registerlens, name), ModuleType)]
    pages = {"registerlens": _listed(registerlens)} | {room: _listed(getattr(registerlens, room)) for room in rooms}
    first = {name for page in pages.values() for name in page}
    for room in rooms:  # a module at the ground has no list of names: what it defines
        module = getattr(registerlens, room)
        if not pages[room]:
            own = [f"{module.__name__}.{name}" for name in vars(module) if _defined(module, name)]
            pages[room] = [name for name in own if name not in first]
    return pages


def _listed(package: ModuleType) -> list[str]:
    """What the stub beside a package's `__init__.py` lists, with the modules it comes from."""
    stub = Path(package.__file__ or "").with_suffix(".pyi")
    nodes = ast.parse(stub.read_text()).body if stub.exists() else []
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return [f"{package.__name__}.{node.module}.{alias.name}" for node in imports for alias in node.names]


def _defined(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    kind = isinstance(value, type | FunctionType) and value.__module__ == module.__name__
    return kind and not name.startswith("_")


def api_page(page: str, names: list[str]) -> str:
    """One page of the API reference, as Markdown for mkdocstrings."""
    module = registerlens if page == "registerlens" else getattr(registerlens, page)
    title = "rl" if page == "registerlens" else f"rl.{page}"
    note = "\n\nEach has [a page of its own](../errors/index.md)." if page == "errors" else ""
    about = (module.__doc__ or "").strip()
    return f"# {title}\n\n{about}{note}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


_ABOUT_ERRORS = """# Errors

Every error that RegisterLens raises on purpose says what it got, what it expected and what to do. Under the traceback,
in notebooks too, stands a line such as `registerlens help ShapeError`: that command prints the page of the error,
offline. `except rl.RegisterLensError` catches them all; each is also of the built-in class that fits, so that
`except ValueError` and `except OSError` work as elsewhere.

| error | when |
|---|---|
"""


def errors_index() -> str:
    """The table of error pages."""
    rows = [f"| [`{kind.__name__}`]({kind.__name__}.md) | {_first_line(kind)} |\n" for kind in errors.kinds()]
    return _ABOUT_ERRORS + "".join(rows)


def tutorials() -> dict[str, str]:
    """Name of each notebook -> its title."""
    return {path.stem: _title(path) for path in sorted((ROOT / "tutorials").glob("*.ipynb"))}


_ABOUT_TUTORIALS = """# Tutorials

Notebooks to read here, with their outputs and figures, or to run: the repository has them in `tutorials/`. They need no
network, and take less than a minute each on two cores.

"""


def tutorials_index() -> str:
    """Links to the rendered notebooks, which `tutorials/render.py` puts beside this page."""
    rows = [f'- {name[:2]} <a href="{name}.html">{title}</a>\n' for name, title in tutorials().items()]
    return _ABOUT_TUTORIALS + "".join(rows)


def generated() -> dict[str, str]:
    """Path in the site -> Markdown, for every page that is not written by hand."""
    pages = {f"api/{page}.md": api_page(page, names) for page, names in public_names().items()}
    pages["errors/index.md"] = errors_index()
    pages |= {f"errors/{kind.__name__}.md": errors.page_of(kind).read_text() for kind in errors.kinds()}
    pages["tutorials/index.md"] = tutorials_index()
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    sections: dict[str, list[str]] = {
        "API reference": [f"api/{page}.md" for page in public_names()],
        "Errors": ["errors/index.md", *(f"errors/{kind.__name__}.md" for kind in errors.kinds())],
        "Tutorials": ["tutorials/index.md"],
    }
    config.nav = _filled(config.nav, sections)
    config.watch.append(str(errors.page_of(errors.RegisterLensError).parent))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def _filled(nav: Any, sections: dict[str, list[str]]) -> Any:
    """The navigation with the empty sections filled."""
    if isinstance(nav, list):
        return [_filled(item, sections) for item in nav]
    if isinstance(nav, dict):
        return {title: sections[title] if inner == [] else _filled(inner, sections) for title, inner in nav.items()}
    return nav


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def _title(path: Path) -> str:
    """A notebook's first heading."""
    cells = json.loads(path.read_text())["cells"]
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), path.stem)
