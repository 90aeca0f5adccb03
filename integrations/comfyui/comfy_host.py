"""ComfyUI's side of a generation: its memory, its stop button, its progress bar, previews, and what it is told."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BAR_STEPS = 1000
POLL_SECONDS = 0.2  # between looks at ComfyUI's stop button


def free_models() -> None:
    """Takes ComfyUI's own models off the device, so that kadr plans with all of its memory."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def wants_previews() -> bool:
    """Returns whether previews are on in ComfyUI: --preview-method, or its setting."""
    from comfy.cli_args import LatentPreviewMethod, args

    return bool(args.preview_method != LatentPreviewMethod.NoPreviews)


@contextmanager
def interruptible() -> Iterator[Any]:
    """Yields a `kadr.CancelToken` that ComfyUI's stop button cancels, also in the middle of a step.

    Raises:
        comfy.model_management.InterruptProcessingException: the button was pressed.
    """
    import comfy.model_management

    from kadr import Cancelled, CancelToken

    token, is_over = CancelToken(), threading.Event()

    def poll() -> None:
        while not is_over.wait(POLL_SECONDS):
            if comfy.model_management.processing_interrupted():
                token.cancel("interrupted in ComfyUI")
                return

    thread = threading.Thread(target=poll, name="kadr: ComfyUI's stop button", daemon=True)
    thread.start()
    try:
        yield token
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise
    finally:
        is_over.set()
        thread.join()


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yields the messages of kadr's warnings in the block; ComfyUI's page would not show them. Others stay as they are.

    Warnings belong to the process, and ComfyUI runs one workflow at a time.
    """
    from kadr import KadrWarning

    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", KadrWarning)
        show = warnings.showwarning

        def collect(message: Any, category: type[Warning], *args: Any, **options: Any) -> None:
            if issubclass(category, KadrWarning):
                messages.append(str(message))
            else:
                show(message, category, *args, **options)

        warnings.showwarning = collect
        yield messages


class NodeProgress:
    """A watcher that moves ComfyUI's bar through all stages by their planned time, and shows previews.

    Args:
        has_previews: see `wants_previews`.
    """

    def __init__(self, *, has_previews: bool) -> None:
        import comfy.utils

        self._bar = comfy.utils.ProgressBar(BAR_STEPS)
        self._has_previews = has_previews
        self._spans: dict[str, tuple[float, float]] = {}
        self._value = 0

    def use_plan(self, plan: Any) -> None:
        """Gives each stage of a `kadr.Plan` the part of the bar that it is expected to take."""
        total, start = sum(map(plan.stage_seconds, plan.stages)) or 1.0, 0.0
        for stage in plan.stages:
            seconds = plan.stage_seconds(stage)
            self._spans[stage.stage] = (start / total, (start + seconds) / total)
            start += seconds

    def __call__(self, progress: Any) -> None:
        """Shows a `kadr.Progress`."""
        start, end = self._spans.get(progress.stage, (0.0, 0.0))  # a stage that is not planned moves nothing
        share = start + (end - start) * progress.step / max(1, progress.of)
        self._value = max(self._value, int(BAR_STEPS * share))
        self._bar.update_absolute(self._value, BAR_STEPS, self._preview(progress))

    def _preview(self, progress: Any) -> tuple[str, Any, int] | None:
        """Returns the middle frame of the video as this step predicts it, as ComfyUI takes images."""
        from comfy.cli_args import args

        frames = progress.preview if self._has_previews else None
        if frames is None:
            return None
        from PIL import Image

        return "JPEG", Image.fromarray(frames[len(frames) // 2]), args.preview_size
