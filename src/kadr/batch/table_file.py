"""Reads the file of a batch: .txt has a prompt per line, .csv a header with names of fields, .jsonl objects.

A row that cannot be read is a row with a problem: those beside it are read all the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kadr.batch.field_names import STRUCTURE_OR_TEXT_FIELDS, TEXT_FIELDS, refuse_unknown_fields
from kadr.errors import RequestError
from kadr.jobs.job import is_utf8
from kadr.json_reader import parse_json
from kadr.quoting import quote, show
from kadr.regular_file import open_regular
from kadr.text.prompt_lines import iterate_lines, iterate_prompt_lines
from kadr.validation import check_path

MAX_FILE_BYTES = 64 << 20
MAX_ROW_BYTES = 1_000_000
MAX_ROWS = 100_000
_DELIMITERS = ",;\t"  # programs write one of these; no name of a field has any
_BOOLEANS = {"true": True, "false": False}  # spreadsheets write capitals


@dataclass(frozen=True)
class TableRow:
    """A row as the file has it.

    Args:
        number: of the row, from 1.
        line: of the file on which it begins, from 1.
        fields: name -> value; what is left empty is not there.
        problem: the reason why it cannot be read; "" where it can.
    """

    number: int
    line: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


# Line, fields and problem of each row.
_Rows = Iterator[tuple[int, Mapping[str, Any], str]]


def read_table(path: Path) -> list[TableRow]:
    """Reads the rows of a file.

    Raises:
        RequestError: it cannot be read, is no regular file, too large, or of another type; it has no rows or too many;
            or the header of a .csv names a wrong field.
    """
    read_rows = _READERS.get(path.suffix.lower())
    if read_rows is None:
        raise RequestError(
            f"{path} ends in {quote(path.suffix)}; a batch is a .jsonl with an object per line, a .csv with a header, "
            "or a .txt with a prompt per line."
        )
    data = _read_bytes(path)
    rows: list[TableRow] = []
    for line, fields, problem in read_rows(data, path):
        if len(rows) == MAX_ROWS:
            raise RequestError(f"{path} has more than {MAX_ROWS:,} rows. Split it into several files.")
        rows.append(TableRow(len(rows) + 1, line, {} if problem else fields, problem))
    if not rows:
        raise RequestError(f"{path} has no rows: it is empty, or has a header or comments alone. Write a row a video.")
    return rows


def _read_bytes(path: Path) -> bytes:
    check_path("the file of the batch", path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"{path} has more than {MAX_FILE_BYTES >> 20} MB. Split it into several files.")
    return data


def _read_prompts(data: bytes, path: Path) -> _Rows:
    for line in iterate_prompt_lines(data):
        size = len(line.prompt.encode())
        problem = f"the line {line.problem}" if line.problem else _find_excess(size)
        yield line.number, {"prompt": line.prompt}, problem


def _read_objects(data: bytes, path: Path) -> _Rows:
    for number, line in iterate_lines(data):
        if line.strip():
            fields, problem = _parse_object(line)
            yield number, fields, problem


def _parse_object(line: bytes) -> tuple[Mapping[str, Any], str]:
    """Returns the fields of a line of .jsonl, or {} and the problem with it."""
    if problem := _find_excess(len(line)):
        return {}, problem
    try:
        fields = parse_json(line.decode("utf-8"), is_strict=True)
    except UnicodeDecodeError:
        return {}, "the line is not UTF-8"
    except ValueError as error:
        return {}, f"the line is not JSON: {error}"
    if not isinstance(fields, dict):
        return {}, f'the line is {quote(fields)}; it must be an object of fields, such as {{"prompt": "a fox"}}'
    return {name: value for name, value in fields.items() if value is not None}, ""


def _read_cells(data: bytes, path: Path) -> _Rows:
    # Bytes that are no UTF-8 become halves of characters: the rows that have them are found below.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    first_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = next((mark for mark in _DELIMITERS if mark in first_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for line, cells, problem in _iterate_cells(reader):
        if not problem and not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _check_header(cells, problem, line, path)
        else:
            fields, problem = _parse_cells(header, cells) if not problem else ({}, problem)
            yield line, fields, problem


def _iterate_cells(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """Yields the line on which each row begins, its cells, and the problem that the reader has with it."""
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"the row is not CSV: {error}. Put a cell with quotes in quotes, and double those in it"


def _check_header(cells: Sequence[str], problem: str, line: int, path: Path) -> list[str]:
    """Returns the names of the columns; "" for one without a name.

    Raises:
        RequestError: a name is unknown, or there twice.
    """
    names = [cell.strip() for cell in cells]
    named = [name for name in names if name]
    try:
        if problem:
            raise RequestError(f"{problem}.")
        if not is_utf8("".join(names)):
            raise RequestError("it is not UTF-8. Save the file as CSV in UTF-8.")
        refuse_unknown_fields(named)
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise RequestError(f"the header has {show(', '.join(twice))} twice. Leave one out.")
    except RequestError as error:
        raise RequestError(f"line {line} of {path}, the header: {error}") from error
    return names


def _parse_cells(header: Sequence[str], cells: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """Returns the fields of a row of .csv, or {} and the problem with it."""
    if len(cells) > len(header):
        return {}, f"the row has {len(cells)} cells, and the header {len(header)}. Put a cell with commas in quotes"
    row = list(zip(header, cells, strict=False))
    text = "".join(cells)
    if not is_utf8(text):
        return {}, "the row is not UTF-8"
    if problem := _find_excess(len(text.encode())):
        return {}, problem
    if unnamed := [cell for name, cell in row if cell.strip() and not name]:
        return {}, f"{quote(unnamed[0])} is in a column without a name"
    try:
        return {name: _parse_cell(name, cell.strip()) for name, cell in row if cell.strip()}, ""
    except ValueError as error:
        return {}, str(error)


def _parse_cell(name: str, text: str) -> Any:
    """Returns the value of a cell: JSON, but for fields that are text; true and false may have capitals.

    Raises:
        ValueError: it begins like JSON, and is none.
    """
    is_structure = text.startswith(("[", "{"))
    if name in TEXT_FIELDS or (name in STRUCTURE_OR_TEXT_FIELDS and not is_structure):
        return text
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    try:
        return parse_json(text, is_strict=True)
    except ValueError as error:
        if is_structure:
            raise ValueError(f"{name} is {quote(text)}, which is not JSON: {error}") from error
        return text


def _find_excess(size: int) -> str:
    """Returns the problem with a row of so many bytes; "" where there is none."""
    return f"the row has {size:,} bytes; it may have {MAX_ROW_BYTES:,}" if size > MAX_ROW_BYTES else ""


_READERS: Mapping[str, Callable[[bytes, Path], _Rows]] = {
    ".txt": _read_prompts,
    ".csv": _read_cells,
    ".jsonl": _read_objects,
}
