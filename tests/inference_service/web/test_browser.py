"""The page in a real browser, with a live trainer and a live server."""

import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

from inference_service.client import AdminClient
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service.settings import Directories
from tests.end_to_end.conftest import TINY, System, running
from tests.fakes import TINY as TINY_MODEL
from tests.fakes import publish_tiny_version
from tests.inference_service.operated import Operated
from tests.inference_service.process import Server, text_of
from tests.inference_service.web.generating import generate
from tests.waiting import wait_until
from trainer_service.jobs.requests import TrainRequest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

# What a model repeats after a few steps: it must never become a part of the page.
MARKUP = "<img src=x onerror=\"document.title='taken'\"> <b>bold</b> "
RUN = {"max_steps": "500", "evaluation_interval": "100"}
PHONE_WIDTH = 360


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The whole system, with one finished run, `first`, whose text is markup."""
    with running(Directories(tmp_path_factory.mktemp("system"))) as system:
        system.finish(train(system, "first"))
        yield system


def train(system: System, name: str, **values: str) -> str:
    text = system.directories.var / "markup.txt"
    text.write_text(MARKUP * 3000)
    request = TrainRequest(dataset=(str(text),), overrides=TINY | RUN | values, name=name)
    return system.trainer.submit(request).job.id


def address(system: System, view: str) -> str:
    return f"http://127.0.0.1:{system.ports.inference_http}/#{view}"


def first_and_last(system: System) -> tuple[str, str]:
    """Returns the first and the last version that are there now."""
    first, *_, last = system.registry.versions()
    return str(first.version), str(last.version)


def versions(system: System, run: str) -> list[str]:
    """Returns the versions that a run has published, also those that are gone."""
    return [str(line.version) for line in system.registry.histories.read(run).evaluations if line.version]


def serving(system: System) -> int:
    with AdminClient(f"127.0.0.1:{system.ports.inference}") as admin:
        return next((one.version for one in admin.versions().versions if one.state == pb.VERSION_STATE_SERVING), 0)


def written(page: Page, lane: int = 0) -> str:
    return page.locator(".lane").nth(lane).locator(".written").text_content() or ""


def test_a_run_draws_its_curve_while_it_trains_and_its_versions_appear_on_it(system: System, page: Page) -> None:
    page.goto(address(system, "training"))
    figures, marks = page.locator("#figures"), page.locator("#chart-loss .mark")
    expect(page.get_by_role("heading", name="first")).to_be_visible()
    expect(figures).to_contain_text("finished")
    expect(figures).to_contain_text("500 of 500")
    expect(marks).to_have_count(len(versions(system, "first")))

    # It does not end by itself before the page was looked at.
    job = train(system, "second", max_steps="1000000", evaluation_interval="100")
    expect(page.get_by_role("heading", name="second")).to_be_visible()
    expect(figures).to_contain_text("of 1,000,000")
    expect(figures).to_contain_text("running, ")
    expect(figures).to_contain_text("left")
    expect(marks.first).to_be_visible()
    picture = page.locator("#chart-loss canvas").screenshot()
    wait_until(lambda: page.locator("#chart-loss canvas").screenshot() != picture)
    expect(marks.nth(1)).to_be_visible()
    system.trainer.cancel(job)
    system.end(job)
    published = versions(system, "second")
    expect(marks).to_have_count(len(published))
    titles = [marks.nth(i).get_attribute("title") or "" for i in range(len(published))]
    assert [re.split("[ ,]", title)[1] for title in titles] == published

    page.get_by_label("first").check()
    expect(page.locator(".u-legend")).to_contain_text("first, held out")
    expect(marks).to_have_count(len(versions(system, "first")) + len(published))
    page.get_by_label("tokens", exact=True).check()
    page.get_by_text("Evaluations as a table").click()
    rows = page.get_by_role("table", name="Evaluations of second").locator("tbody tr")
    expect(rows).to_have_count(len(system.registry.histories.read("second").evaluations))


def test_a_text_streams_as_it_would_over_grpc_and_a_link_reproduces_it(system: System, page: Page) -> None:
    version = int(first_and_last(system)[0])
    page.goto(address(system, "playground"))
    page.get_by_role("combobox", name="Version", exact=True).select_option(str(version))
    generate(page, "<b", Tokens_at_most="40", Seed="7", Temperature="0.9")
    expect(page.locator(".lane .hint")).to_contain_text("tokens,")
    with system.client() as client:
        expected = text_of(client.generate("<b", version=version, seed=7, temperature=0.9, max_tokens=40))
    assert written(page) == expected

    link = page.evaluate("location.href")
    assert system.registry.version(version).digest in link
    page.goto("about:blank")
    page.goto(link)
    expect(page.get_by_label("Seed")).to_have_value("7")
    expect(page.get_by_role("combobox", name="Version", exact=True)).to_have_value(str(version))
    expect(page.locator("#playground-error")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".lane .hint")).to_contain_text("tokens,")
    assert written(page) == expected
    page.get_by_role("button", name="Another seed").click()
    expect(page.get_by_label("Seed")).not_to_have_value("7")


def test_a_link_to_a_version_that_is_not_here_says_so(system: System, page: Page) -> None:
    version = first_and_last(system)[0]
    link = f"prompt=x&seed=1&version={version}&version_digest=0123&other=9999&other_digest=4567"
    page.goto(address(system, f"playground?{link}"))
    error = page.locator("#playground-error")
    expect(error).to_contain_text(f"Version {version} of this server is another one than that of the link")
    expect(error).to_contain_text("does not have version 9999 of the link")


def test_two_versions_write_side_by_side_with_the_same_seed(system: System, page: Page) -> None:
    first, last = first_and_last(system)
    page.goto(address(system, "playground"))
    page.get_by_role("combobox", name="Version", exact=True).select_option(first)
    page.get_by_role("combobox", name="Beside it").select_option(last)
    generate(page, "<img", Tokens_at_most="30", Seed="3")
    lanes = page.locator(".lane")
    expect(lanes).to_have_count(2)
    for lane, version in enumerate((first, last)):
        expect(lanes.nth(lane).locator(".hint")).to_contain_text("tokens,")
        expect(lanes.nth(lane).get_by_role("heading")).to_have_text(f"Version {version}")
        with system.client() as client:
            text = text_of(client.generate("<img", version=int(version), seed=3, temperature=0.8, max_tokens=30))
        assert written(page, lane) == text


def test_markup_that_a_model_writes_stays_text(system: System, page: Page) -> None:
    page.goto(address(system, "playground"))
    best = str(system.registry.resolve("best").version)
    page.get_by_role("combobox", name="Version", exact=True).select_option(best)
    generate(page, MARKUP, Tokens_at_most="60", Temperature="0")
    expect(page.locator(".lane .hint")).to_contain_text("tokens,")
    assert "<b>" in written(page)
    assert page.locator(".given").text_content() == MARKUP
    page.locator(".lane .token").first.hover()
    expect(page.locator(".about")).to_be_visible()
    page.get_by_role("link", name="Versions").click()
    page.get_by_role("link", name="Playground").click()
    assert page.locator("#view-playground img, #view-playground b").count() == 0
    assert page.title() == "Playground · gptloop"


def test_pointing_at_a_token_and_the_arrow_keys_show_what_else_was_likely(system: System, page: Page) -> None:
    page.goto(address(system, "playground"))
    generate(page, "<b", Tokens_at_most="12", Seed="1")
    expect(page.locator(".lane .hint")).to_contain_text("tokens,")
    about = page.locator(".about")
    expect(about).to_be_hidden()
    page.locator(".lane .token").nth(2).hover()
    expect(about.locator("li")).to_have_count(5)
    shares = [float(re.sub(r"[^0-9.]", "", text)) for text in about.locator("li span:last-child").all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    page.locator("h1 >> visible=true").hover()
    expect(about).to_be_hidden()
    page.locator(".lane .text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token.current")).to_have_count(1)
    assert "current" in (page.locator(".lane .token").first.get_attribute("class") or "")
    page.keyboard.press("Escape")
    expect(about).to_be_hidden()


def test_stop_ends_a_stream_and_frees_its_slot(operated: Operated, page: Page) -> None:
    # At temperature 0 it repeats itself until the context is full.
    number = operated.publish_serving(config=replace(TINY_MODEL, context_length=16384))
    page.goto(f"{operated.server.page_url}#playground")
    generate(page, "x", Tokens_at_most="16000", Temperature="0")
    expect(page.locator(".lane .token").first).to_be_visible()
    assert operated.status(number).streams == 1
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".lane .hint")).to_contain_text("Stopped after ")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    wait_until(lambda: operated.status(number).streams == 0)


def test_a_stream_that_breaks_off_is_a_sentence(tmp_path: Path, page: Page) -> None:
    server = Server(tmp_path / "var")
    publish_tiny_version(server.registry, 1.0, config=replace(TINY_MODEL, context_length=16384))
    wait_until(server.serves)
    page.goto(f"{server.page_url}#playground")
    generate(page, "x", Tokens_at_most="16000", Temperature="0")
    expect(page.locator(".lane .token").first).to_be_visible()
    server.end(signal.SIGKILL)
    expect(page.locator(".lane [role=alert]")).to_contain_text("The stream broke off")


def test_an_address_that_names_no_view_shows_training(system: System, page: Page) -> None:
    page.goto(address(system, "toString"))
    expect(page.get_by_role("heading", name="Training", exact=True)).to_be_visible()


def test_an_error_of_the_server_is_a_sentence(system: System, page: Page) -> None:
    page.goto(address(system, "playground"))
    generate(page, MARKUP * 2000)
    error = page.locator(".lane [role=alert]")
    expect(error).to_contain_text("must have fewer than 256")
    expect(error).to_contain_text("tokens")


def test_a_rollback_takes_effect_after_a_confirmation(system: System, page: Page) -> None:
    page.goto(address(system, "versions"))
    before = serving(system)
    row = page.locator("#versions-rows tr").filter(has=page.get_by_role("rowheader", name=str(before), exact=True))
    expect(row).to_contain_text("serving")
    page.get_by_role("button", name="Roll back…").click()
    dialog = page.get_by_role("dialog", name=f"Roll back version {before}?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert serving(system) == before

    page.get_by_role("button", name="Roll back…").click()
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.locator("#versions-result")).to_contain_text(f"Version {before} is rolled back; version ")
    expect(row).to_contain_text("refused")
    expect(row).to_contain_text("an operator rolled it back")
    after = serving(system)
    assert after not in (0, before)
    expect(page.locator("#serving")).to_contain_text(f"Version {after} serves")

    # Loading examines it again, so that it may serve.
    row.get_by_role("button", name=f"Load version {before}").click()
    expect(page.locator("#versions-result")).to_have_text(f"Version {before} is in memory.")
    wait_until(lambda: serving(system) == before)
    expect(row).to_contain_text("serving, held")


def test_an_operator_pins_promotes_loads_and_follows_the_best(system: System, page: Page) -> None:
    page.goto(address(system, "versions"))
    number = first_and_last(system)[0]
    row = page.locator("#versions-rows tr").filter(has=page.get_by_role("rowheader", name=number, exact=True))
    result = page.locator("#versions-result")
    row.get_by_role("button", name=f"Pin version {number}").click()
    expect(page.locator("#serving")).to_have_text(f"Version {number} serves; the policy is pinned:{number}.")
    assert serving(system) == int(number)
    row.get_by_role("button", name=f"Promote version {number}").click()
    expect(result).to_have_text(f"Version {number} is the stable one.")
    expect(row).to_contain_text("stable")
    page.get_by_role("button", name="Follow the best version").click()
    expect(page.locator("#serving")).to_contain_text("the policy is best.")
    wait_until(lambda: serving(system) != int(number))
    row.get_by_role("button", name=f"Load version {number}").click()
    expect(result).to_have_text(f"Version {number} is in memory.")
    row.get_by_role("button", name=f"Unload version {number}").click()
    expect(result).to_contain_text(f"Version {number} has left memory.")


@pytest.mark.parametrize("view", ["training", "versions", "playground"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_view_fits_a_phone_and_its_controls_have_names(
    system: System, page: Page, view: str, scheme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": PHONE_WIDTH, "height": 700})
    page.goto(address(system, view))
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    ready = {
        "training": "#chart-loss canvas",
        "versions": "#versions-rows tr",
        "playground": "select option:nth-child(3)",
    }
    page.locator(ready[view]).first.wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE_WIDTH
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea, button")]
        .filter((each) => !each.labels?.length && !each.getAttribute("aria-label") && !each.textContent.trim())
        .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    # The keyboard reaches the content without the mouse.
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    expect(page.get_by_role("heading", level=1)).to_have_text(view.capitalize())


def test_nothing_is_asked_while_the_page_is_hidden(system: System, page: Page) -> None:
    asked: list[str] = []
    page.clock.install()
    page.goto(address(system, "training"))
    expect(page.locator("#chart-loss canvas")).to_be_visible()
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    with page.expect_request("**/api/runs"):
        page.clock.run_for(1500)
    page.evaluate("Object.defineProperty(document, 'hidden', { configurable: true, get: () => true })")
    other_call = "fetch('api/server').then((answer) => answer.json())"
    page.evaluate(other_call)
    looks = asked.count("/api/runs")
    for _ in range(10):
        page.clock.run_for(10_000)
        # Meanwhile a look would be answered, and the next one would be due.
        page.evaluate(other_call)
    assert asked.count("/api/runs") == looks
    with page.expect_request("**/api/runs"):
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")


def test_an_empty_registry_says_how_to_begin_and_a_server_that_ends_is_reported(tmp_path: Path, page: Page) -> None:
    server = Server(tmp_path / "var")
    try:
        page.goto(f"{server.page_url}#training")
        expect(page.locator("#no-run")).to_contain_text("Begin one with gptloop train")
        page.get_by_role("link", name="Versions").click()
        expect(page.locator("#no-version")).to_be_visible()
        expect(page.get_by_role("button", name="Roll back…")).to_be_disabled()
        expect(page.locator("#connection")).to_be_hidden()
        page.get_by_role("link", name="Playground").click()
        generate(page, "x")
        expect(page.locator(".lane [role=alert]")).to_contain_text("No version serves yet")
    finally:
        assert server.end() == 0
    expect(page.locator("#connection")).to_contain_text("The server does not answer")
