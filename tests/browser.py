"""A headless Chromium for tests that must see a page as a person does, watched for errors and requests."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Watched:
    """A Playwright page, with what went wrong in it and what it asked the network for."""

    page: object
    errors: list[str] = field(default_factory=list)
    """Console errors and uncaught exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses asked for that are not part of the page: neither file: nor data: nor blob:."""


def chromium():
    """Where Chromium is; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("needs Chromium, or Google Chrome: apt-get install chromium")
    return found


@contextmanager
def opened(address, width=1280, height=900, **context):
    """The page at this address (a file: or http: URL) in a fresh Chromium, as a `Watched`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=_QUIET, timeout=120_000)
        page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        watched = Watched(page)
        page.on("console", lambda message: message.type == "error" and watched.errors.append(message.text))
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url == address
                or request.url.startswith(("file:", "data:", "blob:"))
                or watched.requests.append(request.url)
            ),
        )
        page.set_default_timeout(120_000)  # other tests run beside this one
        page.goto(address)
        yield watched
        browser.close()
