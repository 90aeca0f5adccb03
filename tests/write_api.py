"""Writes the tables of docs/reference/api.md that follow from the OpenAPI description: `python -m tests.write_api`.

tests/server/test_description.py holds the page to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from kadr.server import schema
from kadr.server.app import ROUTERS
from tests import doc_tables

PAGE = doc_tables.DOCS / "reference" / "api.md"
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
_TYPES |= {"object": "object", "array": "list"}


@cache
def describe_api() -> dict[str, Any]:
    """Returns the OpenAPI description of all routes."""
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    return app.openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields method, path and description of every route."""
    for path, methods in describe_api()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def route_table() -> str:
    """Returns the table of the routes."""
    return doc_tables.markdown_table(
        ("route", "what it does", "statuses"), (_route_row(*operation) for operation in operations())
    )


def field_table(model: type[BaseModel]) -> str:
    """Returns the table of the fields of a body or an answer."""
    properties = model.model_json_schema()["properties"]
    fields = sorted(properties.items(), key=lambda item: item[0] != "prompt" or model is not schema.CreateVideo)
    rows = [(f"`{name}`", _type_of(field), _meaning_of(field)) for name, field in fields]
    return doc_tables.markdown_table(("field", "type", "meaning"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "routes": route_table,
    "settings": lambda: field_table(schema.CreateVideo),
    "video": lambda: field_table(schema.VideoJob),
    "upload": lambda: field_table(schema.Upload),
    "frame": lambda: field_table(schema.UploadFrame),
    "plan": lambda: field_table(schema.VideoPlan),
    "prompt": lambda: field_table(schema.PlannedPrompt),
    "model": lambda: field_table(schema.DescribedModel),
    "queue": lambda: field_table(schema.QueueState),
    "system": lambda: field_table(schema.SystemState),
    "selftest": lambda: field_table(schema.SelftestStatus),
    "health": lambda: field_table(schema.Health),
}


def _route_row(method: str, path: str, operation: dict[str, Any]) -> tuple[str, str, str]:
    text = operation["description"].split("\n\n")[0].replace("\n", " ")
    statuses = sorted(status for status in operation["responses"] if status != "422" or "sync" in path)
    query = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    return f"`{method} {path}`" + f" `?{'&'.join(query)}`" * bool(query), text, ", ".join(statuses)


def _type_of(field: dict[str, Any]) -> str:
    """Returns the type of a field in words."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "object"
    if "anyOf" in field:
        kinds = dict.fromkeys(_type_of(option) for option in field["anyOf"])
        if "number" in kinds:
            kinds.pop("whole number", None)
        return " or ".join(kind for kind in kinds if kind != "null")
    kind = _TYPES[field["type"]]
    return f"{kind} of {_plural(_type_of(field['items']))}" if kind == "list" else kind


def _plural(kind: str) -> str:
    first, of, rest = kind.partition(" of ")
    return f"{first}s{of}{rest}" if first in _TYPES.values() else kind


def _meaning_of(field: dict[str, Any]) -> str:
    return str(field.get("description", "")).replace("|", "\\|")


if __name__ == "__main__":
    for name, table in TABLES.items():
        doc_tables.write_table(PAGE, name, table())
