"""The base of the pipelines: opens a model, and has its device, its memory and the engine behind it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from kadr.diffusers.locate_model import device_name, dtype_name, file_name, model_name
from kadr.diffusers.lora import Adapters, LoraMethods, refuse_options
from kadr.errors import RequestError
from kadr.pipeline.engine import Engine
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from kadr.spec.lora import Lora

P = TypeVar("P", bound="LTXBasePipeline")
ENGINE_OPTIONS = ("release", "text_encoder", "vae", "upscaler", "models_dirs", "quant", "prompt_cache")
HARMLESS_OPTIONS = ("use_safetensors", "low_cpu_mem_usage", "variant")
OPTION_HINT = (
    f"It takes torch_dtype, device_map and, of Engine.open, {', '.join(ENGINE_OPTIONS)}; weights are quantized by "
    "quant, such as quant='int8', and components are opened from paths."
)


class VAEHandle:
    """The VAE of a pipeline, for scripts that switch its tiling or pass it on.

    kadr decodes every video in chunks, in memory that does not grow with its length, and without the seams of tiles:
    there is nothing to switch, and the frames stay the same.
    """

    def __init__(self, pipeline: LTXBasePipeline) -> None:
        self.pipeline = pipeline
        self.spatial_compression_ratio, self.temporal_compression_ratio = SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

    def enable_tiling(self, *sizes: Any, **named_sizes: Any) -> None:
        """Does nothing: the decoder is always streamed."""

    def disable_tiling(self) -> None:
        """Does nothing: the decoder is always streamed."""

    def enable_slicing(self) -> None:
        """Does nothing: one video is decoded at a time."""

    def disable_slicing(self) -> None:
        """Does nothing: one video is decoded at a time."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pipeline."""
        return self.pipeline.dtype


