import re
from html.parser import HTMLParser

from tests.trainer_service.evaluation.views.documents import EVIL, document
from trainer_service.evaluation.views.html import to_html

VOID = {"meta"}


class Page(HTMLParser):
    """Collects the elements of a page, and fails if one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.identifiers, self.references, self.words = set[str](), list[str](), set[str](), ""
        self.addresses, self.handlers = set[str](), set[str]()
        self._open = list[str]()
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.identifiers.append(value)
            if name in ("href", "xlink:href", "src"):
                self.addresses.add(value)
            if name.startswith("on"):
                self.handlers.add(name)
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_is_well_formed_and_needs_nothing_else() -> None:
    page = Page(to_html(document()))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not page.handlers
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in page.words and "http:" not in page.words


def test_plots_of_one_page_do_not_share_identifiers() -> None:
    page = Page(to_html(document()))
    assert len(page.identifiers) == len(set(page.identifiers))
    used = page.references | {address.removeprefix("#") for address in page.addresses}
    assert used and used <= set(page.identifiers)


def test_everything_from_outside_is_text() -> None:
    page = Page(to_html(document(EVIL)))
    assert "script" not in page.tags
    assert not page.handlers
    assert page.words.count('<script>alert("1")</script> & **bold**') == 17
    assert "\x1b" not in page.words and "\u202e" not in page.words


def test_a_plot_has_a_name_for_each_line_and_words_for_those_who_cannot_see_it() -> None:
    text = to_html(document())
    assert text.count('aria-label="It falls."') == 2
    assert "one, estimated</li>" in text


def test_the_same_report_is_the_same_page() -> None:
    assert to_html(document()) == to_html(document())
