"""`Engine`: an open model, and everything that makes a video or a part of one with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.cancellation import CancelToken, cancellable
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import PlanError, RequestError
from kadr.media.writer import VideoWriter
from kadr.memory.device import pick_device, pick_dtype
from kadr.models.registry import Recipe, Release
from kadr.pipeline.components import Components
from kadr.pipeline.generation import Generation
from kadr.pipeline.longvideo.window_folder import EXECUTION_KEY, WindowFolder, check_resumable
from kadr.pipeline.progress import Watch, ignore_progress
from kadr.pipeline.stages.encode import EncodedInputs
from kadr.pipeline.stages.text import PromptEncoder
from kadr.pipeline.video import Video, VideoFile
from kadr.planning.placement import describe_weights
from kadr.planning.plan import Plan
from kadr.planning.planner import Planner
from kadr.planning.suggest import suggest_smaller
from kadr.quant.weight_formats import NONE, check_weight_format
from kadr.request.passes import ResolvedPass, warn_distilled_guidance
from kadr.request.request import Request, refuse_overwriting
from kadr.request.resolve import resolve, warn_single_pass, with_second_model
from kadr.request.resolved_controls import warn_control_lora_mismatch
from kadr.request.windows import window_folder_path
from kadr.spec.locate import fetch_text_encoder, locate
from kadr.spec.loras import Loras, check_lora_names
from kadr.spec.model import order_upscalers, require_components
from kadr.spec.offload import check_offload
from kadr.spec.optional_components import open_default_upscaler, open_second_model, open_upscalers
from kadr.spec.options import check_compile
from kadr.version import __version__

LATENT_STAGES = ("text", "encode", "denoise", "upscale", "refine")  # those before the VAE decoder


@dataclass(frozen=True)
class Engine:
    """An open model, known from its headers. A stage reads weights when it needs them.

    Args:
        model_name: the name or path that the model was opened by.
        release: registry entry of the model; None for an unreleased one.
        second_model: name and registry entry of the second pass's model; None where both passes use one model.
    """

    model_name: str
    components: Components
    recipe: Recipe
    release: Release | None = None
    second_model: tuple[str, Release | None] | None = None

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        upscaler: str | Path | Sequence[str | Path] = (),
        second_model: str | Path | None = None,
        recipe: Recipe | None = None,
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
        """Opens a model. Reads headers, never weights.

        Args:
            model: a registry name, an official .safetensors file, a .gguf file or a diffusers folder.
            text_encoder: a folder with a T5 encoder and its tokenizer; by default the one beside the model, else it is
                fetched from the hub.
            vae: a checkpoint whose VAE replaces the model's own.
            upscaler: names or paths of latent upscalers for requests with two passes, at most one spatial and one
                temporal; by default the one released for the model.
            second_model: a model whose transformer and recipe the second pass uses.
            recipe: defaults for what requests leave out, instead of the model's own.
            loras: `Lora`s, paths, or tuples (path, strength) or (path, strength, strength in the second pass). They
                are applied as separate matmuls over weights in any format, and a request may set their strengths.
            lora_partial: ignore a LoRA's weights for layers that the transformer lacks, with a warning, instead of
                refusing the LoRA.
            merge_loras: add the LoRAs to the weights at load time: slightly faster, but rounded to the weight format,
                and their strengths are then fixed.
            device: "auto", "cpu", "cuda" or "mps".
            dtype: "auto", "bfloat16" or "float32".
            quant: weight format of the transformer in memory, a key of `kadr.quant.weight_formats.WEIGHT_FORMATS`. None
                keeps the file's own, which is exact. GGUF and fp8 files need no value.
            offload: what to unload or stream: "auto" (the fastest that fits), "none" (nothing), "stages"
                (each module after its stage) or "blocks" (stream transformer blocks).
            compile_transformer: fuse the transformer's layers with torch.compile, on CUDA. The first video waits for
                the compiler, close to a minute.
            prompt_cache: cache prompt embeddings on disk, so that a cached prompt does not need the text encoder. True
                uses `prompts` under $KADR_CACHE or the system's cache folder, 512 MB at most; a path names a folder.

        Raises:
            RequestError: unknown name, device, dtype, weight format or offload mode.
            CheckpointError: a file is missing, damaged, incomplete or not of the LTX-Video family.
        """
        # Refuse what cannot work before gigabytes are fetched for it: names first, the text encoder last.
        torch_device = pick_device(device)
        pick_dtype(dtype, torch_device, 0)
        check_compile(compile_transformer, torch_device)
        check_weight_format(quant or NONE)
        check_offload(offload)
        check_lora_names(loras)
        located = locate(model, text_encoder=text_encoder, vae=vae)
        checkpoint = Checkpoint.open(located.model, release=located.release)
        separate_vae = Checkpoint.open(located.vae) if located.vae else None
        require_components(checkpoint, separate_vae or checkpoint)
        second_checkpoint, second_release = open_second_model(second_model)
        if second_checkpoint is not None:
            require_components(second_checkpoint, separate_vae or checkpoint)
        adapters = Loras(loras, allow_partial=lora_partial, merge=merge_loras)
        adapters.check_fits((checkpoint, second_checkpoint or checkpoint))
        upscalers = open_upscalers(upscaler)
        order_upscalers(upscalers, checkpoint)
        release = located.release or checkpoint.info.release
        text_encoder_checkpoint = TextEncoderCheckpoint.open(located.text_encoder or fetch_text_encoder(release))
        components = Components(
            checkpoint,
            text_encoder_checkpoint,
            separate_vae,
            device=device,
            dtype=dtype,
            second_checkpoint=second_checkpoint,
            loras=adapters,
            quant=quant,
            offload=offload,
            compile_transformer=compile_transformer,
            prompt_cache=prompt_cache,
        )
        for upscaler_checkpoint in upscalers:
            components.add_upscaler(upscaler_checkpoint)
        first_recipe = recipe or (release.recipe if release else Recipe())
        return cls(
            model_name=located.name,
            components=components,
            recipe=with_second_model(first_recipe, second_release),
            release=release,
            second_model=None if second_model is None else (str(second_model), second_release),
        )

    def resolve(self, request: Request) -> Request:
        """Returns the request with the recipe's defaults for everything it leaves out.

        Raises:
            RequestError: the request has two passes, but the recipe has no second one.
            MediaError: the input video cannot be read.
        """
        return resolve(request, self.recipe)

    def resolve_passes(self, request: Request) -> tuple[ResolvedPass, ...]:
        """Returns the passes of the request, with sigma and guidance of every step. Loads nothing.

        Raises:
            RequestError: the request does not fit this model.
            CheckpointError: the request has two passes, but there is no upscaler.
        """
        return self._create_generation(request, ignore_progress, read_media=False).passes

    def plan(self, request: Request) -> Plan:
        """Returns the plan of a generation: placement, peak bytes and seconds of each stage, with reasons.

        The plan is arithmetic on headers: no weight is read. Images and clips of the request are read.

        Raises:
            RequestError: the request does not fit this model.
            PlanError: the generation does not fit in memory; carries the shortfall in bytes and suggests what fits.
        """
        generation = self._create_generation(request, ignore_progress)
        generation.check_first_sigma()
        self._warn_unused_controls(request)
        return self._plan_generation(generation, request)

    def generate(self, request: Request, *, watch: Watch = ignore_progress, cancel: CancelToken | None = None) -> Video:
        """Generates one video.

        Args:
            request: any `size` in pixels (sampled at the next multiple of 32 and cropped back) and any number of
                `frames` (sampled as 8k+1 and trimmed back) at `fps`.
            watch: called with a `Progress` after every step. Raise `Cancelled` from it to cancel.
            cancel: cancels the work, from any thread or signal handler; see `CancelToken`. None takes the current one.

        Returns:
            Video whose `frames` are uint8 (F, H, W, 3): RGB, full range, on the CPU.

        Raises:
            RequestError: the request does not fit this model. Raised before any weight is loaded.
            MediaError: an image or clip cannot be read.
            CheckpointError: the weights are damaged or incomplete.
            NonFiniteError: a stage produced NaN or infinity; it carries the stage.
            Cancelled: `cancel` was cancelled, or `watch` raised it.
        """
        with cancellable(cancel):
            generation = self._start_generation(request, watch)
            latents = generation.denoise()
            frames = torch.cat(list(generation.decode(latents))).numpy()
        request = generation.request
        return Video(frames, latents[0].cpu(), float(request.fps or 0), request, self.metadata(request))

    def write(
        self,
        request: Request,
        path: str | Path,
        *,
        watch: Watch = ignore_progress,
        on_plan: Callable[[Plan], object] | None = None,
        resume: bool = False,
        cancel: CancelToken | None = None,
    ) -> VideoFile:
        """Generates one video into an mp4, and writes frames as they are decoded.

        Memory does not grow with the length, except for the latents: half a megabyte per second of video at 704x480.
        The file is written beside `path` and renamed when complete. Until then, finished windows of a long video are
        stored in a folder beside it: `clip.windows` for `clip.mp4`.

        Args:
            watch, cancel: as in `generate`. Cancelled, it leaves nothing but the finished windows of a long video.
            on_plan: called with the plan before anything is loaded.
            resume: continue from the windows that an interrupted generation of the same request has stored.

        Raises:
            As `generate`, and MediaError: the file cannot be written; raised before anything is computed where that
            can be known.
        """
        with cancellable(cancel):
            return self._write(request, path, watch, on_plan, resume=resume)

    def _write(
        self,
        request: Request,
        path: str | Path,
        watch: Watch,
        on_plan: Callable[[Plan], object] | None,
        *,
        resume: bool,
    ) -> VideoFile:
        began = time.monotonic()
        refuse_overwriting(request, Path(path))
        generation = self._start_generation(request, watch)
        generation.check_first_sigma()
        request = generation.request
        fps, metadata = float(request.fps or 0), self.metadata(request)
        writer = VideoWriter(path, generation.size, fps, metadata=metadata)
        with self._open_window_folder(generation, Path(path), metadata, resume) as window_folder:
            if on_plan is not None and self.components.plan is not None:
                on_plan(self.components.plan)
            # Sample windows before the writer opens its file: if interrupted, nothing but finished windows remains.
            windowed = None if window_folder is None else generation.denoise_windows(window_folder)
            with writer:
                latents = generation.denoise() if windowed is None else windowed
                writer.write_all(frames.numpy() for frames in generation.decode(latents))
            if not isinstance(latents, Tensor):
                latents = latents.to_tensor()
            if window_folder is not None:
                window_folder.remove()
        return VideoFile(
            path=Path(path),
            frames=generation.frames,
            size=generation.size,
            fps=fps,
            seconds=time.monotonic() - began,
            latents=latents[0].cpu(),
            request=request,
        )

    @contextmanager
    def _open_window_folder(
        self, generation: Generation, path: Path, metadata: dict[str, Any], resume: bool
    ) -> Iterator[WindowFolder | None]:
        """Yields the folder for the windows of a long video, or None for a video without windows."""
        if not generation.window_passes:
            if resume:
                raise RequestError(
                    "there is nothing to resume: only a long video, made in windows, is stored before it is finished. "
                    "Leave out --resume."
                )
            check_resumable(window_folder_path(path), resume=False)  # refuses to write over an unfinished long video
            yield None
            return
        identity = {**metadata, **self._execution_identity(generation.request)}
        with WindowFolder.open(
            window_folder_path(path), identity, generation.window_latents_shapes(), resume=resume
        ) as window_folder:
            yield window_folder

    def _execution_identity(self, request: Request) -> dict[str, Any]:
        """Returns what a stored window depends on besides the metadata: contents of files, and how it is computed."""
        placement = self.components.placement("denoise")
        execution = f"{describe_weights(placement)}, by {placement.backend}, {torch.get_num_threads()} threads"
        fingerprints = self.components.file_fingerprints(request.media_paths())
        return {**fingerprints, EXECUTION_KEY: execution}

    def denoise(
        self,
        request: Request,
        *,
        noise: Tensor | None = None,
        init_latents: Tensor | None = None,
        watch: Watch = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> Tensor:
        """Runs every stage before the VAE decoder.

        Args:
            noise: initial noise (1, C, f, h, w), instead of the seed's.
            init_latents: normalised latents (1, C, f, h, w) to start from instead of pure noise. The request's sigmas
                must then start below 1, by `skip_initial` or `sigmas`.
            watch, cancel: as in `generate`.

        Returns:
            Normalised latents (1, C, f, h, w), float32, on the device.
        """
        with cancellable(cancel):
            generation = self._start_generation(request, watch, stages=LATENT_STAGES)
            return generation.denoise(noise, init_latents=init_latents)

    def encode_first_condition(self, request: Request, *, watch: Watch = ignore_progress) -> Tensor:
        """Encodes the first condition of the request: normalised latents (1, C, n, h, w), on the device.

        Raises:
            RequestError: the request has no condition.
        """
        if not request.conditions:
            raise RequestError("the request has no image or clip to encode; give it a Condition.")
        generation = self._start_generation(request, watch, stages=("encode",))
        pixels = generation.media.prepared_conditions[0][0].pixels
        matches = [[item.pixels is pixels for item in inputs.conditions] for inputs in generation.media.pass_inputs]
        index = next(index for index, row in enumerate(matches) if any(row))
        return generation.encode_media(indices=(index,))[index].conditions[matches[index].index(True)][1]

    def encode_media(self, request: Request, *, watch: Watch = ignore_progress) -> EncodedInputs:
        """Encodes conditions, input video and controls of the request, for its first pass or window.

        Raises:
            As `generate`.
        """
        return self._start_generation(request, watch, stages=("encode",)).encode_media(indices=(0,))[0]

    def encode_prompts(
        self, request: Request, prompts: Sequence[str], *, watch: Watch = ignore_progress
    ) -> list[Tensor]:
        """Returns the prompt embeddings (n, D) of each prompt, for its n tokens, on the CPU.

        Args:
            request: the request to plan for; its own prompt is not encoded.
        """
        self._start_generation(request, watch, read_media=False, stages=("text",))
        prompt_embeddings = PromptEncoder(self.components, prompts).encode(watch)
        return [item.embeddings[item.mask].cpu() for item in prompt_embeddings]

    def decode(
        self,
        latents: Tensor,
        request: Request,
        *,
        noise: Tensor | None = None,
        watch: Watch = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> Tensor:
        """Decodes normalised latents (1, C, f, h, w) to uint8 (F, H, W, 3) on the CPU, cropped and trimmed.

        Args:
            request: the request that the latents were sampled for; it sets size, frames and decoder settings.
            noise: decode noise in the shape of the latents, instead of the seed's, for decoders that take noise.
            watch, cancel: as in `generate`.
        """
        with cancellable(cancel):
            generation = self._start_generation(request, watch, read_media=False, stages=("decode",))
            return torch.cat(list(generation.decode(latents, noise)))

    def metadata(self, request: Request) -> dict[str, Any]:
        """Returns the metadata stored in an mp4: enough to generate the same video again."""
        device, dtype = self.components.device, self.components.dtype
        return {
            "version": __version__,
            "model_name": self.model_name,
            **self.components.component_paths(),
            **self._lora_metadata(),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "quant": self.components.quant,
            "compile_transformer": self.components.compile_transformer,
            "request": _with_absolute_paths(request).to_json(),
        }

    def _warn_unused_controls(self, request: Request) -> None:
        loras = self.components.loras
        if self.components.transformer_override is None:
            warn_control_lora_mismatch(
                request, has_loras=bool(loras), has_in_context_lora=loras.has_in_context(request.lora_strengths)
            )

    def _lora_metadata(self) -> dict[str, Any]:
        """Returns the metadata of the LoRAs; of a transformer in training, that of the LoRA trained so far."""
        trained = self.components.override_lora_path
        return (Loras([trained]) if trained is not None else self.components.loras).metadata()

    def _start_generation(
        self, request: Request, watch: Watch, *, read_media: bool = True, stages: Collection[str] = ()
    ) -> Generation:
        """Checks and plans a generation; nothing is loaded yet. stages: the stages that will run, () for all."""
        generation = self._create_generation(request, watch, read_media=read_media)
        if not stages or "denoise" in stages:
            self._warn_unused_controls(request)
        self.components.apply_plan(self._plan_generation(generation, request, stages))
        return generation

    def _create_generation(self, request: Request, watch: Watch, *, read_media: bool = True) -> Generation:
        unresolved, request = request, self.resolve(request)
        warn_single_pass(unresolved, request, self.recipe)
        if request.multi_scale and not self.components.upscaler_checkpoints:
            self.components.add_upscaler(open_default_upscaler(self.release))
        generation = Generation(self.components, request, watch, read_media=read_media)
        first_model = (self.model_name, self.release)
        models = zip((first_model, self.second_model or first_model), self.components.schedules, strict=True)
        for resolved_pass, ((name, release), schedule) in zip(generation.passes, models, strict=False):
            warn_distilled_guidance(resolved_pass, name, schedule, release)
        return generation

    def _plan_generation(self, generation: Generation, request: Request, stages: Collection[str] = ()) -> Plan:
        workload, cached = generation.build_workload(stages), self.components.cached_private_bytes
        try:
            return Planner(self.components, workload, cached=cached).plan()
        except PlanError as error:
            suggestion = suggest_smaller(self.components, workload, generation.request, cached=cached)
            raise PlanError(f"{error} {suggestion}", shortfall=error.shortfall) from error


def _with_absolute_paths(request: Request) -> Request:
    """Returns the request with absolute paths, so that `kadr rerun` works from another folder."""
    conditions = tuple(replace(item, media=_absolute_path(item.media)) for item in request.conditions)
    controls = tuple(replace(item, media=_absolute_path(item.media)) for item in request.controls)
    input_video = None if request.input_video is None else _absolute_path(request.input_video)
    return replace(request, conditions=conditions, controls=controls, input_video=input_video)


def _absolute_path(path: str) -> str:
    return str(Path(path).expanduser().resolve())
