"""The diffusion transformer: noisy latent tokens, prompt embeddings and sigma to a velocity.

B batch, N tokens, L text positions, T caption channels, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.errors import CheckpointError
from kadr.kernels import fused
from kadr.kernels.cuda.graphs import GraphBackend, GraphedCallable
from kadr.models.block_inputs import BlockInputs, TextKVCache
from kadr.models.block_loop import run_blocks, run_blocks_cached
from kadr.nn.attention import PERTURB_TO_INPUT, PERTURB_TO_VALUES, Attention, KeysValues
from kadr.nn.linear import Linear, Quantized, mlp, next_modulated_input
from kadr.nn.modulation import compute_adaln_params, init_scale_shift_table
from kadr.nn.padding import unpadded_length
from kadr.nn.rope import Rope, rope_table
from kadr.nn.timestep_embedding import TimestepEmbedding
from kadr.nn.weak_method import weak_method
from kadr.quoting import quote
from kadr.sampling.guidance import Perturbation
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.sampling.sigma_groups import SigmaGroups
from kadr.sampling.step_cache import ResidualCache
from kadr.validation import check_config_count, check_config_flag, check_config_number

# Keys of the header that change what is computed, with the only value released weights use.
TRANSFORMER_FIXED_VALUES: Mapping[str, Any] = {
    "_class_name": "Transformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "double_self_attention": False,
    "only_cross_attention": False,
    "upcast_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "adaptive_norm": "single_scale_shift",
    "positional_embedding_type": "rope",
    "timestep_scale_multiplier": 1000,
}
# Largest sizes in a config, several times those of the released 13B: a larger one is damage or an attack.
_MAX_TRANSFORMER_SIZES = {
    "num_layers": 256,
    "num_heads": 256,
    "head_dim": 1024,
    "caption_channels": 1 << 16,
    "in_channels": 4096,
}
_MAX_ROPE_VALUE = 1e9
_ROPE_AXES = ("seconds of rope_max_positions", "height of rope_max_positions", "width of rope_max_positions")
# STG modes that perturb a block's self-attention -> what replaces the output of that attention.
PERTURBED_VALUES = {ATTENTION_VALUES: PERTURB_TO_VALUES, ATTENTION_SKIP: PERTURB_TO_INPUT}
# Tokens of all samples. For more of them, computation on a GPU takes longer than kernel launches on the host.
CUDA_GRAPH_MAX_TOKENS = 2048
CUDA_GRAPH_TEXT_MULTIPLE = 64  # of the text's length: prompts of like lengths share the graphs
PADDING_BIAS = -10000.0  # added to the cross-attention logits of padding; finite, as in the official package


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a transformer.

    Args:
        num_layers: transformer blocks.
        caption_channels: T, width of the prompt embeddings.
        in_channels: C, of the latents; the output has as many.
        rope_max_positions: seconds, pixels down and pixels right that RoPE divides positions by.
        causal_temporal_positioning: latent frame l is at pixel frame max(0, 8l - 7), as from 0.9.5 on; before, at 8l.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    caption_channels: int = 4096
    in_channels: int = 128
    rope_theta: float = 10000.0
    rope_max_positions: tuple[float, float, float] = (20.0, 2048.0, 2048.0)
    causal_temporal_positioning: bool = True

    def __post_init__(self) -> None:
        for name, maximum in _MAX_TRANSFORMER_SIZES.items():
            check_config_count("transformer", name, getattr(self, name), maximum)
        for name, value in (("rope_theta", self.rope_theta), *zip(_ROPE_AXES, self.rope_max_positions, strict=True)):
            check_config_number("transformer", name, value, _MAX_ROPE_VALUE)
        check_config_flag("transformer", "causal_temporal_positioning", self.causal_temporal_positioning)
        if self.width < 6 or self.width % 2:
            raise CheckpointError(
                f"a transformer of width {self.width} has no room for RoPE over three axes; "
                "the width must be even and at least 6."
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> TransformerConfig:
        """Reads the "transformer" entry of an official header.

        Raises:
            CheckpointError: a value that no released weights use.
        """
        for key, value in TRANSFORMER_FIXED_VALUES.items():
            found = header.get(key, value)
            if found != value:
                raise CheckpointError(
                    f"the transformer's header has {key} = {quote(found)}; kadr knows only {quote(value)}."
                )
        seconds, down, right = header.get("positional_embedding_max_pos", (20, 2048, 2048))
        config = cls(
            num_layers=header["num_layers"],
            num_heads=header["num_attention_heads"],
            head_dim=header["attention_head_dim"],
            caption_channels=header["caption_channels"],
            in_channels=header["in_channels"],
            rope_theta=header.get("positional_embedding_theta", 10000.0),
            rope_max_positions=(seconds, down, right),
            causal_temporal_positioning=header.get("causal_temporal_positioning", False),
        )
        for key, value in (("cross_attention_dim", config.width), ("out_channels", config.in_channels)):
            if header.get(key, value) != value:
                raise CheckpointError(
                    f"the transformer's header has {key} = {quote(header[key])}; kadr expects {value}."
                )
        return config

    def to_header(self) -> dict[str, Any]:
        """Returns the "transformer" entry of an official header."""
        return {
            **TRANSFORMER_FIXED_VALUES,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "cross_attention_dim": self.width,
            "caption_channels": self.caption_channels,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "num_embeds_ada_norm": 1000,
            "norm_num_groups": 32,
            "attention_type": "default",
            "use_linear_projection": False,
            "positional_embedding_theta": self.rope_theta,
            "positional_embedding_max_pos": list(self.rope_max_positions),
            "causal_temporal_positioning": self.causal_temporal_positioning,
        }


TRANSFORMER_2B = TransformerConfig(num_layers=28, num_heads=32, head_dim=64)
TRANSFORMER_13B = TransformerConfig(num_layers=48, num_heads=32, head_dim=128)


class FeedForward(nn.Module):
    """Feed-forward: linear to `hidden_width`, GELU (tanh form), linear to `width_out`."""

    def __init__(self, width_in: int, hidden_width: int, width_out: int) -> None:
        super().__init__()
        self.up = Linear(width_in, hidden_width)
        self.down = Linear(hidden_width, width_out)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return mlp(self.up, self.down, x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward.

    adaLN-single modulates the self-attention and the feed-forward by the timestep. Cross-attention is not modulated
    and reads the residual stream without a norm: the released weights were trained that way.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = init_scale_shift_table(6, width)
        self.self_attention = Attention(width, config.num_heads)
        self.cross_attention = Attention(width, config.num_heads)
        self.feed_forward = FeedForward(width, 4 * width, width)
        # Called with the block instead of `compute`. Bound to the block it would be in a reference cycle.
        self.compute_override: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, block_inputs: BlockInputs, stg_mode: str | None = None) -> Tensor:
        """Computes the block for x (B, N, D) -> (B, N, D).

        Args:
            stg_mode: perturb the block as spatio-temporal guidance (STG) does. "transformer_block" skips it; for the
                modes that perturb its self-attention see `PERTURBED_VALUES`.
        """
        if stg_mode == TRANSFORMER_BLOCK:
            return x
        text_kv_cache, samples = block_inputs.text_kv, block_inputs.samples
        text_kv, bias = text_kv_cache.get(self.cross_attention).for_samples(samples), text_kv_cache.bias
        compute = self.compute if self.compute_override is None else partial(self.compute_override, self)
        sample_bias = None if bias is None else bias[samples]
        perturbed = PERTURBED_VALUES[stg_mode] if stg_mode else None
        return compute(x, block_inputs.adaln, block_inputs.rope, text_kv, sample_bias, perturbed)

    def compute(
        self,
        x: Tensor,
        adaln: Tensor,
        rope: Rope,
        text_kv: KeysValues,
        text_bias: Tensor | None,
        perturbed_value: str | None,
    ) -> Tensor:
        """Computes self-attention, cross-attention and feed-forward.

        Args:
            adaln: (B, 1 or N, 6, D), the timestep's part of the modulation.
            text_kv: keys and values of the text.
            text_bias: (B, 1, 1, L) for the logits of cross-attention.
            perturbed_value: for the self-attention; see `Attention.forward`.
        """
        attn_mod, mlp_mod = compute_adaln_params(self.scale_shift_table, adaln)
        feed_forward = self.feed_forward
        h = self.self_attention.modulated_input(x, attn_mod.scale, attn_mod.shift, perturbed_value)  # (B, N, D)
        h = self.self_attention(h, rope=rope, perturbed_value=perturbed_value)
        x = fused.gate_residual(x, attn_mod.gate, h)
        # `h` is reused: a tensor under another name would stay in memory until the block ends.
        h = self.cross_attention(x, text_kv, bias=text_bias)
        x, h = next_modulated_input(x, None, h, mlp_mod.scale, mlp_mod.shift, feed_forward.up)
        return fused.gate_residual(x, mlp_mod.gate, feed_forward(h))


class Transformer(nn.Module):
    """Predicts the velocity of a rectified flow: the noise minus the clean latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.proj_in = Linear(config.in_channels, width)
        self.time_embed = TimestepEmbedding(width)
        self.adaln_linear = Linear(width, 6 * width)
        self.caption_proj = FeedForward(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = init_scale_shift_table(2, width)
        self.proj_out = Linear(width, config.in_channels)
        self._cuda_graphs: GraphedCallable | None = None

    def use_cuda_graphs(self, graph_backend: GraphBackend | None = None) -> None:
        """Replays the blocks as CUDA graphs for shapes that they ran before; see `kernels.cuda.graphs`.

        Needs weights that are not moved, a `TextKVCache`, and at most `CUDA_GRAPH_MAX_TOKENS` tokens.
        """
        self._cuda_graphs = GraphedCallable(weak_method(self._run_blocks_of_tensors), backend=graph_backend)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the blocks with `torch.compile` when they first run: one compilation serves all blocks.

        Takes most of a minute for each kind of input (with and without a padded text, or with perturbed blocks).

        Args:
            backend: of `torch.compile`.
        """
        compiled = torch.compile(TransformerBlock.compute, backend=backend)
        for block in self.blocks:
            cast(TransformerBlock, block).compute_override = compiled

    def clear_cuda_graphs(self) -> None:
        """Drops the captured CUDA graphs and frees their memory."""
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()

    def compute_rope(self, positions: Tensor) -> Rope:
        """Computes the RoPE table for positions (B, 3, N), fp32: seconds, pixels down, pixels right.

        It is the same in every denoising step.
        """
        config = self.config
        return rope_table(positions, config.width, max_positions=config.rope_max_positions, theta=config.rope_theta)

    def runs_as_cuda_graph(self, num_tokens: int) -> bool:
        """Returns whether an evaluation of so many tokens, of all samples, is to be a CUDA graph."""
        return self._cuda_graphs is not None and num_tokens <= CUDA_GRAPH_MAX_TOKENS

    def project_text(self, text: Tensor, text_mask: Tensor | None, *, num_tokens: int | None = None) -> TextKVCache:
        """Projects prompt embeddings for cross-attention. Reuse the result over the steps: it holds the KV cache.

        Cuts the padding behind the longest text, but for what CUDA graphs share a length by. Other padding gets a bias
        that sets its attention weights to 0, as in the official package, so the velocity is the same. A sample that is
        all padding attends to all of it, there and here.

        Args:
            text: (B, L, T) prompt embeddings.
            text_mask: (B, L), true for tokens that are not padding; None if nothing is padded.
            num_tokens: of all samples of an evaluation, if known.
        """
        bias, in_graph = None, num_tokens is not None and self.runs_as_cuda_graph(num_tokens)
        if text_mask is not None:
            length = unpadded_length(text_mask, multiple_of=CUDA_GRAPH_TEXT_MULTIPLE if in_graph else 1)
            text, text_mask = text[:, :length], text_mask[:, :length].bool()
        # A graph has a bias or none: prompts share it where all have one, of zeros too.
        if text_mask is not None and (in_graph or not bool(text_mask.all())):
            bias = ((~text_mask).to(text.dtype) * PADDING_BIAS)[:, None, None, :]
        return TextKVCache(self.caption_proj(text), bias)

    def forward(
        self,
        tokens: Tensor,
        rope: Rope,
        text: Tensor | TextKVCache,
        text_mask: Tensor | None,
        sigma: Tensor,
        *,
        sigma_groups: SigmaGroups | None = None,
        residual_cache: ResidualCache | None = None,
    ) -> Tensor:
        """Predicts the velocity of every token.

        Args:
            tokens: (B, N, C) normalised latents, frame by frame, row by row.
            rope: the table from `compute_rope`.
            text: (B, L, T) prompt embeddings, or the result of `project_text`, which has its mask.
            text_mask: (B, L), true for tokens that are not padding; None if nothing is padded, or for a result of
                `project_text`.
            sigma: (B, 1) or (B, N) in [0, 1], fp32; the timestep is 1000 times that.
            sigma_groups: tokens that share one of sigma (B, N); None: found here, for which the host waits for a GPU.
            residual_cache: step cache that may replace the blocks after the first; None: all blocks run.

        Returns:
            (B, N, C) in the dtype of the weights.

        Raises:
            ValueError: a mask beside the result of `project_text`.
        """
        x, block_inputs, temb = self._embed_inputs(tokens, rope, text, text_mask, sigma, sigma_groups)
        if residual_cache is not None:
            return self._project_out(run_blocks_cached(self.blocks, x, block_inputs, residual_cache)[0], temb)
        hidden_states = [x]
        del x
        return self._project_out(self._run_blocks(hidden_states, block_inputs)[0], temb)

    def forward_with_perturbed(
        self,
        tokens: Tensor,
        rope: Rope,
        text: Tensor | TextKVCache,
        text_mask: Tensor | None,
        sigma: Tensor,
        *,
        blocks: Collection[int],
        mode: str,
        rows: slice = slice(None),
        sigma_groups: SigmaGroups | None = None,
        residual_cache: ResidualCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts the velocity of every token, and that of some samples with some blocks perturbed, for STG.

        The two branches share the blocks before the first perturbed one. Arguments as in `forward`, and:

        Args:
            blocks: indices of the perturbed blocks, at least one, from 0.
            mode: STG mode; see `TransformerBlock.forward`.
            rows: samples of the batch that are also evaluated with perturbed blocks.

        Returns:
            (B, N, C), and (rows, N, C).
        """
        x, block_inputs, temb = self._embed_inputs(tokens, rope, text, text_mask, sigma, sigma_groups)
        perturbation = Perturbation(tuple(blocks), mode, rows)
        if residual_cache is not None:
            x, perturbed = run_blocks_cached(self.blocks, x, block_inputs, residual_cache, perturbation)
        else:
            hidden_states = [x]
            del x
            x, perturbed = self._run_blocks(hidden_states, block_inputs, perturbation)
        return self._project_out(x, temb), self._project_out(perturbed, temb[rows])

    def _run_blocks(
        self, hidden_states: list[Tensor], block_inputs: BlockInputs, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, ...]:
        """Runs all blocks, as a CUDA graph if possible. hidden_states: [x (B, N, D)]; see `run_blocks`."""
        if self._cuda_graphs is None or not self.runs_as_cuda_graph(hidden_states[0].shape[:2].numel()):
            return run_blocks(self.blocks, hidden_states, block_inputs, perturbation)
        text_kv = tuple(block_inputs.text_kv.get(attention) for attention in self._cross_attentions)
        outputs: tuple[Tensor, ...] = self._cuda_graphs(
            *hidden_states, block_inputs.adaln, block_inputs.rope, block_inputs.text_kv.bias, text_kv, perturbation
        )
        return outputs

    def _run_blocks_of_tensors(
        self,
        x: Tensor,
        adaln: Tensor,
        rope: Rope,
        text_bias: Tensor | None,
        text_kv: tuple[KeysValues, ...],
        perturbation: Perturbation | None,
    ) -> tuple[Tensor, ...]:
        """Runs all blocks with every input tensor as an argument, as CUDA graphs need it."""
        text_kv_cache = TextKVCache(None, text_bias, dict(zip(self._cross_attentions, text_kv, strict=True)))
        return run_blocks(self.blocks, [x], BlockInputs(text_kv_cache, adaln, rope), perturbation)

    @property
    def _cross_attentions(self) -> list[Attention]:
        return [cast(TransformerBlock, block).cross_attention for block in self.blocks]

    def _embed_inputs(
        self,
        tokens: Tensor,
        rope: Rope,
        text: Tensor | TextKVCache,
        text_mask: Tensor | None,
        sigma: Tensor,
        sigma_groups: SigmaGroups | None,
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """Embeds the inputs of the first block, and the timestep (B, 1 or N, D), which `_project_out` needs too."""
        if isinstance(text, TextKVCache) and text_mask is not None:
            raise ValueError("text_mask is given with a TextKVCache, which would ignore it; pass it to project_text")
        x = self.proj_in(tokens)
        temb, adaln = self._embed_sigma(sigma, x.dtype, sigma_groups)
        text_kv = text if isinstance(text, TextKVCache) else self.project_text(text, text_mask)
        return x, BlockInputs(text_kv, adaln, rope), temb

    def _project_out(self, x: Tensor, temb: Tensor) -> Tensor:
        # The last modulation reads the timestep embedding itself, without `adaln_linear` and its SiLU.
        shift, scale = (self.scale_shift_table + temb[..., None, :]).unbind(-2)
        return self.proj_out(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))

    def _embed_sigma(
        self, sigma: Tensor, dtype: torch.dtype, sigma_groups: SigmaGroups | None
    ) -> tuple[Tensor, Tensor]:
        """Embeds the timestep of sigma (B, 1 or N): (B, 1 or N, D), and for the adaLN of the blocks (B, 1 or N, 6, D).

        Tokens share few sigmas: each distinct one is embedded once.
        """
        if sigma.shape[1] == 1:
            temb = self.time_embed(sigma[:, 0] * 1000, dtype)
            return temb[:, None], self.adaln_linear(F.silu(temb)).unflatten(-1, (6, -1))[:, None]
        groups = SigmaGroups.from_values(sigma) if sigma_groups is None else sigma_groups
        distinct_sigmas, indices = groups.distinct(sigma)
        temb = self.time_embed(distinct_sigmas * 1000, dtype)
        adaln = self.adaln_linear(F.silu(temb)).unflatten(-1, (6, -1))
        return temb[indices], adaln[indices]
