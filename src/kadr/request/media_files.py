"""The files of a request's images and clips."""

from __future__ import annotations

from kadr.errors import MediaError
from kadr.regular_file import NotRegularFileError, require_regular
from kadr.request.request import Request


def refuse_missing_media(request: Request) -> None:
    """Refuses images and clips that do not exist or are not regular files, before anything is loaded or fetched.

    Raises:
        MediaError: names them.
    """
    for path in request.media_paths():
        try:
            require_regular(path)
        except NotRegularFileError as error:
            raise MediaError(f"{path} cannot be read: {error}.") from error
        except OSError:
            continue  # named below, with all the others
    absent = list(dict.fromkeys(str(path) for path in request.media_paths() if not path.is_file()))
    if absent:
        raise MediaError(f"there is no file {', '.join(absent)}. Check the path of the image or clip.")
