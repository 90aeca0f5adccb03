"""Reads HTML strictly: every element is closed in order, and nothing but elements and text is there."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import NamedTuple

VOID_TAGS = {"img", "br"}


class Element(NamedTuple):
    """A tag with its attributes; None is the value of one without."""

    tag: str
    attributes: dict[str, str | None]


class HtmlReader(HTMLParser):
    """Collects the elements and the text of HTML; fails where an element is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.texts: list[str] = []
        self._open: list[str] = []

    @classmethod
    def read(cls, text: str) -> HtmlReader:
        reader = cls()
        reader.feed(text)
        reader.close()
        assert reader._open == []
        return reader

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def find(self, tag: str) -> dict[str, str | None]:
        """Returns the attributes of the only element of a tag."""
        (element,) = (element for element in self.elements if element.tag == tag)
        return element.attributes
