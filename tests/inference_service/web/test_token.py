"""The tokens that the page asks for, in a real browser."""

from pathlib import Path

import pytest

from tests.fakes import publish_tiny_version
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import Server
from tests.inference_service.web.generating import generate
from tests.token_files import ALICE, OPERATOR, write_tokens
from tests.waiting import wait_until

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow


def test_the_token_is_asked_for_once_and_kept_in_memory_only(operated: Operated, page: Page) -> None:
    number = operated.publish_serving()
    page.goto(f"{operated.server.page_url}#versions")
    promote = page.get_by_role("button", name=f"Promote version {number}")
    dialog = page.get_by_role("dialog", name="token")
    for wrong in ("close sesame", "öffne dich → Sesam"):
        dialog.get_by_label("Token").fill(wrong)
        dialog.get_by_role("button", name="Use").click()
        expect(dialog).to_contain_text("The server refused this token.")
        expect(dialog.get_by_label("Token")).to_have_value("")
    expect(promote).to_have_count(0)
    dialog.get_by_label("Token").fill(TOKEN)
    dialog.get_by_label("Token").press("Enter")
    promote.click()
    expect(page.locator("#versions-result")).to_have_text(f"Version {number} is the stable one.")
    assert "stable" in operated.status(number).labels
    page.get_by_role("button", name=f"Load version {number}").click()
    expect(page.locator("#versions-result")).to_have_text(f"Version {number} is in memory.")
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.hash])"
    assert page.evaluate(kept) == '[{},{},"","#versions"]'

    page.reload()
    expect(dialog).to_contain_text("This server answers only people who have a token.")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#connection")).to_contain_text("Only people with a token may see or do this")
    expect(dialog).to_be_hidden()
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("combobox", name="Version", exact=True)).to_contain_text(str(number))
    expect(page.locator("#connection")).to_be_hidden()
    page.get_by_role("link", name="Versions").click()
    expect(dialog).to_be_visible()
    assert operated.admin.versions().policy == "best"


def test_one_token_opens_all_that_it_is_good_for(tmp_path: Path, page: Page) -> None:
    files = {"clients": f"alice {ALICE}", "operators": f"olga {OPERATOR}"}
    clients, operators = (str(write_tokens(tmp_path / name, line)) for name, line in files.items())
    server = Server(tmp_path / "var", GPTLOOP_CLIENT_TOKENS=clients, GPTLOOP_OPERATOR_TOKENS=operators)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        page.goto(f"{server.page_url}#training")
        dialog = page.get_by_role("dialog", name="token")
        expect(dialog).to_contain_text("This server answers only people who have a token.")
        dialog.get_by_label("Token").fill(ALICE)
        dialog.get_by_role("button", name="Use").click()
        expect(page.locator("#no-run")).to_be_visible()
        page.get_by_role("link", name="Playground").click()
        generate(page, "x")
        expect(page.locator(".lane .hint")).to_contain_text("tokens,")
        expect(dialog).to_be_hidden()

        page.get_by_role("link", name="Versions").click()
        expect(dialog).to_contain_text("but this needs an operator")
        # A wrong token does not replace the one that is good for the rest.
        dialog.get_by_label("Token").fill("close sesame")
        dialog.get_by_role("button", name="Use").click()
        expect(dialog).to_contain_text("The server refused this token.")
        dialog.get_by_role("button", name="Cancel").click()
        expect(page.locator("#connection")).to_contain_text("Only people with a token may see or do this")
        page.get_by_role("link", name="Playground").click()
        generate(page, "y")
        expect(page.locator(".lane .hint")).to_contain_text("tokens,")
        expect(page.locator("#connection")).to_be_hidden()

        page.get_by_role("link", name="Versions").click()
        expect(dialog).to_contain_text("but this needs an operator")
        dialog.get_by_label("Token").fill(OPERATOR)
        dialog.get_by_role("button", name="Use").click()
        page.get_by_role("button", name="Promote version 1").click()
        expect(page.locator("#versions-result")).to_have_text("Version 1 is the stable one.")
    finally:
        assert server.end() == 0
