"""The diffusion transformer: noisy latent tokens, a text and a noise level to a velocity.

B batch, N tokens, L text positions, C latent channels, D width.
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
from kadr.kernels.cuda_graphs import GraphBackend, GraphedCallable
from kadr.models.block_inputs import BlockInputs, TextKVCache
from kadr.models.block_loop import run_blocks, run_blocks_cached
from kadr.nn.attention import PERTURB_TO_INPUT, PERTURB_TO_VALUES, Attention, KeysValues
from kadr.nn.linear import Linear, mlp
from kadr.nn.modulation import compute_adaln_params, init_scale_shift_table
from kadr.nn.rope import Rope, rope_table
from kadr.nn.timestep_embedding import TimestepEmbedding
from kadr.sampling.guidance import Perturbation
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.sampling.step_cache import ResidualCache

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
# Modes of spatio-temporal guidance that disturb a layer's self-attention, and what then takes the place of its outcome.
PERTURBED_VALUES = {ATTENTION_VALUES: PERTURB_TO_VALUES, ATTENTION_SKIP: PERTURB_TO_INPUT}
CUDA_GRAPH_MAX_TOKENS = (
    2048  # tokens of all samples: a GPU needs longer for more of them than the host for telling it what to do
)
PADDING_BIAS = -10000.0  # added to the logits of padded text: the official bias, kept finite


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a transformer.

    Args:
        causal_temporal_positioning: latent frame l stands at pixel frame max(0, 8l - 7), as from 0.9.5 on; before, at 8l.
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
        if self.width < 6 or self.width % 2:
            raise CheckpointError(f"a transformer of width {self.width} has no room for three axes of rotation.")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> TransformerConfig:
        """Read the "transformer" entry of an official header.

        Raises:
            CheckpointError: a value that no released weights use.
        """
        for key, value in TRANSFORMER_FIXED_VALUES.items():
            found = header.get(key, value)
            if found != value:
                raise CheckpointError(f"the transformer's header has {key} = {found!r}; kadr knows only {value!r}.")
        seconds, down, right = header.get("positional_embedding_max_pos", (20, 2048, 2048))
        config = cls(
            num_layers=header["num_layers"],
            num_heads=header["num_attention_heads"],
            head_dim=header["attention_head_dim"],
            caption_channels=header["caption_channels"],
            in_channels=header["in_channels"],
            rope_theta=float(header.get("positional_embedding_theta", 10000.0)),
            rope_max_positions=(float(seconds), float(down), float(right)),
            causal_temporal_positioning=bool(header.get("causal_temporal_positioning", False)),
        )
        for key, value in (("cross_attention_dim", config.width), ("out_channels", config.in_channels)):
            if header.get(key, value) != value:
                raise CheckpointError(f"the transformer's header has {key} = {header[key]}; kadr expects {value}.")
        return config

    def to_header(self) -> dict[str, Any]:
        """The "transformer" entry of an official header."""
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
    """Linear to `hidden_width`, GELU (tanh form), linear to `width_out`."""

    def __init__(self, width_in: int, hidden_width: int, width_out: int) -> None:
        super().__init__()
        self.up = Linear(width_in, hidden_width)
        self.down = Linear(hidden_width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(self.up, self.down, x)


class TransformerBlock(nn.Module):
    """Tokens look at each other, then at the text, then think alone.

    The first and the last branch are bent by the noise level. The text branch is not, and reads the residual
    stream without a norm: the released weights were trained that way.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = init_scale_shift_table(6, width)
        self.self_attention = Attention(width, config.num_heads)
        self.cross_attention = Attention(width, config.num_heads)
        self.feed_forward = FeedForward(width, 4 * width, width)
        self.compute_override: Callable[..., Tensor] | None = None  # `compute`, where a compiler has seen it

    def forward(self, x: Tensor, block_inputs: BlockInputs, stg_mode: str | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). `stg_mode` is a mode of spatio-temporal guidance; see `PERTURBED_VALUES`."""
        if stg_mode == TRANSFORMER_BLOCK:
            return x
        reading, samples = block_inputs.text_kv, block_inputs.samples
        read, bias = reading.get(self.cross_attention).for_samples(samples), reading.bias
        compute = self.compute_override or self.compute
        return compute(
            x,
            block_inputs.adaln,
            block_inputs.rope,
            read,
            None if bias is None else bias[samples],
            PERTURBED_VALUES[stg_mode] if stg_mode else None,
        )

    def compute(
        self,
        x: Tensor,
        adaln: Tensor,
        rope: Rope,
        text_kv: KeysValues,
        text_bias: Tensor | None,
        perturbed_value: str | None,
    ) -> Tensor:
        """The three branches.

        Args:
            text_kv: keys and values of the text; bias: (B, 1, 1, L) for its logits.
            perturbed_value: of what the attention among tokens comes to; see `Attention.forward`.
        """
        around_attention, around_thought = compute_adaln_params(self.scale_shift_table, adaln)
        bent = fused.norm_modulate(x, around_attention.scale, around_attention.shift)
        bent = self.self_attention(bent, rope=rope, perturbed_value=perturbed_value)
        x = fused.gate_residual(x, around_attention.gate, bent)
        # What is not needed any more keeps no name: it would stay in memory until the layer ends.
        bent = self.cross_attention(x, text_kv, bias=text_bias)
        x, bent = fused.gate_residual_norm_modulate(x, None, bent, around_thought.scale, around_thought.shift)
        return fused.gate_residual(x, around_thought.gate, self.feed_forward(bent))


class Transformer(nn.Module):
    """Velocity of a rectified flow: the noise minus the clean latents."""

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
        """Run the layers as CUDA graphs from now on, where they have seen a shape before; see `kernels.cuda_graphs`.

        For weights that stay where they are, texts that all layers have read once, and up to `CUDA_GRAPH_MAX_TOKENS` tokens.
        """
        self._cuda_graphs = GraphedCallable(self._run_blocks_of_tensors, backend=graph_backend)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch's compiler fuse what the layers compute, when they first run: one compilation serves all of them.

        Takes the better part of a minute for each kind of input (with and without a padded text, or disturbed blocks).

        Args:
            backend: of `torch.compile`.
        """
        compiled = torch.compile(TransformerBlock.compute, backend=backend)
        for layer in self.blocks:
            cast(TransformerBlock, layer).compute_override = partial(compiled, layer)

    def clear_cuda_graphs(self) -> None:
        """Drop what was recorded, and the memory that it holds."""
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()

    def compute_rope(self, positions: Tensor) -> Rope:
        """The table for positions (B, 3, N), fp32: seconds, pixels down, pixels right. Constant over the steps."""
        dtype = self.scale_shift_table.dtype
        return rope_table(
            positions,
            self.config.width,
            max_positions=self.config.rope_max_positions,
            theta=self.config.rope_theta,
            dtype=dtype,
        )

    def project_text(self, text: Tensor, text_mask: Tensor | None) -> TextKVCache:
        """A text for the layers. Constant over the steps, and much is computed but once where it is kept.

        Padding behind the longest text is left out. What is padded before that gets a bias that no weight survives, as
        in the official package, so the velocity is the same. A sample that is all padding attends to all of it there,
        and so it does here.

        Args:
            text: (B, L, T) text encoding.
            text_mask: (B, L), true where the text is not padding; None where nothing is padded.
        """
        bias = None
        if text_mask is not None and bool((text_mask := text_mask.bool()).any(1).all()):
            longest = int(text_mask.any(0).nonzero().max()) + 1
            text, text_mask = text[:, :longest], text_mask[:, :longest]
        if text_mask is not None and not bool(text_mask.all()):
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
        residual_cache: ResidualCache | None = None,
    ) -> Tensor:
        """The velocity of every token.

        Args:
            tokens: (B, N, C) normalised latents, frame by frame, row by row.
            rope: the table made by `rope`.
            text: (B, L, T) text encoding, or what `read` made of it, with no mask then.
            text_mask: (B, L), true where the text is not padding; None where nothing is padded.
            sigma: (B, 1) or (B, N) noise levels in [0, 1], fp32.
            residual_cache: stands in for the layers after the first where it can; None: all are run.

        Returns:
            (B, N, C) in the dtype of the weights.
        """
        x, given, embedded = self._embed_inputs(tokens, rope, text, text_mask, sigma)
        if residual_cache is not None:
            return self._project_out(run_blocks_cached(self.blocks, x, given, residual_cache)[0], embedded)
        starts = [x]
        del x
        return self._project_out(self._run_blocks(starts, given)[0], embedded)

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
        residual_cache: ResidualCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The velocity of every token, and that of some samples with some blocks disturbed.

        Up to the first disturbed block both are one, and computed once. Arguments as in `forward`, and:

        Args:
            blocks: which, at least one, counted from 0.
            mode: how; see `PERTURBED_VALUES`.
            rows: samples of the batch that are evaluated both ways.

        Returns:
            (B, N, C), and (rows, N, C).
        """
        x, given, embedded = self._embed_inputs(tokens, rope, text, text_mask, sigma)
        disturb = Perturbation(tuple(blocks), mode, rows)
        if residual_cache is not None:
            x, aside = run_blocks_cached(self.blocks, x, given, residual_cache, disturb)
        else:
            starts = [x]
            del x
            x, aside = self._run_blocks(starts, given, disturb)
        return self._project_out(x, embedded), self._project_out(aside, embedded[rows])

    def _run_blocks(
        self, hidden_states: list[Tensor], block_inputs: BlockInputs, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, ...]:
        """All layers, replayed where they can be. starts: x (B, N, D) alone; see `onward`."""
        kept, tokens = None, hidden_states[0].shape[0] * hidden_states[0].shape[1]
        if self._cuda_graphs is not None and tokens <= CUDA_GRAPH_MAX_TOKENS:
            kept = block_inputs.text_kv.get_all(self._cross_attentions)
        if self._cuda_graphs is None or kept is None:
            return run_blocks(self.blocks, hidden_states, block_inputs, perturbation)
        made: tuple[Tensor, ...] = self._cuda_graphs(
            *hidden_states, block_inputs.adaln, block_inputs.rope, block_inputs.text_kv.bias, kept, perturbation
        )
        return made

    def _run_blocks_of_tensors(
        self,
        x: Tensor,
        adaln: Tensor,
        rope: Rope,
        text_bias: Tensor | None,
        text_kv: tuple[KeysValues, ...],
        perturbation: Perturbation | None,
    ) -> tuple[Tensor, ...]:
        """`onward`, with every tensor that it reads an argument."""
        reading = TextKVCache(None, text_bias, dict(zip(self._cross_attentions, text_kv, strict=True)))
        return run_blocks(self.blocks, [x], BlockInputs(reading, adaln, rope), perturbation)

    @property
    def _cross_attentions(self) -> list[Attention]:
        return [cast(TransformerBlock, layer).cross_attention for layer in self.blocks]

    def _embed_inputs(
        self, tokens: Tensor, rope: Rope, text: Tensor | TextKVCache, text_mask: Tensor | None, sigma: Tensor
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """What the first layer gets, and the embedded level (B, 1 or N, D), which the end reads again."""
        x = self.proj_in(tokens)
        embedded, bends = self._embed_sigma(sigma, x.dtype)
        reading = text if isinstance(text, TextKVCache) else self.project_text(text, text_mask)
        return x, BlockInputs(reading, bends, rope), embedded

    def _project_out(self, x: Tensor, temb: Tensor) -> Tensor:
        # The last bend reads the embedding before its SiLU and its widening to six rows.
        shift, scale = (self.scale_shift_table + temb[..., None, :]).unbind(-2)
        return self.proj_out(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))

    def _embed_sigma(self, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """level (B, T) -> (B, T, D) and (B, T, 6, D). Tokens share few levels: each distinct one is embedded once."""
        if sigma.shape[1] == 1:  # nothing to look for, which a GPU would have to be waited for
            embedded = self.time_embed(sigma[:, 0] * 1000, dtype)
            return embedded[:, None], self.adaln_linear(F.silu(embedded)).unflatten(-1, (6, -1))[:, None]
        distinct, where = sigma.unique(return_inverse=True)
        embedded = self.time_embed(distinct * 1000, dtype)
        bends = self.adaln_linear(F.silu(embedded)).unflatten(-1, (6, -1))
        return embedded[where], bends[where]
