"""Files in ComfyUI's folders of models, as `folder_paths` knows them."""

from __future__ import annotations

import os
from typing import NamedTuple

# ComfyUI lists no .gguf in its own folders, so the nodes have lists of their own over the same folders.
SUFFIXES = {".safetensors", ".sft", ".gguf"}
FOLDERS = {
    "kadr_models": ("checkpoints", "diffusion_models"),
    "kadr_text_encoders": ("text_encoders",),
    "kadr_vaes": ("vae", "checkpoints"),
    "kadr_upscalers": ("latent_upscale_models",),
    "kadr_loras": ("loras",),
}


class StampedFile(NamedTuple):
    """A file, or the name of a release, as it was when a node named it.

    Args:
        path: of a file; or a release's name.
        size, changed_at: bytes, and nanoseconds since the epoch; 0 of a release.
    """

    path: str
    size: int = 0
    changed_at: int = 0


def list_files(kind: str) -> list[str]:
    """Returns the names of the files of a kind, a key of `FOLDERS`."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    folders = [path for name in FOLDERS[kind] for path in (known[name][0] if name in known else _default(name))]
    known[kind] = (folders, SUFFIXES)  # anew each time: another pack may have added a folder
    return list(folder_paths.get_filename_list(kind))


def _default(name: str) -> list[str]:
    """Returns the folder of a kind that this ComfyUI does not list itself."""
    import folder_paths

    return [os.path.join(folder_paths.models_dir, name)]


def find_file(kind: str, name: str) -> StampedFile:
    """Returns the file of that name, or the name itself where no folder has it: a release's.

    ComfyUI's look-up never leaves its folders.
    """
    import folder_paths

    if name not in list_files(kind):
        return StampedFile(name)
    path = folder_paths.get_full_path_or_raise(kind, name)
    status = os.stat(path)
    return StampedFile(path, status.st_size, status.st_mtime_ns)
