"""`kadr models info` of a model in a folder of models: its file, and the recipe that it runs with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.single_file import CheckpointInfo
from kadr.cli.terminal.recipe import recipe_lines, recipe_to_json, word_lines, words_to_json
from kadr.cli.terminal.table import format_si
from kadr.errors import CheckpointError
from kadr.models.registry import Recipe, Release
from kadr.spec.folder_listing import ListedModel, describe_entry
from kadr.spec.model_folders import LORA_KINDS, TEXT_ENCODER_KINDS, FolderEntry


@dataclass(frozen=True)
class FolderModel:
    """A model in a folder, as its header describes it.

    Args:
        info: None for a LoRA and a text encoder.
    """

    listed: ListedModel
    info: CheckpointInfo | None

    @classmethod
    def open(cls, entry: FolderEntry) -> FolderModel:
        """Reads the header.

        Raises:
            CheckpointError: kadr does not open it.
        """
        listed = describe_entry(entry)
        if listed.entry.problem is not None:
            raise CheckpointError(listed.entry.problem)
        has_info = entry.kind not in (*LORA_KINDS, *TEXT_ENCODER_KINDS)
        return cls(listed, Checkpoint.open(entry.path).info if has_info else None)

    @property
    def _release(self) -> Release | None:
        return None if self.info is None else self.info.release

    @property
    def _recipe(self) -> Recipe | None:
        """The recipe that it runs with; None if that depends on its release, or it is not a model that runs."""
        if self.info is None or self.info.transformer is None or self.info.release_candidates:
            return None
        return Recipe() if self._release is None else self._release.recipe

    def to_json(self) -> dict[str, Any]:
        """Returns the object of --json: the keys of a release's, and the file's dtype and release."""
        entry, release, recipe = self.listed.entry, self._release, self._recipe
        path = str(entry.path)
        file = {"name": entry.name, "kind": entry.kind, "file": path, "bytes": self.listed.size_bytes, "on_disk": path}
        return {
            "name": entry.name,
            "kind": entry.kind,
            "version": None if self.info is None else self.info.version,
            "description": None if release is None else release.description,
            "licence": None if release is None else release.licence,
            "repo": None if release is None else release.repo,
            "files": [file],
            "recipe": None if recipe is None else recipe_to_json(recipe),
            "words": None if release is None else words_to_json(release),
            "dtype": self.listed.dtype,
            "release": None if release is None else release.name,
        }

    def lines(self) -> Iterator[str]:
        """Yields the description as text."""
        entry, release, recipe = self.listed.entry, self._release, self._recipe
        yield f"{entry.name}: {format_si(self.listed.size_bytes)} bytes in {self.listed.dtype}, in {entry.kind}"
        yield f"file: {entry.path}"
        if self.info is None:
            return
        if self.info.release_candidates:
            names = ", ".join(candidate.name for candidate in self.info.release_candidates)
            yield f"release: one of {names}; pass the one it is with --release"
        elif release is None:
            yield "release: none that kadr knows" + ("" if recipe is None else ", so it runs with the default recipe")
        else:
            yield f"release: {release.name}, {release.description}"
            yield f"licence: {release.licence}"
        if recipe is not None:
            yield ""
            yield from recipe_lines(recipe)
        if recipe is not None and release is not None:
            yield ""
            yield from word_lines(release)
