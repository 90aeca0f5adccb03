"""Loads the weights of a model's components from their files, without a placement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kadr.kernels.hadamard import hadamard_transform
from kadr.models.lora_layers import LoraWeightsByLayer, merge_loras
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.loading.rotation_check import detect_rotation, may_be_rotated
from kadr.quant.convert import in_block
from kadr.quant.rotation import rotate_weights
from kadr.quant.weight_formats import FP8
from kadr.spec.model import ModelSpec
from kadr.spec.weights import is_quantized


class ModuleLoader:
    """Loads modules on the CPU; tensors that need no conversion share memory with the file.

    Args:
        spec: the model; what is loaded must be on disk.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._rotations: dict[Path, int | None] = {}  # Hadamard rotation of each checked transformer

    def load_transformer(self, pass_index: int, dtype: torch.dtype, *, keep_storage_dtype: bool) -> Transformer:
        """Loads the transformer of a pass, and merges LoRAs that are to be merged."""
        checkpoint, loras = self.spec.transformer_checkpoints[pass_index], self.spec.loras
        rotation = self._detect_rotation(pass_index, dtype)
        # Weights stored in 8-bit floats are multiplied as they are: widening and rounding again would lose twice.
        keep_storage_dtype = keep_storage_dtype or (
            self.spec.quant == FP8 and is_quantized(checkpoint.sources["transformer"])
        )
        keep_storage_dtype = keep_storage_dtype and not loras.is_merged  # they are merged into unquantized weights
        module = checkpoint.load_transformer(dtype, keep_storage_dtype=keep_storage_dtype)
        if rotation is not None:
            rotate_weights(module, rotation)
        if loras.is_merged:
            merge_loras(module, loras.load(), loras.strengths(pass_index))
        return module

    def read_transformer_weights(self, pass_index: int, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Reads single tensors of the transformer of a pass as its file means them: dequantized, rotated back.

        Args:
            names: kadr keys.
            dtype: in which the rotation is looked for; see `detect_rotation`.

        Returns:
            kadr key -> tensor in fp32, on the CPU, without LoRAs.
        """
        rotation = self._detect_rotation(pass_index, dtype)
        weights = self.spec.transformer_checkpoints[pass_index].read_transformer_weights(names)
        if rotation is None:
            return weights
        return {
            name: hadamard_transform(weight, rotation or weight.shape[1])
            if in_block(name) and weight.ndim == 2 and name.endswith(".weight")
            else weight
            for name, weight in weights.items()
        }

    def _detect_rotation(self, pass_index: int, dtype: torch.dtype) -> int | None:
        checkpoint = self.spec.transformer_checkpoints[pass_index]
        if checkpoint.path not in self._rotations:
            is_suspect = may_be_rotated(checkpoint)
            rotation = detect_rotation(checkpoint, dtype, self.spec.device) if is_suspect else None
            self._rotations[checkpoint.path] = rotation
        return self._rotations[checkpoint.path]

    def load_loras(self) -> tuple[LoraWeightsByLayer, ...]:
        """Loads the LoRAs that are computed beside the weights."""
        return () if self.spec.loras.is_merged else self.spec.loras.load()

    def load_text_encoder(self, dtype: torch.dtype, *, keep_storage_dtype: bool) -> T5Encoder:
        """Loads the text encoder."""
        return self.spec.text_encoder_checkpoint.load(dtype, keep_storage_dtype=keep_storage_dtype)

    def load_vae_encoder(self, dtype: torch.dtype, *, keep_storage_dtype: bool) -> VAE:
        """Loads the VAE without its decoder. keep_storage_dtype: not supported, as convolutions have no such form."""
        return self.spec.vae_checkpoint.load_vae(dtype, with_decoder=False)

    def load_vae_decoder(self, dtype: torch.dtype, *, keep_storage_dtype: bool) -> VAE:
        """Loads the VAE without its encoder, like `load_vae_encoder`."""
        return self.spec.vae_checkpoint.load_vae(dtype, with_encoder=False)

    def load_latent_statistics(self) -> VAE:
        """Loads the VAE without encoder and decoder, in float32: the statistics of its latents."""
        return self.spec.vae_checkpoint.load_vae(torch.float32, with_encoder=False, with_decoder=False)

    def load_upscaler(self, kind: str) -> LatentUpscaler:
        """Loads a latent upscaler, in float32 as in the official package."""
        return self.spec.upscalers(has_two_passes=True)[kind].load_upscaler(torch.float32)
