"""`Engine`: an open model, and everything that makes a video or a part of one with it. Threads may share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kadr.cancellation import CancelToken
from kadr.media.encoders.formats import DEFAULT_ENCODING, Encoding
from kadr.models.registry import Recipe
from kadr.pipeline.calibrate import calibrate_machine
from kadr.pipeline.dry_run import DryRun, run_dry
from kadr.pipeline.metadata import restore_kernels, video_metadata, with_outcome, without_folders
from kadr.pipeline.modules import TrainedTransformer
from kadr.pipeline.plan_request import plan_request
from kadr.pipeline.progress import OnLoad, Watch, ignore_loads, ignore_progress
from kadr.pipeline.stage_access import StageAccess
from kadr.pipeline.video import Video, VideoFile
from kadr.pipeline.writing import write_video
from kadr.planning.plan import Plan
from kadr.request.passes import check_first_sigma
from kadr.request.request import Request, check_request, refuse_overwriting
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import SpecOptions
from kadr.spec.open import open_spec
from kadr.validation import check_path


class Engine(StageAccess):
    """An open model, known from its headers. A stage reads weights when it needs them.

    One video is made at a time: `generate` waits for the one before. What reads headers alone (`resolve`, `plan`,
    `dry_run`) never waits.

    Args:
        spec: the model.
        prompt_cache: see `open`.
    """

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        release: str | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        upscaler: str | Path | Sequence[str | Path] = (),
        second_model: str | Path | None = None,
        recipe: Recipe | None = None,
        models_dirs: Sequence[str | Path] = (),
        loras: Sequence[Any] = (),
        lora_partial: bool = False,
        merge_loras: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        quant: str | None = None,
        offload: str = "auto",
        compile_transformer: bool = False,
        prompt_cache: bool | Path = True,
    ) -> Engine:
        """Opens a model. Reads headers, never weights, and fetches nothing: see `prepare`.

        Args:
            model: a registry name, an official .safetensors file, a .gguf file or a diffusers folder.
            release: the release whose recipe a file or folder has, where neither its header nor its name tells it.
            text_encoder: a folder with a T5 encoder and its tokenizer, a .safetensors, a .gguf or a registry name; by
                default the one in the model's file, remembered by it or beside it, else the one of the registry.
            vae: a checkpoint whose VAE replaces the model's own, or the one that a GGUF file remembers.
            upscaler: latent upscalers between two passes, at most one spatial and one temporal; by default the one
                released for the model.
            second_model: a model whose transformer and recipe the second pass uses.
            recipe: defaults for what requests leave out, instead of the model's own.
            models_dirs: folders arranged as ComfyUI's `models`, or its extra_model_paths.yaml, where names are looked
                up that are neither paths nor releases; then those of $KADR_MODELS and of kadr's config file.
            loras: `Lora`s, paths, or tuples (path, strength) or (path, strength, strength in the second pass), over
                weights in any format; a request may set their strengths.
            lora_partial: ignore a LoRA's weights for layers that the transformer lacks, with a warning.
            merge_loras: add the LoRAs to the weights at load time: slightly faster, rounded, with fixed strengths.
            device, dtype: "auto", or "cpu", "cuda" or "mps"; "auto", or "bfloat16" or "float32".
            quant: weight format of the transformer in memory, a key of `kadr.quant.weight_formats.WEIGHT_FORMATS`; None
                keeps the file's own.
            offload: "auto" (the fastest that fits), "none", "stages" (unload each module after its stage) or "blocks"
                (stream transformer blocks).
            compile_transformer: fuse the transformer's layers with torch.compile, on CUDA: the first video waits.
            prompt_cache: cache prompt embeddings on disk, 512 MB at most: True, or the path of a folder. A cached
                prompt does not need the text encoder.

        Raises:
            RequestError: unknown name, device, dtype, weight format or offload mode.
            CheckpointError: a file is missing, damaged, incomplete or not of the LTX-Video family.
        """
        options = SpecOptions(
            model=model,
            release=release,
            text_encoder=text_encoder,
            vae=vae,
            upscaler=upscaler,
            second_model=second_model,
            recipe=recipe,
            models_dirs=models_dirs,
            loras=loras,
            lora_partial=lora_partial,
            merge_loras=merge_loras,
            device=device,
            dtype=dtype,
            quant=quant,
            offload=offload,
            compile_transformer=compile_transformer,
        )
        return cls(open_spec(options), prompt_cache=prompt_cache)

    def plan(self, request: Request | ResolvedRequest, *, reclaimable_bytes: int = 0) -> Plan:
        """Returns the plan of a generation: placement, peak bytes and seconds of each stage, with reasons.

        The plan is arithmetic on headers: nothing is loaded, fetched or changed. The model need not be on disk.

        Args:
            reclaimable_bytes: memory of the device that is taken now and will be free: another process's, which makes
                the video.

        Raises:
            RequestError: the request does not fit this model.
            PlanError: the generation does not fit in memory; carries the shortfall in bytes and suggests what fits.
        """
        resolved = self.resolve(request)
        check_first_sigma(resolved.passes[0], has_init_latents=resolved.input_video is not None)
        self._warn_unused_controls(resolved)
        encoder = self._model.prompt_encoder(resolved.all_prompts)
        cache = self._model.module_cache
        return plan_request(
            self.spec,
            resolved,
            encoder,
            cached=cache.private_bytes,
            loaded=cache.cached_names,
            reclaimable=reclaimable_bytes,
        )

    def dry_run(self, request: Request | ResolvedRequest) -> DryRun:
        """Returns what a generation of the request would do. The model need not be on disk.

        Raises:
            As `resolve`.
        """
        return run_dry(self.spec, self.resolve(request))

    def prepare(self, request: Request | ResolvedRequest, *, calibrate: bool = False, wait: bool = True) -> None:
        """Fetches what a generation of the request opens and is not on disk; `generate` does it too.

        Args:
            calibrate: then measure how fast this machine is, for about a minute, and store that for later plans.
                `generate` never does: no first video waits for it.

        Raises:
            CheckpointError: a file cannot be fetched, or is not what the registry says.
            Busy: a video is being made, and `wait` is false.
        """
        with self._model.exclusive(wait=wait):
            self._model.prepare(request, with_media=True)
            if calibrate:
                calibrate_machine(self.spec)

    def generate(
        self,
        request: Request | ResolvedRequest,
        *,
        watch: Watch = ignore_progress,
        preview: bool = False,
        cancel: CancelToken | None = None,
        wait: bool = True,
    ) -> Video:
        """Generates one video.

        Args:
            request: any `size` in pixels (sampled at the next multiple of 32 and cropped back) and any number of
                `frames` (sampled as 8k+1 and trimmed back) at `fps`.
            watch: called with a `Progress` after every step. Raise `Cancelled` from it to cancel.
            preview: give each step's `Progress` a `preview`. The first time with a VAE, the map for them is fitted on
                the CPU and stored beside the prompt cache: a second for the demo; minutes and 3.4 GB for 2B models.
            cancel: cancels the work, from any thread or signal handler; see `CancelToken`. None takes the current one.
            wait: wait until the engine has made the video before this one.

        Returns:
            Video whose `frames` are uint8 (F, H, W, 3): RGB, full range, on the CPU.

        Raises:
            RequestError: the request does not fit this model. Raised before any weight is loaded.
            MediaError: an image or clip cannot be read.
            CheckpointError: the weights are damaged or incomplete, or cannot be fetched.
            NonFiniteError: a stage produced NaN or infinity; it carries the stage.
            Busy: another video is being made, and `wait` is false.
            Cancelled: `cancel` was cancelled, or `watch` raised it.
        """
        with self.start(request, watch=watch, preview=preview, cancel=cancel, wait=wait) as generation:
            resolved, latents = generation.resolved, generation.denoise()
            frames = np.empty((resolved.frames, resolved.size.height, resolved.size.width, 3), dtype=np.uint8)
            done = 0
            for chunk in generation.decode(latents):
                frames[done : done + len(chunk)] = chunk.numpy()
                done += len(chunk)
            notices, metadata = generation.notices, with_outcome(video_metadata(self.spec, resolved), generation)
        return Video(frames, latents[0].cpu(), resolved.fps, resolved.request, metadata, notices)

    def write(
        self,
        request: Request | ResolvedRequest,
        path: str | Path,
        *,
        watch: Watch = ignore_progress,
        on_plan: Callable[[Plan], object] | None = None,
        on_load: OnLoad = ignore_loads,
        resume: bool = False,
        transformer: TrainedTransformer | None = None,
        kernels: Mapping[str, str] | None = None,
        stores_paths: bool = True,
        preview: bool = False,
        cancel: CancelToken | None = None,
        wait: bool = True,
        encoding: Encoding = DEFAULT_ENCODING,
    ) -> VideoFile:
        """Generates one video into a file, and writes frames as they are decoded.

        Memory does not grow with the length, except for the latents: half a megabyte per second of video at 704x480.
        The file is written beside `path` and renamed when complete. Until then, finished windows of a long video are
        stored in a folder beside it: `clip.windows` for `clip.mp4`.

        Args:
            watch, preview, cancel, wait: as in `generate`. Cancelled, it leaves nothing but finished windows of a long
                video.
            on_plan: called with the plan before anything is loaded.
            on_load: called with True before each module is loaded, and with False when that is over; one that is in
                memory is not loaded.
            resume: continue from the windows that an interrupted generation of the same request has stored.
            transformer: used instead of the model's own.
            stores_paths: store where the model and the media lie, for `kadr rerun`; False stores only their names.
            encoding: codec and quality, sound and metadata. The ending of `path` decides on the format: .mp4, .webm,
                .mkv, .gif, .webp, and .png or .jpg for one frame or, as frame-%04d.png, for numbered frames.
            kernels: "kernels" of another video's metadata: they are used again, for the same frames.

        Raises:
            As `generate`, and MediaError: the file cannot be written; raised before anything is computed where that
            can be known.
        """
        check_path("the path of the video", path)
        original = request.request if isinstance(request, ResolvedRequest) else check_request(request)
        refuse_overwriting(original, Path(path))
        started = self.start(
            request, watch=watch, transformer=transformer, preview=preview, on_load=on_load, cancel=cancel, wait=wait
        )
        with started as generation:
            if on_plan is not None:
                on_plan(generation.plan)
            restore_kernels(generation, kernels)
            metadata = video_metadata(self.spec, generation.resolved, transformer)
            metadata = metadata if stores_paths else without_folders(metadata)
            return write_video(generation, Path(path), metadata, encoding, resume=resume)
