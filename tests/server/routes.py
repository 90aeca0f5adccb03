"""All routes of the application, as it has them."""

from __future__ import annotations

from fastapi.routing import APIRoute

from kadr.server.app import ROUTERS

OPEN_ROUTES = {("GET", "/health/alive")}
ADMIN_ROUTES = {("POST", "/v1/queue/pause"), ("POST", "/v1/queue/resume"), ("GET", "/metrics")}
ADMIN_ROUTES |= {("GET", "/v1/selftest"), ("POST", "/v1/selftest")}
UNKNOWN_VIDEO = "video_" + 32 * "0"
UNKNOWN_UPLOAD = "upload_" + 32 * "0"
_UNKNOWN = {"{video_id}": UNKNOWN_VIDEO, "{upload_id}": UNKNOWN_UPLOAD, "{name:path}": "nothing"}
_UNKNOWN["{reference:path}"] = UNKNOWN_VIDEO


def all_routes() -> list[tuple[str, str]]:
    """Returns method and path of every route but those of the page, which are not of the API."""
    routes = [route for router in ROUTERS for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in routes)
    found = [(method, route.path) for route in routes if route.include_in_schema for method in sorted(route.methods)]
    return [*found, ("GET", "/openapi.json")]


def fill(path: str, video_id: str = UNKNOWN_VIDEO) -> str:
    """Returns the address of a route, with ids of things that are not there, or with this video's."""
    for name, value in {**_UNKNOWN, "{video_id}": video_id}.items():
        path = path.replace(name, value)
    assert "{" not in path
    return path


ROUTES = all_routes()
VIDEO_ROUTES = [route for route in ROUTES if "{video_id}" in route[1]]
CHANGING_ROUTES = [route for route in ROUTES if route[0] not in ("GET", "HEAD")]