class LTXBasePipeline(LoraMethods):
    """A pipeline on top of `Engine`, which is opened when it is first needed, and again after a change of options.

    Args:
        model: what `Engine.open` takes.
        dtype: "bfloat16", "float32" or "auto".
        options: further arguments of `Engine.open`.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(self, model: str | Path, dtype: str = "float32", **options: Any) -> None:
        self._model, self._dtype, self._options = model, dtype, options
        self._device, self._offload = "cpu", "none"
        self._engine: tuple[Any, Engine] | None = None
        self._interrupt, self._guidance_scale, self._guidance_rescale = False, 1.0, 0.0
        self._num_timesteps, self._current_timestep = 0, None
        self._attention_kwargs: dict[str, Any] | None = None
        self._shows_progress = True
        self.adapters = Adapters()
        self.vae = VAEHandle(self)
        self.vae_spatial_compression_ratio, self.vae_temporal_compression_ratio = (
            SPATIAL_COMPRESSION,
            TEMPORAL_COMPRESSION,
        )

    @classmethod
    def from_pretrained(
        cls: type[P], pretrained_model_name_or_path: Any, *, torch_dtype: Any = None, **options: Any
    ) -> P:
        """Opens a folder in diffusers' layout, a registry name, or a repository of the hub that the registry has.

        Nothing is loaded or fetched before the first video.

        Args:
            torch_dtype: torch.bfloat16 or torch.float32; None is float32, as in diffusers.
            options: `device_map`, or arguments of `Engine.open`.

        Raises:
            RequestError: an unknown repository, dtype or option.
        """
        return cls._from_name(model_name(pretrained_model_name_or_path), torch_dtype, options)

    @classmethod
    def from_single_file(
        cls: type[P], pretrained_model_link_or_path: Any, *, torch_dtype: Any = None, **options: Any
    ) -> P:
        """Opens an official .safetensors file or a .gguf file by its path, or by its link on the hub.

        Args:
            torch_dtype, options: see `from_pretrained`.

        Raises:
            RequestError: as `from_pretrained`.
        """
        return cls._from_name(file_name(pretrained_model_link_or_path), torch_dtype, options)

    @classmethod
    def from_pipe(cls: type[P], pipeline: LTXBasePipeline, **options: Any) -> P:
        """Makes a pipeline of this kind with the model, the device, the LoRAs and the engine of another."""
        refuse_options("from_pipe", options)
        made = cls(pipeline._model, pipeline._dtype, **pipeline._options)
        made._device, made._offload, made.adapters = pipeline._device, pipeline._offload, pipeline.adapters
        made._engine = pipeline._engine
        return made

    @classmethod
    def _from_name(cls: type[P], model: str, torch_dtype: Any, options: dict[str, Any]) -> P:
        torch_dtype = options.pop("dtype", None) if torch_dtype is None else torch_dtype
        device = options.pop("device_map", None)
        engine_options = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
        if isinstance(engine_options.get("vae"), VAEHandle):
            raise RequestError("vae is another pipeline's; this one has its own. Leave it out, or pass a path.")
        refuse_options("from_pretrained", options, harmless=HARMLESS_OPTIONS, hint=OPTION_HINT)
        pipeline = cls(model, dtype_name(torch_dtype), **engine_options)
        return pipeline if device is None else pipeline.to("auto" if device in ("balanced", "auto") else device)

    @property
    def engine(self) -> Engine:
        """The engine, opened with the pipeline's options of now."""
        arguments: dict[str, Any] = {"device": self._device, "dtype": self._dtype, "offload": self._offload}
        adapters, is_fused = self.adapters, self.adapters.fused_scale is not None
        scale = 1.0 if adapters.fused_scale is None else adapters.fused_scale
        strengths = adapters.strengths(scale) if is_fused else (1.0,) * len(adapters.paths)
        loras = tuple(Lora(path, strength) for path, strength in zip(adapters.paths.values(), strengths, strict=True))
        key = (tuple(arguments.items()), loras, is_fused)
        if self._engine is None or self._engine[0] != key:
            if self._engine is not None:
                self._engine[1].unload()
            engine = Engine.open(self._model, **arguments, **self._options, loras=loras, merge_loras=is_fused)
            self._engine = key, engine
        return self._engine[1]

    def lora_strengths(self, attention_kwargs: dict[str, Any] | None) -> tuple[float, ...] | None:
        """Returns the strengths of a call's LoRAs; None where they are fused.

        Raises:
            RequestError: attention_kwargs has more than a scale, or one for fused LoRAs.
        """
        options = dict(attention_kwargs or {})
        scale = options.pop("scale", 1.0)
        refuse_options("attention_kwargs", options, hint="It takes scale, of all LoRAs.")
        if self.adapters.fused_scale is not None:
            if scale != 1.0:
                raise RequestError("attention_kwargs has a scale, and the LoRAs are fused. Call unfuse_lora first.")
            return None
        return self.adapters.strengths(scale)

    def to(self: P, *targets: Any, **named: Any) -> P:
        """Moves the pipeline to a device, or to a dtype, or both, at the next call; returns it."""
        for target in (*targets, *named.values()):
            if isinstance(target, torch.dtype):
                self._dtype = dtype_name(target)
            elif target is not None and not isinstance(target, bool):
                self._device, self._offload = device_name(target), "none"
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Unloads each module after its stage: kadr's offload "stages"."""
        self._set_offload("stages", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Streams transformer blocks: kadr's offload "blocks"."""
        self._set_offload("blocks", gpu_id, device)

    def _set_offload(self, offload: str, gpu_id: int | None, device: Any) -> None:
        if gpu_id not in (None, 0):
            raise RequestError(f"gpu_id is {gpu_id}; set CUDA_VISIBLE_DEVICES to use another GPU than the first.")
        self._device = "auto" if device is None else device_name(device)
        self._offload = offload

    def enable_vae_tiling(self) -> None:
        """As `vae.enable_tiling`."""

    def enable_vae_slicing(self) -> None:
        """As `vae.enable_slicing`."""

    def set_progress_bar_config(self, **options: Any) -> None:
        """Takes `disable`; kadr's lines of progress have nothing else to set."""
        self._shows_progress = not options.get("disable", False)

    def maybe_free_model_hooks(self) -> None:
        """Does nothing: the plan of each call decides what stays in memory."""

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.engine.spec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return self.engine.spec.dtype

    @property
    def components(self) -> dict[str, Any]:
        """The components that a script may pass on: the VAE."""
        return {"vae": self.vae}

    @property
    def config(self) -> SimpleNamespace:
        """Names what the pipeline was opened by."""
        return SimpleNamespace(_name_or_path=str(self._model))

    @property
    def guidance_scale(self) -> float:
        """CFG scale of the call; a callback may set `_guidance_scale` for the steps after it."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """Factor of the rescaled CFG of the call."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True where the CFG scale is above 1."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """Timestep of the step that has just ended."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """As given to the call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `_interrupt`: the steps that remain are left out."""
        return self._interrupt
