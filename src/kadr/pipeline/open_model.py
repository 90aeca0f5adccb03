"""An open model: its spec, its loaded modules, and the lock under which one generation at a time uses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kadr.cancellation import check_cancelled
from kadr.errors import Busy, CheckpointError
from kadr.memory.module_cache import ModuleCache
from kadr.pipeline.loading.module_loader import ModuleLoader
from kadr.pipeline.notices import Notices
from kadr.pipeline.progress import Watch
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.stages.control_networks import fetch_networks
from kadr.pipeline.stages.overrides import NO_OVERRIDES, Overrides
from kadr.pipeline.stages.preview import PreviewMap, open_preview_map
from kadr.pipeline.stages.text import PromptEncoder
from kadr.request.request import Request
from kadr.request.resolve import resolve
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec
from kadr.spec.open import fetch_spec

CHECK_SECONDS = 0.2  # between looks at the token of one who waits


class OpenModel:
    """A model that threads may share.

    Args:
        prompt_cache: see `Engine.open`.
    """

    def __init__(self, spec: ModelSpec, prompt_cache: bool | Path) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None  # thread that has the lock
        self._prompt_cache_location = prompt_cache
        self.module_cache = ModuleCache(spec.device)
        self._use_spec(spec)

    @property
    def spec(self) -> ModelSpec:
        """The model, known from headers; `fetch` replaces it where it fetches something."""
        return self.loader.spec

    @contextmanager
    def exclusive(self, *, wait: bool) -> Iterator[None]:
        """Has the engine for itself while the block runs.

        Raises:
            Cancelled: the work was cancelled while it waited.
            Busy: another thread has it and `wait` is false, or this thread has it already.
        """
        if self._owner == threading.get_ident():
            raise Busy("this thread is making a video with this engine, as in a watcher. Ask when it is done.")
        while not self._lock.acquire(timeout=CHECK_SECONDS if wait else 0):
            if not wait:
                raise Busy("the engine is making another video. Ask later, or wait for it with wait=True.")
            check_cancelled()
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def prepare(self, request: Request | ResolvedRequest, *, with_media: bool) -> ResolvedRequest:
        """Fetches what a request needs, and returns it resolved for what is then on disk."""
        if isinstance(request, ResolvedRequest):
            resolved = request if with_media else request.without_media()
        else:
            resolved = resolve(request, self.spec, with_media=with_media)
        fetch_networks(resolved.controls)
        if not self.fetch(has_two_passes=len(resolved.passes) > 1):
            return resolved
        fetched = resolve(resolved.request, self.spec, with_media=with_media)
        if isinstance(request, ResolvedRequest) and fetched != resolved:
            raise CheckpointError(
                f"the files of {self.spec.name} that were fetched are not those that the request was resolved for. "
                "Resolve it again."
            )
        return fetched

    def fetch(self, *, has_two_passes: bool) -> bool:
        """Fetches what a generation opens and is not on disk. Returns whether that changed the spec."""
        spec = fetch_spec(self.spec, has_two_passes=has_two_passes)
        if spec is self.spec:
            return False
        self._use_spec(spec)
        return True

    def _use_spec(self, spec: ModelSpec) -> None:
        self.loader = ModuleLoader(spec)
        self._preview_map: PreviewMap | None = None
        # No weight format in the key: the text encoder's placement does not change what it computes.
        self.prompt_cache = PromptCache.open(
            self._prompt_cache_location, spec.text_encoder_checkpoint, dtype=spec.dtype, device=spec.device.type
        )

    def open_preview_map(self, notices: Notices, watch: Watch) -> PreviewMap | None:
        """Returns the map for previews, fitted to the VAE where no earlier generation has stored it.

        Args:
            notices: takes the reason why there is none.
            watch: called with the progress of a fit.
        """
        if self._preview_map is None:
            try:
                self._preview_map = open_preview_map(self.loader, self._prompt_cache_location, watch)
            except (CheckpointError, MemoryError) as error:
                notices.add(f"there are no previews: {error or 'memory is full'}")
        return self._preview_map

    def prompt_encoder(self, prompts: Sequence[str], overrides: Overrides = NO_OVERRIDES) -> PromptEncoder:
        return PromptEncoder(
            self.spec.tokenizer,
            self.prompt_cache,
            prompts,
            length=overrides.prompt_length,
            attends_padding=overrides.attends_padding,
            embeddings=overrides.prompt_embeddings,
        )
