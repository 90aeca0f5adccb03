"""The engine: a model that is open, and what can be asked of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import Cancelled, KadrError, PlanError, RequestError
from kadr.media.writer import VideoWriter
from kadr.memory.device import pick_device, pick_dtype
from kadr.models.registry import Recipe, Release
from kadr.pipeline.components import Components
from kadr.pipeline.generation import Generation
from kadr.pipeline.longvideo.window_folder import EXECUTION, WindowFolder, check_resumable
from kadr.pipeline.progress import Progress, Watch, ignore_progress
from kadr.pipeline.stages.encode import EncodedInputs
from kadr.pipeline.stages.text import PromptEncoder
from kadr.pipeline.video import Video, VideoFile
from kadr.planning.plan import Plan, describe_weights
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


@dataclass(frozen=True)
class Engine:
    """A model, known from its headers. Weights are read when a stage needs them.

    Args:
        model_name: as it was asked for.
        release: the registry's entry; None for an unreleased one.
        second_model: name and entry of the model of the second pass, where it is another.
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
        """Open a model.

        Args:
            model: a name of the registry, an official .safetensors file, or a diffusers folder.
            text_encoder: a folder with a T5 encoder and its tokenizer; by default beside the model, else from the hub.
            vae: a checkpoint to take the VAE from instead of the model's own.
            upscaler: names or paths of latent upscalers, one spatial and one temporal at most, for requests of two
                passes; by default the one that belongs to the model.
            second_model: take the second pass's transformer, and its recipe, from this model.
            recipe: what requests mean when they do not say, instead of the model's own.
            loras: `Lora`s, paths, or tuples of a path and its strength; of its strength in the second pass, too. They
                act beside the weights, however those are stored, and a request may say how strongly.
            lora_partial: leave out what a LoRA has for layers that the transformer does not have, with a warning,
                instead of refusing it.
            merge_loras: add the LoRAs to the weights when those are loaded: a little faster, and rounded to what the
                weights are stored as. Their strengths are fixed then.
            device: "auto", "cpu", "cuda" or "mps".
            dtype: "auto", "bfloat16" or "float32".
            quant: how the transformer's weights are stored in memory; see `kadr.quant.weight_formats.SCHEMES`. None
                leaves them as the file has them, which is exact. GGUF and fp8 files need none.
            offload: what is done with what does not fit: "auto" (whatever keeps the most speed), "none" (nothing),
                "stages" (modules leave memory after their stage) or "blocks" (blocks are in memory while they run).
            compile_transformer: have torch's compiler fuse what the transformer's layers compute, on CUDA: the first video waits
                for it, the better part of a minute.
            prompt_cache: keep encoded prompts on disk, so that one that was encoded before does not touch the text
                encoder: in `prompts` in $KADR_CACHE or the system's folder for caches, 512 MB at most; or a folder.

        Raises:
            RequestError: an unknown name, device, dtype or way.
            CheckpointError: a file is missing, damaged, incomplete, or not of this family.
        """
        # What cannot work is refused before gigabytes are fetched for it: the names first, the text encoder last.
        picked = pick_device(device)
        pick_dtype(dtype, picked, 0)
        check_compile(compile_transformer, picked)
        check_weight_format(quant or NONE)
        check_offload(offload)
        check_lora_names(loras)
        found = locate(model, text_encoder=text_encoder, vae=vae)
        checkpoint = Checkpoint.open(found.model, release=found.release)
        own_vae = Checkpoint.open(found.vae) if found.vae else None
        require_components(checkpoint, own_vae or checkpoint)
        second, second_released = open_second_model(second_model)
        if second is not None:
            require_components(second, own_vae or checkpoint)
        adapters = Loras(loras, allow_partial=lora_partial, merge=merge_loras)
        adapters.check_fits((checkpoint, second or checkpoint))
        upscalers = open_upscalers(upscaler)
        order_upscalers(upscalers, checkpoint)
        released = found.release or checkpoint.info.release
        text = TextEncoderCheckpoint.open(found.text_encoder or fetch_text_encoder(released))
        components = Components(
            checkpoint,
            text,
            own_vae,
            device=device,
            dtype=dtype,
            second_checkpoint=second,
            loras=adapters,
            quant=quant,
            offload=offload,
            compile_transformer=compile_transformer,
            prompt_cache=prompt_cache,
        )
        for opened in upscalers:
            components.add_upscaler(opened)
        own = recipe or (released.recipe if released else Recipe())
        recipe = with_second_model(own, second_released)
        named = None if second_model is None else (str(second_model), second_released)
        return cls(model_name=found.name, components=components, recipe=recipe, release=released, second_model=named)

    def resolve(self, request: Request) -> Request:
        """The request with everything it left out taken from the model's recipe.

        Raises:
            RequestError: two passes are asked for, and there is no recipe for the second.
            MediaError: the video to start from cannot be read.
        """
        return resolve(request, self.recipe)

    def resolve_passes(self, request: Request) -> tuple[ResolvedPass, ...]:
        """The passes the request comes to, with the level and the strengths of every step. Nothing is loaded.

        Raises:
            RequestError: the request does not fit this model.
            CheckpointError: two passes are asked for, and there is no upscaler.
        """
        return self._create_generation(request, ignore_progress, read_media=False).passes

    def plan(self, request: Request) -> Plan:
        """What a run will need and how it is made to fit: what is in memory when, how long it takes, and why.

        Arithmetic on headers; no weight is read. Its pictures and clips are.

        Raises:
            RequestError: the request does not fit this model.
            PlanError: it does not fit in memory; carries the shortfall in bytes, and says what would fit.
        """
        generation = self._create_generation(request, ignore_progress)
        generation.check_first_sigma()
        self._warn_unused_controls(request)
        return self._plan_generation(generation, request)

    def generate(self, request: Request, *, watch: Watch = ignore_progress) -> Video:
        """Make one video.

        Args:
            request: `size` in pixels (any; snapped up to 32 and cropped back), `frames` (snapped to 8k+1 and trimmed
                back) at `fps`.
            watch: called after every step with a `Progress`. Raise from it to cancel.

        Returns:
            Video whose `frames` are uint8 (frames, height, width, 3): RGB, full range, on the CPU.

        Raises:
            RequestError: the request does not fit this model. Raised before any weight is moved.
            MediaError: a picture cannot be read.
            CheckpointError: the weights are damaged or incomplete.
            NonFiniteError: a stage produced NaN or infinity; it carries the stage.
            Cancelled: `watch` raised; its exception is the cause.
        """
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
    ) -> VideoFile:
        """Make one video straight into an mp4: frames are written as they are decoded.

        Memory does not grow with the length, but for the latents: half a megabyte a second at 704x480. The file is
        written beside `path` and renamed when it is whole. Of a long video each finished window is kept in a folder
        beside it, `clip.windows` for `clip.mp4`, until then.

        Args:
            watch: as of `generate`.
            on_plan: told the plan, before anything is loaded.
            resume: go on with the windows that a run of the same request has left there.

        Raises:
            As `generate`, and MediaError where the file cannot be written: found before anything is computed where
            that can be known.
        """
        began = time.monotonic()
        refuse_overwriting(request, Path(path))
        generation = self._start_generation(request, watch)
        generation.check_first_sigma()
        request = generation.request
        fps, record = float(request.fps or 0), self.metadata(request)
        writer = VideoWriter(path, generation.size, fps, metadata=record)
        with self._open_window_folder(generation, Path(path), record, resume) as kept:
            if on_plan is not None and self.components.plan is not None:
                on_plan(self.components.plan)
            # A run that is cut off while it makes windows is to leave nothing but them.
            pieces = None if kept is None else generation.denoise_windows(kept)
            with writer:
                latents = generation.denoise() if pieces is None else pieces
                writer.write_all(frames.numpy() for frames in generation.decode(latents))
            if not isinstance(latents, Tensor):
                latents = latents.to_tensor()
            if kept is not None:
                kept.remove()
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
        self, generation: Generation, path: Path, record: dict[str, Any], resume: bool
    ) -> Iterator[WindowFolder | None]:
        """Where the windows of a long video are kept; None for any other."""
        if not generation.window_passes:
            if resume:
                raise RequestError("there is nothing to go on with: a video without windows is made at once.")
            check_resumable(window_folder_path(path), resume=False)  # another video is to be written there
            yield None
            return
        choice = self.components.placement("denoise")
        way = f"{describe_weights(choice)}, by {choice.backend}, {torch.get_num_threads()} threads"
        identity = {**record, **self.components.file_fingerprints(generation.request.media_paths()), EXECUTION: way}
        with WindowFolder.open(
            window_folder_path(path), identity, generation.window_latents_shapes(), resume=resume
        ) as kept:
            yield kept

    def denoise(
        self,
        request: Request,
        *,
        noise: Tensor | None = None,
        init_latents: Tensor | None = None,
        watch: Watch = ignore_progress,
    ) -> Tensor:
        """Everything up to the decoder.

        Args:
            noise: (1, C, f, h, w), instead of the seed's.
            init_latents: normalised latents (1, C, f, h, w) to begin from instead of pure noise; the request's levels must
                then begin below 1, through `skip_initial` or `levels`.

        Returns:
            Normalised latents (1, C, f, h, w), float32, on the device.
        """
        stages = ("text", "encode", "denoise", "upscale", "refine")
        return self._start_generation(request, watch, stages=stages).denoise(noise, init_latents=init_latents)

    def encode_first_condition(self, request: Request, *, watch: Watch = ignore_progress) -> Tensor:
        """The request's first condition through the VAE's encoder: normalised latents (1, C, n, h, w), on the device.

        Raises:
            RequestError: the request has no condition.
        """
        if not request.conditions:
            raise RequestError("the request has no picture to encode; give it a Condition.")
        generation = self._start_generation(request, watch, stages=("encode",))
        first = generation.media.prepared_conditions[0][0].pixels
        places = [[item.pixels is first for item in one.conditions] for one in generation.media.pass_inputs]
        where = next(number for number, found in enumerate(places) if any(found))
        return generation.encode_media(indices=(where,))[where].conditions[places[where].index(True)][1]

    def encode_media(self, request: Request, *, watch: Watch = ignore_progress) -> EncodedInputs:
        """The pictures and clips of the request, and what it follows, through the VAE's encoder, for its first pass or
        window.

        Raises:
            As `generate`.
        """
        return self._start_generation(request, watch, stages=("encode",)).encode_media(indices=(0,))[0]

    def encode_prompts(
        self, request: Request, prompts: Sequence[str], *, watch: Watch = ignore_progress
    ) -> list[Tensor]:
        """What the text encoder makes of some prompts: (n, D) each, for its n tokens, on the CPU.

        Args:
            request: that it is planned for; its own prompt is not encoded.
        """
        self._start_generation(request, watch, read_media=False, stages=("text",))
        texts = PromptEncoder(self.components, prompts).encode(watch)
        return [text.embeddings[text.mask].cpu() for text in texts]

    def decode(
        self, latents: Tensor, request: Request, *, noise: Tensor | None = None, watch: Watch = ignore_progress
    ) -> Tensor:
        """Normalised latents (1, C, f, h, w) -> uint8 (F, H, W, 3) on the CPU, cropped and trimmed as requested.

        Args:
            request: the one the latents were made for; it holds the size, the frames and the decoder's settings.
            noise: shaped as the latents, instead of the seed's, for decoders that take noise.
        """
        generation = self._start_generation(request, watch, read_media=False, stages=("decode",))
        return torch.cat(list(generation.decode(latents, noise)))

    def metadata(self, request: Request) -> dict[str, Any]:
        """What is stored beside the pictures: enough to make the same video again."""
        device, dtype = self.components.device, self.components.dtype
        # Absolute paths, so that the video can be made again from another folder.
        here = [replace(c, media=_absolute_path(c.media)) for c in request.conditions]
        followed = tuple(replace(c, media=_absolute_path(c.media)) for c in request.controls)
        start = None if request.input_video is None else _absolute_path(request.input_video)
        return {
            "version": __version__,
            "model_name": self.model_name,
            **self.components.component_paths(),
            **self._lora_metadata(),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "quant": self.components.quant,
            "compile_transformer": self.components.compile_transformer,
            "request": replace(request, conditions=tuple(here), controls=followed, input_video=start).to_json(),
        }

    def _warn_unused_controls(self, request: Request) -> None:
        loras = self.components.loras
        if self.components.transformer_override is None:
            warn_control_lora_mismatch(
                request, has_loras=bool(loras), has_in_context_lora=loras.has_in_context(request.lora_strengths)
            )

    def _lora_metadata(self) -> dict[str, Any]:
        """What is added to the weights; of a transformer that learns, what it has learned by now."""
        learned = self.components.override_lora_path
        return (Loras([learned]) if learned is not None else self.components.loras).metadata()

    def _start_generation(
        self, request: Request, watch: Watch, *, read_media: bool = True, stages: Collection[str] = ()
    ) -> Generation:
        """The request on its way: checked, planned, and nothing loaded yet. stages: those to be run; () is all."""
        generation = self._create_generation(request, watch, read_media=read_media)
        if not stages or "denoise" in stages:
            self._warn_unused_controls(request)
        self.components.apply_plan(self._plan_generation(generation, request, stages))
        return generation

    def _create_generation(self, request: Request, watch: Watch, *, read_media: bool = True) -> Generation:
        asked, request = request, self.resolve(request)
        warn_single_pass(asked, request, self.recipe)
        if request.multi_scale and not self.components.upscaler_checkpoints:
            self.components.add_upscaler(open_default_upscaler(self.release))
        generation = Generation(self.components, request, _raise_as_cancelled(watch), read_media=read_media)
        own = (self.model_name, self.release)
        models = zip((own, self.second_model or own), self.components.schedules, strict=True)
        for plan, ((name, released), schedule) in zip(generation.passes, models, strict=False):
            warn_distilled_guidance(plan, name, schedule, released)
        return generation

    def _plan_generation(self, generation: Generation, request: Request, stages: Collection[str] = ()) -> Plan:
        work, cached = generation.build_workload(stages), self.components.cached_private_bytes
        try:
            return Planner(self.components, work, cached=cached).plan()
        except PlanError as error:
            way_out = suggest_smaller(self.components, work, generation.request, cached=cached)
            raise PlanError(f"{error} {way_out}", shortfall=error.shortfall) from error


def _absolute_path(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _raise_as_cancelled(watch: Watch) -> Watch:
    """The watcher, whose exceptions become `Cancelled`."""

    def report(progress: Progress) -> None:
        try:
            watch(progress)
        except KadrError:
            raise
        except Exception as reason:
            raise Cancelled(f"cancelled at {progress.stage} {progress.step} of {progress.of}") from reason

    return report
