"""What a person does on the playground of the page, for tests."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page


def generate(page: "Page", prompt: str, **fields: str) -> None:
    """Fills in the form and starts to generate."""
    page.get_by_label("Prompt").fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.get_by_role("button", name="Generate").click()
