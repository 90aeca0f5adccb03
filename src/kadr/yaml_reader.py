"""Reads YAML that other people wrote: no tags that run code, no aliases, nothing deep or long."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_DEPTH = 32  # the official configs have 3
MAX_YAML_NODES = 5000  # keys and values; those configs have 80, and a few seconds go by for more


def parse_yaml(text: str) -> Any:
    """Parses a YAML document.

    Raises:
        ValueError: it is not YAML, is nested too deeply, has too many values, uses aliases, or has a value that Python
            cannot hold.
    """
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases: a page of them stands for more values than fit in memory."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node of the document, unless it is an alias, too deep or one too many."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ValueError(f"*{alias.anchor} in line {alias.start_mark.line + 1} is an alias; write the value out")
        self.nodes += 1
        if self.nodes > MAX_YAML_NODES:
            raise ValueError(f"it has more than {MAX_YAML_NODES} keys and values")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node
