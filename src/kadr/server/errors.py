"""Errors of the API: one envelope for all, as the OpenAI clients read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kadr.errors import Cancelled, CheckpointError, KadrError, MediaError, PlanError, RequestError
from kadr.jobs.job import JobConflictError, QueueFullError, StorageError, UnknownJobError
from kadr.quoting import one_line, show

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    414: "invalid_request_error",
    416: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}
_PLACES_AND_TYPES = {"body", "query", "path", "header", "str", "int", "float", "bool"}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_CLIENT_GONE = 499  # nobody reads it; the metrics tell it from the server's own errors


class ApiError(Exception):
    """An error with its HTTP status.

    Args:
        message: a line for people: the value, the limit, the way out.
        code: a word for programs.
        param: name of the field or parameter it is about.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, one_line(message), code, param
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """Returns the answer with the envelope."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers=self.headers)


def api_error(error: KadrError, hide_paths: Callable[[str], str]) -> ApiError:
    """Returns the error of the API for one of kadr. hide_paths: see `PathHider`."""
    message = hide_paths(str(error))
    if isinstance(error, UnknownJobError):
        return ApiError(404, str(error), code="video_not_found")
    if isinstance(error, QueueFullError):
        wait = str(max(1, round(error.retry_after)))
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": wait})
    if isinstance(error, JobConflictError):
        return ApiError(409, str(error), code="conflict")
    if isinstance(error, StorageError):
        return ApiError(507, "the server cannot store anything: its disk is full or read-only. Tell its operator.",
                        code="storage_unavailable")  # fmt: skip
    if isinstance(error, MediaError):
        return ApiError(400, message, code="invalid_media")
    if isinstance(error, PlanError):
        return ApiError(400, message, code="does_not_fit")
    if isinstance(error, CheckpointError):
        return ApiError(503, "the model cannot be opened on this server. Tell its operator.", code="model_unavailable")
    return ApiError(400, message, code="invalid_request" if isinstance(error, RequestError) else "failed")


def validation_error(error: ValidationError | RequestValidationError) -> ApiError:
    """Returns the error for a body or parameter of the wrong shape: the first complaint, with its field."""
    first = error.errors()[0]
    *parents, last = first["loc"] or ("",)
    is_unknown = first["type"] == "extra_forbidden"  # its name may be anything
    path = [part for part in parents if _is_of_field(part)] + [last] * (is_unknown or _is_of_field(last))
    param = show(".".join(map(str, path))) or None  # names of fields are the client's own words
    if is_unknown:
        return ApiError(400, f"{param} is not a parameter of this request.", code="unknown_parameter", param=param)
    return ApiError(400, f"{param or 'the body'}: {first['msg']}.", code="invalid_value", param=param)


def _is_of_field(part: str | int) -> bool:
    """Tells a field's name or an index from the other parts of a location: a place, or a type of a union."""
    return part not in _PLACES_AND_TYPES and (isinstance(part, int) or part.replace("_", "").islower())


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an app answer with the envelope."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(KadrError)
    async def _kadr(request: Request, error: KadrError) -> JSONResponse:
        if isinstance(error, StorageError | CheckpointError):
            request.app.state.log(str(error))
        return api_error(error, request.app.state.server.hide_paths).response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail) if error.status_code != 404 else "there is nothing at this address."
        code = _CODES.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    @app.exception_handler(Cancelled)
    async def _cancelled(request: Request, error: Cancelled) -> JSONResponse:
        return ApiError(503, "the server stops. Try again later.", code="stopping").response()

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return ApiError(_CLIENT_GONE, "the client hung up before its request was complete.", code="gone").response()

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSONResponse:
        message = "the server made a mistake; it is in its log. Please report it."
        return ApiError(500, message, code="internal").response()


def envelope_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the answers with errors that a route documents."""
    from kadr.server.schema import ErrorEnvelope

    return {status: {"model": ErrorEnvelope} for status in statuses}
