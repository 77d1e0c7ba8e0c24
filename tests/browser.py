"""A browser that tests open pages in: the system's own, without a window."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, Route, ViewportSize, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Names of programs that are such a browser."""

DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=390, height=844)
"""Sizes of windows, in pixels."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Open the browser of this system. Without one, a test is skipped, but in CI it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing = "there is no browser: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@dataclass
class OpenedPage:
    """A page in the browser, and what it did besides showing itself.

    Attributes:
        page: The page.
        requests: Addresses that it asked for, but for its own; none of them got an answer.
        faults: What the console and the page reported, and texts of dialogs.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@contextmanager
def opened(
    browser: Browser, path: Path, size: dict[str, int] = DESKTOP, *, scripts: bool = True
) -> Iterator[OpenedPage]:
    """Open a file, and check in the end that the page asked for nothing and that nothing was reported."""
    context = browser.new_context(viewport=size, java_script_enabled=scripts)
    shown = OpenedPage(context.new_page())
    own = path.as_uri()

    def answer(route: Route) -> None:
        if route.request.url.partition("#")[0] == own:
            route.continue_()
        else:
            shown.requests.append(route.request.url)
            route.abort()

    def refuse(dialog: Dialog) -> None:
        shown.faults.append(dialog.message)
        dialog.dismiss()

    context.route("**/*", answer)
    shown.page.on("console", lambda message: shown.faults.append(message.text))
    shown.page.on("pageerror", lambda fault: shown.faults.append(str(fault)))
    shown.page.on("dialog", refuse)
    shown.page.goto(own)
    yield shown
    context.close()
    assert (shown.requests, shown.faults) == ([], [])


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element that matches has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not lead to {selector}")
