"""`FormReader`: reads a form while it arrives: fields into memory, files to where they are checked and counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from kadr.quoting import quote, show
from kadr.server.errors import ApiError

MAX_FIELDS, MAX_FILES = 256, 8
MAX_FIELDS_BYTES = 16 << 20  # of all fields: a data: URL may be one
MAX_URLENCODED_BYTES = 1 << 20  # which has no files
MAX_NAME_CHARACTERS = 200
_MAX_PART_HEADER_BYTES = 4096
_MAX_BOUNDARY_BYTES = 200


class FileSink(Protocol):
    """Takes the bytes of a file of a form."""

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        ...


@dataclass
class Form:
    """The parts of a form, in their order. files: those that have a name or a byte."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, FileSink]] = field(default_factory=list)


@dataclass
class _FormPart:
    name: str = ""
    is_file: bool = False
    file_name: bytes = b""
    sink: FileSink | None = None
    content: bytearray = field(default_factory=bytearray)


class FormReader:
    """Reads one multipart form.

    Args:
        content_type: the header, with the boundary.
        open_file: makes where a file goes, once it has a byte.
        count_bytes: called with the bytes that the fields take in memory, as they come.

    Raises:
        ApiError: the header has no boundary.
    """

    def __init__(
        self, content_type: str, open_file: Callable[[], FileSink], count_bytes: Callable[[int], object]
    ) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
            raise _damaged("its Content-Type has no boundary")
        self._open_file, self._count_bytes = open_file, count_bytes
        self._form, self._num_files, self._fields_bytes, self._is_over = Form(), 0, 0, False
        self._part, self._headers, self._name, self._value, self._header_bytes = _FormPart(), {}, b"", b"", 0
        self._writes: list[tuple[_FormPart, bytes]] = []
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    _headers: dict[bytes, bytes]

    async def read(self, chunks: AsyncIterator[bytes]) -> Form:
        """Returns the form, once it is complete. What a client sends behind its end is not read.

        Raises:
            ApiError: it is damaged, ends too early, or has too many parts or bytes; or a file is refused.
        """
        async for chunk in chunks:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise _damaged(f"it is not multipart/form-data: {show(error)}") from error
            writes, self._writes = self._writes, []
            for part, data in writes:
                if part.sink is None:
                    part.sink = self._open_file()
                    self._form.files.append((part.name, part.sink))
                await part.sink.write(data)
            if self._is_over:
                return self._form
        raise _damaged("it ends before its last boundary")

    def _begin_part(self) -> None:
        self._part, self._headers, self._header_bytes = _FormPart(), {}, 0

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._count_header(end - start)

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count_header(end - start)

    def _count_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > _MAX_PART_HEADER_BYTES:
            raise _damaged(f"a part has more than {_MAX_PART_HEADER_BYTES:,} bytes of headers")

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _end_headers(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or b"name" not in options:
            raise _damaged("a part has no name")
        self._part.name = _decode(options[b"name"])
        if len(self._part.name) > MAX_NAME_CHARACTERS:
            raise _damaged(f"the name {quote(self._part.name)} has more than {MAX_NAME_CHARACTERS} characters")
        self._part.is_file = b"filename" in options
        self._part.file_name = options.get(b"filename", b"")
        self._num_files += self._part.is_file
        if self._num_files > MAX_FILES:
            raise _damaged(f"it has more than {MAX_FILES} files")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._writes.append((self._part, data[start:end]))
            return
        self._fields_bytes += end - start
        if self._fields_bytes > MAX_FIELDS_BYTES:
            message = f"the fields of the form have more than {MAX_FIELDS_BYTES:,} bytes: send media as files."
            raise ApiError(413, message, code="too_large", headers={"connection": "close"})
        self._count_bytes(end - start)
        self._part.content += data[start:end]

    def _end_part(self) -> None:
        if self._part.is_file:
            if self._part.file_name:  # without a name and a byte, it is a file that nobody chose
                self._writes.append((self._part, b""))
            return
        if len(self._form.fields) == MAX_FIELDS:
            raise _damaged(f"it has more than {MAX_FIELDS} fields")
        self._form.fields.append((self._part.name, _decode(self._part.content)))

    def _end(self) -> None:
        self._is_over = True


async def read_urlencoded(chunks: AsyncIterator[bytes]) -> list[tuple[str, str]]:
    """Returns the fields of a form without files, such as a=1&b=2.

    Raises:
        ApiError: it is damaged or too large.
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > MAX_URLENCODED_BYTES:
            message = f"the form has more than {MAX_URLENCODED_BYTES:,} bytes: send multipart/form-data."
            raise ApiError(413, message, code="too_large", headers={"connection": "close"})
    try:
        text = body.decode("ascii")
        return parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict",
                         max_num_fields=MAX_FIELDS)  # fmt: skip
    except ValueError as error:
        raise _damaged(f"it is not a=1&b=2: {show(error)}") from error


def _decode(text: bytes | bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _damaged("a field is not text in UTF-8") from error


def _damaged(reason: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {reason}.", code="invalid_body", headers={"connection": "close"})
