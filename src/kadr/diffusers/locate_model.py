"""Names that diffusers' scripts open models by, as kadr's registry and paths have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kadr.errors import RequestError
from kadr.models.registry import LTX_VIDEO_REPO, RELEASES, RELEASES_BY_NAME
from kadr.quoting import quote

# Repositories in diffusers' layout -> the release with the same weights.
REPOSITORIES: Mapping[str, str] = {
    LTX_VIDEO_REPO: "ltxv-2b-0.9",
    "Lightricks/LTX-Video-0.9.1": "ltxv-2b-0.9.1",
    "a-r-r-o-w/LTX-Video-0.9.1-diffusers": "ltxv-2b-0.9.1",
    "Lightricks/LTX-Video-0.9.5": "ltxv-2b-0.9.5",
    "Lightricks/LTX-Video-0.9.7-dev": "ltxv-13b-0.9.7-dev",
    "Lightricks/LTX-Video-0.9.7-distilled": "ltxv-13b-0.9.7-distilled",
    "Lightricks/LTX-Video-0.9.8-13B-distilled": "ltxv-13b-0.9.8-distilled",
    "a-r-r-o-w/LTX-Video-0.9.7-diffusers": "ltxv-13b-0.9.7-dev",
    "Lightricks/ltxv-spatial-upscaler-0.9.7": "ltxv-spatial-upscaler-0.9.7",
    "Lightricks/ltxv-spatial-upscaler-0.9.8": "ltxv-spatial-upscaler-0.9.8",
}
_HUB_FILE = re.compile(
    r"^(?:https?://huggingface\.co/|hf\.co/)?([\w.-]+/[\w.-]+)/(?:blob|resolve)/[\w.-]+/(.+?)(?:\?.*)?$"
)
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
TORCH_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", "bfloat16": "bfloat16", "float32": "float32"}


def model_name(name_or_path: Any) -> str:
    """Returns a folder or file, a registry name, or the registry name of a repository of the hub.

    Raises:
        RequestError: a repository whose weights the registry does not have.
    """
    name = str(name_or_path)
    if Path(name).exists() or name in RELEASES_BY_NAME:
        return name
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    if _REPOSITORY.fullmatch(name):
        raise RequestError(
            f"kadr's registry has no release for the repository {quote(name)}. Download it and pass its folder, or "
            f"pass one of {', '.join(REPOSITORIES)}, or a name that `kadr models` lists."
        )
    return name


def file_name(link_or_path: Any) -> str:
    """Returns a path, or the registry name of a link to a file of the hub.

    Raises:
        RequestError: a link to a file that the registry does not have.
    """
    match = _HUB_FILE.match(str(link_or_path))
    if match is None or Path(str(link_or_path)).exists():
        return str(link_or_path)
    return release_of_file(*match.groups())


def release_of_file(repo: str, file: str | None) -> str:
    """Returns the name of the release of a file in a repository; of its only one, where no file is named.

    Raises:
        RequestError: the registry has none, or several.
    """
    names = [item.name for item in RELEASES if item.repo == repo and file in (None, item.file)]
    if len(names) != 1:
        what = f"{repo}/{file}" if file else repo
        known = f"several files of {what}: {', '.join(names)}" if names else f"no release for {what}"
        raise RequestError(f"kadr's registry has {known}. Download the file and pass its path.")
    return names[0]


def dtype_name(torch_dtype: Any) -> str:
    """Returns kadr's name of a dtype; float32 for None, as in diffusers.

    Raises:
        RequestError: it is neither bfloat16 nor float32.
    """
    if torch_dtype is None:
        return "float32"
    if torch_dtype == "auto":
        return "auto"
    if torch_dtype not in TORCH_DTYPES:
        raise RequestError(f"torch_dtype is {quote(torch_dtype)}; kadr computes in torch.bfloat16 or torch.float32.")
    return TORCH_DTYPES[torch_dtype]


def device_name(device: Any) -> str:
    """Returns kadr's name of a device.

    Raises:
        RequestError: it is not "cpu", "mps", "cuda" or the first CUDA device.
    """
    text = str(device)
    if text in ("cuda", "cuda:0"):
        return "cuda"
    if text not in ("cpu", "mps", "auto"):
        raise RequestError(
            f"the device is {quote(text)}; it must be cuda, cuda:0, cpu or mps. To use another GPU, set "
            "CUDA_VISIBLE_DEVICES."
        )
    return text
