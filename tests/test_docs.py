"""The documentation: its examples run and print what they say, nothing public is left out, the site stands alone."""

import contextlib
import doctest
import importlib.util
import io
import os
import re
import subprocess
import sys
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest
import torch
from browser import opened
from helpers import rooms

import registerlens as rl
from registerlens import errors

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
LIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
AT_ONCE = {"index.md", "installation.md"}
"""Pages whose examples the ordinary tests run, beside those of most error pages; the others are slow."""
SLOW_ERRORS = {f"errors/{name}.md" for name in ("BackendError", "ModelNotFoundError", "NoOutliersError")}


@cache
def hooks():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages():
    """Path in the site -> Markdown of every page, written or generated, but for the API reference (docstrings)."""
    written = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    return {path: text for path, text in (written | hooks().generated()).items() if not path.startswith("api/")}


PAGES = pages()
WITH_CODE = sorted(path for path, text in PAGES.items() if "```python" in text and ">>>" not in text)


def run_page(text, where):
    """Run a page's Python from top to bottom; a ```text block after one is what it prints."""
    names, printed = {"__name__": "__main__"}, None
    for language, code in FENCE.findall(text):
        if language == "python":
            assert printed in (None, ""), f"{where}: printed, and the page does not say so: {printed}"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, where, "exec"), names)
            printed = out.getvalue()
        elif printed is not None and language == "text":
            assert doctest.OutputChecker().check_output(code, printed, LIKE), f"{where}: {printed!r} is not {code!r}"
            printed = None
    assert printed in (None, ""), f"{where}: printed, and the page does not say so: {printed}"


def params():
    quick = {path for path in WITH_CODE if path.startswith("errors/")} - SLOW_ERRORS | AT_ONCE
    return [pytest.param(path, marks=() if path in quick else pytest.mark.slow) for path in WITH_CODE]


@pytest.mark.parametrize("path", params())
def test_examples_run_and_print_what_the_page_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(PAGES[path], path)


def test_a_wrong_example_would_be_noticed():
    right = "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"
    run_page(right, "right")
    for wrong in (right.replace("2", "3"), "```python\nprint(1)\n```\n"):
        with pytest.raises(AssertionError):
            run_page(wrong, "wrong")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "wrong")


def test_python_is_fenced_so_that_it_is_run():
    """No page hides Python under another name, and every fence is closed."""
    for path, text in PAGES.items():
        assert text.count("```") % 2 == 0, path
        for language, code in FENCE.findall(text):
            assert language in ("python", "text", "bash", "bibtex", "yaml", ""), (path, language)
            hidden = language != "python" and re.search(r"^(import|from) \w", code, flags=re.M)
            assert not hidden, (path, code)


# Nothing is left out -------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_api_reference_exactly_once():
    listed = [name for names in hooks().public_names().values() for name in names]
    assert len(listed) == len(set(listed))
    short = [name.rpartition(".")[2] for name in listed]
    for room in (rl, *rooms()):
        for name in getattr(room, "__all__", ()):
            assert short.count(name) == (0 if isinstance(getattr(room, name), ModuleType) else 1), (room, name)
    assert {kind.__name__ for kind in errors.kinds()} <= {*short}
    text = "".join(page for path, page in hooks().generated().items() if path.startswith("api/"))
    assert sorted(re.findall(r"^::: (\S+)$", text, flags=re.M)) == sorted(listed)


def test_every_notebook_is_linked():
    page = hooks().tutorials_index()
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        assert f'<a href="{path.stem}.html">' in page


def test_written_pages_are_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"- {path.relative_to(ROOT / 'docs')}\n" in listed, path


def test_citation_names_package_version_and_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {rl.__version__}\n" in text and "2506.08010" in text
    page = PAGES["citing.md"]
    assert "2506.08010" in page and rl.__version__ in page


# The site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly (a broken link or a doubtful docstring stops it), without the tutorials."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_every_page_is_there_and_names_no_other_host_to_load_from(site):
    for path in [*PAGES, *(f"api/{page}.md" for page in hooks().public_names())]:
        html = (site / path).with_suffix(".html").read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', html)
        assert not [link for pair in loaded for link in pair if link.startswith(("http:", "https:", "//"))], path
    ids = re.findall(
        r'id="(registerlens\.[\w.]+)"', "".join(page.read_text() for page in (site / "api").glob("*.html"))
    )
    for names in hooks().public_names().values():
        assert all(ids.count(name) == 1 for name in names)


@pytest.mark.slow
@pytest.mark.xdist_group("site")
@pytest.mark.parametrize("served", [False, True], ids=["as a file", "served"])
def test_pages_open_and_search_works_without_the_network(site, served):
    with serving(site) if served else contextlib.nullcontext(site.as_uri()) as address:
        for page in ("api/interventions.html", "errors/ShapeError.html")[: 1 if served else 2]:
            with opened(f"{address}/{page}") as seen:
                seen.page.wait_for_load_state("networkidle")
                outside = [url for url in seen.requests if not url.startswith(address)]
                assert (seen.errors, outside) == ([], []), page
                assert seen.page.locator("h1").count() == 1
        with opened(f"{address}/index.html") as seen:
            assert seen.page.locator("h1").count() == 1
            seen.page.get_by_role("textbox", name="Search").first.click()
            seen.page.keyboard.type("sinder")
            found = seen.page.locator(".md-search-result__link").first
            found.wait_for(timeout=10_000)
            assert "html" in found.get_attribute("href") and seen.errors == []
            assert not [url for url in seen.requests if not url.startswith(address)]


@contextlib.contextmanager
def serving(folder):
    """The folder on this machine's own address."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
