"""HTML from templates, in which all text is escaped, and pages that can ask for nothing outside themselves."""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from registerlens.files import whole_file


def environment(**filters: Callable[..., Any]) -> Environment:
    """The package's templates, with filters of a room's own: what is no `Markup` is escaped, what is missing raises."""
    templates = Environment(
        loader=PackageLoader("registerlens", "assets/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    templates.tests["error"] = lambda value: isinstance(value, Exception)
    templates.filters |= filters
    return templates


_PLAIN = environment()


def render(template: str, **values: Any) -> Markup:
    """A template filled in.

    Example:
        >>> render("report/section.html", id="a", title="1 < 2", body=Markup("<p>3</p>"))
        Markup('<section aria-labelledby="a"><h2 id="a">1 &lt; 2</h2><p>3</p></section>')
    """
    return Markup(_PLAIN.get_template(template).render(values))


def asset(*names: str) -> Markup:
    """Scripts or style sheets of the package, one after the other, as they are."""
    folder = files("registerlens") / "assets"
    return Markup("".join((folder / name).read_text(encoding="utf-8") for name in names))


def policy(scripts: Sequence[str], compiles: bool = False) -> str:
    """The Content-Security-Policy of a page: these scripts run and no other, and no address is asked for anything.

    Styles may stand anywhere, as libraries set them; pictures are data: addresses, or what a script drew.

    Args:
        scripts: the text of each, exactly as it stands between its tags.
        compiles: whether they make functions from text, as plotly does for WebGL.

    Example:
        >>> policy(["let a = 1;"])
        "default-src 'none'; script-src 'sha256-xY6QKfH9PRsQnLz56nj6MBwiK5oHg+im1Jkpdp1x/Ck='; style-src..."
    """
    allowed = [f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts]
    allowed += ["'unsafe-eval'"] if compiles else []
    return (
        f"default-src 'none'; script-src {' '.join(dict.fromkeys(allowed))}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def write_html(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all; returns the path."""
    path = Path(path)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
