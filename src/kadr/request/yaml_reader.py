"""Reads YAML that other people wrote: no tags that run code, no aliases, nothing nested deeply."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_DEPTH = 32  # the official configs have 3


def parse_yaml(text: str) -> Any:
    """Parses a YAML document.

    Raises:
        ValueError: it is not YAML, is nested too deeply, uses aliases, or has a value that Python cannot hold.
    """
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases: a page of them stands for more values than fit in memory."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node of the document, unless it is an alias or too deep."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ValueError(f"*{alias.anchor} in line {alias.start_mark.line + 1} is an alias; write the value out")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node
