"""A real browser, and a tab of it for each test."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import HANG_S

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    driving = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with driving.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser", tmp_path: Path) -> "Iterator[Page]":
    """A tab in which nothing may go wrong, and that may call nothing but its server."""
    from playwright.sync_api import expect

    context = browser.new_context()
    context.set_default_timeout(1000 * HANG_S)
    expect.set_options(timeout=1000 * HANG_S)
    page = context.new_page()
    problems: list[str] = []

    def check_message(message: "ConsoleMessage") -> None:
        # A refused call is also a message; the page shows its sentence.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def check_request(request: "Request") -> None:
        if not request.url.startswith("http://127.0.0.1:"):
            problems.append(request.url)

    page.on("console", check_message)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", check_request)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    context.close()
    assert not problems
