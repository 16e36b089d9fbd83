"""Whole documents of the passages that a corpus yields, for tests."""

from collections.abc import Iterable

from trainer_service.text.documents import Passage


def whole_documents(passages: Iterable[Passage]) -> list[str]:
    found, text = [], ""
    for passage in passages:
        text += passage.text
        if passage.ends_document:
            found.append(text)
            text = ""
    assert not text
    return found
