"""The diffusion transformer: noisy latent tokens, a text and a noise level to a velocity.

B batch, N tokens, L text positions, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.errors import CheckpointError
from kadr.kernels import fused
from kadr.kernels.cuda_graphs import GraphBackend, GraphedCallable
from kadr.models.block_loop import onward, through
from kadr.nn.attention import INPUT, VALUES, Attention, KeysValues
from kadr.nn.linear import Linear, through_gelu
from kadr.nn.modulation import branch_bends, learned_table
from kadr.nn.rope import Rope, rope_table
from kadr.nn.timestep_embedding import LevelEmbedding
from kadr.sampling.guidance import Disturb
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.sampling.step_cache import Stream

# Keys of the header that change what is computed, with the only value released weights use.
FIXED: Mapping[str, Any] = {
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
DISTURBED = {ATTENTION_VALUES: VALUES, ATTENTION_SKIP: INPUT}
REPLAYED = 2048  # tokens of all samples: a GPU needs longer for more of them than the host for telling it what to do
MASKED = -10000.0  # added to the logits of padded text: the official bias, kept finite


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a transformer.

    Args:
        causal_positions: latent frame l stands at pixel frame max(0, 8l - 7), as from 0.9.5 on; before, at 8l.
    """

    layers: int
    heads: int
    head_width: int
    text_width: int = 4096
    channels: int = 128
    theta: float = 10000.0
    limits: tuple[float, float, float] = (20.0, 2048.0, 2048.0)
    causal_positions: bool = True

    def __post_init__(self) -> None:
        if self.width < 6 or self.width % 2:
            raise CheckpointError(f"a transformer of width {self.width} has no room for three axes of rotation.")

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> TransformerConfig:
        """Read the "transformer" entry of an official header.

        Raises:
            CheckpointError: a value that no released weights use.
        """
        for key, value in FIXED.items():
            found = header.get(key, value)
            if found != value:
                raise CheckpointError(f"the transformer's header has {key} = {found!r}; kadr knows only {value!r}.")
        seconds, down, right = header.get("positional_embedding_max_pos", (20, 2048, 2048))
        config = cls(
            layers=header["num_layers"],
            heads=header["num_attention_heads"],
            head_width=header["attention_head_dim"],
            text_width=header["caption_channels"],
            channels=header["in_channels"],
            theta=float(header.get("positional_embedding_theta", 10000.0)),
            limits=(float(seconds), float(down), float(right)),
            causal_positions=bool(header.get("causal_temporal_positioning", False)),
        )
        for key, value in (("cross_attention_dim", config.width), ("out_channels", config.channels)):
            if header.get(key, value) != value:
                raise CheckpointError(f"the transformer's header has {key} = {header[key]}; kadr expects {value}.")
        return config

    def header(self) -> dict[str, Any]:
        """The "transformer" entry of an official header."""
        return {
            **FIXED,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "cross_attention_dim": self.width,
            "caption_channels": self.text_width,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_embeds_ada_norm": 1000,
            "norm_num_groups": 32,
            "attention_type": "default",
            "use_linear_projection": False,
            "positional_embedding_theta": self.theta,
            "positional_embedding_max_pos": list(self.limits),
            "causal_temporal_positioning": self.causal_positions,
        }


TRANSFORMER_2B = TransformerConfig(layers=28, heads=32, head_width=64)
TRANSFORMER_13B = TransformerConfig(layers=48, heads=32, head_width=128)


class FeedForward(nn.Module):
    """Linear to `hidden`, GELU (tanh form), linear to `width_out`."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.up = Linear(width_in, hidden)
        self.down = Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return through_gelu(self.up, self.down, x)


class Reading:
    """A text as the layers read it: keys and values of each layer are computed once, however many steps come.

    Args:
        text: (B, L, D); None where all keys and values are there.
        bias: (B, 1, 1, L) for the logits of the text; None where nothing is padded.
        kept: keys and values by their attention, as far as they are there.
    """

    def __init__(
        self, text: Tensor | None, bias: Tensor | None, kept: Mapping[nn.Module, KeysValues] | None = None
    ) -> None:
        self.text, self.bias = text, bias
        self._kept = dict(kept or {})

    def of(self, attention: Attention) -> KeysValues:
        """The keys and values of a layer's attention."""
        if attention not in self._kept:
            assert self.text is not None
            self._kept[attention] = attention.keys_values(self.text)
        return self._kept[attention]

    def all(self, attentions: Sequence[Attention]) -> tuple[KeysValues, ...] | None:
        """The keys and values of some layers' attentions; None as long as some are not there."""
        found = tuple(self._kept[attention] for attention in attentions if attention in self._kept)
        return found if len(found) == len(attentions) else None


class Given(NamedTuple):
    """What all layers are given besides the tokens.

    Args:
        bends: (B, 1 or N, 6, D), of the noise level.
        samples: of the reading's batch, those that the tokens belong to.
    """

    reading: Reading
    bends: Tensor
    rope: Rope
    samples: slice = slice(None)

    def rows(self, rows: slice) -> Given:
        """Of some samples of the batch."""
        return Given(self.reading, self.bends[rows], self.rope.rows(rows), rows)


class Layer(nn.Module):
    """Tokens look at each other, then at the text, then think alone.

    The first and the last branch are bent by the noise level. The text branch is not, and reads the residual
    stream without a norm: the released weights were trained that way.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = learned_table(6, width)
        self.self_attention = Attention(width, config.heads)
        self.text_attention = Attention(width, config.heads)
        self.feed_forward = FeedForward(width, 4 * width, width)
        self.compiled: Callable[..., Tensor] | None = None  # `compute`, where a compiler has seen it

    def forward(self, x: Tensor, given: Given, disturbed: str | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). `disturbed` is a mode of spatio-temporal guidance; see `DISTURBED`."""
        if disturbed == TRANSFORMER_BLOCK:
            return x
        reading, samples = given.reading, given.samples
        read, bias = reading.of(self.text_attention).rows(samples), reading.bias
        compute = self.compiled or self.compute
        return compute(
            x,
            given.bends,
            given.rope,
            read,
            None if bias is None else bias[samples],
            DISTURBED[disturbed] if disturbed else None,
        )

    def compute(
        self, x: Tensor, bends: Tensor, rope: Rope, read: KeysValues, bias: Tensor | None, instead: str | None
    ) -> Tensor:
        """The three branches.

        Args:
            read: keys and values of the text; bias: (B, 1, 1, L) for its logits.
            instead: of what the attention among tokens comes to; see `Attention.forward`.
        """
        around_attention, around_thought = branch_bends(self.modulation, bends)
        bent = fused.norm_modulate(x, around_attention.scale, around_attention.shift)
        bent = self.self_attention(bent, rope=rope, instead=instead)
        x = fused.gate_residual(x, around_attention.gate, bent)
        # What is not needed any more keeps no name: it would stay in memory until the layer ends.
        bent = self.text_attention(x, read, bias=bias)
        x, bent = fused.gate_residual_norm_modulate(x, None, bent, around_thought.scale, around_thought.shift)
        return fused.gate_residual(x, around_thought.gate, self.feed_forward(bent))


class Transformer(nn.Module):
    """Velocity of a rectified flow: the noise minus the clean latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_in = Linear(config.channels, width)
        self.level_embedding = LevelEmbedding(width)
        self.level_bends = Linear(width, 6 * width)
        self.text_in = FeedForward(config.text_width, width, width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.modulation = learned_table(2, width)
        self.patch_out = Linear(width, config.channels)
        self._graphed: GraphedCallable | None = None

    def replay(self, backend: GraphBackend | None = None) -> None:
        """Run the layers as CUDA graphs from now on, where they have seen a shape before; see `kernels.cuda_graphs`.

        For weights that stay where they are, texts that all layers have read once, and up to `REPLAYED` tokens.
        """
        self._graphed = GraphedCallable(self._replayed, backend=backend)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have torch's compiler fuse what the layers compute, when they first run: one compilation serves all of them.

        Takes the better part of a minute for each kind of input (with and without a padded text, or disturbed blocks).

        Args:
            backend: of `torch.compile`.
        """
        compiled = torch.compile(Layer.compute, backend=backend)
        for layer in self.layers:
            cast(Layer, layer).compiled = partial(compiled, layer)

    def forget(self) -> None:
        """Drop what was recorded, and the memory that it holds."""
        if self._graphed is not None:
            self._graphed.clear()

    def rope(self, positions: Tensor) -> Rope:
        """The table for positions (B, 3, N), fp32: seconds, pixels down, pixels right. Constant over the steps."""
        dtype = self.modulation.dtype
        return rope_table(positions, self.config.width, limits=self.config.limits, theta=self.config.theta, dtype=dtype)

    def read(self, text: Tensor, text_mask: Tensor | None) -> Reading:
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
            bias = ((~text_mask).to(text.dtype) * MASKED)[:, None, None, :]
        return Reading(self.text_in(text), bias)

    def forward(
        self,
        tokens: Tensor,
        rope: Rope,
        text: Tensor | Reading,
        text_mask: Tensor | None,
        level: Tensor,
        *,
        cache: Stream | None = None,
    ) -> Tensor:
        """The velocity of every token.

        Args:
            tokens: (B, N, C) normalised latents, frame by frame, row by row.
            rope: the table made by `rope`.
            text: (B, L, T) text encoding, or what `read` made of it, with no mask then.
            text_mask: (B, L), true where the text is not padding; None where nothing is padded.
            level: (B, 1) or (B, N) noise levels in [0, 1], fp32.
            cache: stands in for the layers after the first where it can; None: all are run.

        Returns:
            (B, N, C) in the dtype of the weights.
        """
        x, given, embedded = self._enter(tokens, rope, text, text_mask, level)
        if cache is not None:
            return self._leave(through(self.layers, x, given, cache)[0], embedded)
        starts = [x]
        del x
        return self._leave(self._through(starts, given)[0], embedded)

    def with_disturbed(
        self,
        tokens: Tensor,
        rope: Rope,
        text: Tensor | Reading,
        text_mask: Tensor | None,
        level: Tensor,
        *,
        blocks: Collection[int],
        mode: str,
        rows: slice = slice(None),
        cache: Stream | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The velocity of every token, and that of some samples with some blocks disturbed.

        Up to the first disturbed block both are one, and computed once. Arguments as in `forward`, and:

        Args:
            blocks: which, at least one, counted from 0.
            mode: how; see `DISTURBED`.
            rows: samples of the batch that are evaluated both ways.

        Returns:
            (B, N, C), and (rows, N, C).
        """
        x, given, embedded = self._enter(tokens, rope, text, text_mask, level)
        disturb = Disturb(tuple(blocks), mode, rows)
        if cache is not None:
            x, aside = through(self.layers, x, given, cache, disturb)
        else:
            starts = [x]
            del x
            x, aside = self._through(starts, given, disturb)
        return self._leave(x, embedded), self._leave(aside, embedded[rows])

    def _through(self, starts: list[Tensor], given: Given, disturb: Disturb | None = None) -> tuple[Tensor, ...]:
        """All layers, replayed where they can be. starts: x (B, N, D) alone; see `onward`."""
        kept, tokens = None, starts[0].shape[0] * starts[0].shape[1]
        if self._graphed is not None and tokens <= REPLAYED:
            kept = given.reading.all(self._text_attentions)
        if self._graphed is None or kept is None:
            return onward(self.layers, starts, given, disturb)
        made: tuple[Tensor, ...] = self._graphed(*starts, given.bends, given.rope, given.reading.bias, kept, disturb)
        return made

    def _replayed(
        self,
        x: Tensor,
        bends: Tensor,
        rope: Rope,
        bias: Tensor | None,
        kept: tuple[KeysValues, ...],
        disturb: Disturb | None,
    ) -> tuple[Tensor, ...]:
        """`onward`, with every tensor that it reads an argument."""
        reading = Reading(None, bias, dict(zip(self._text_attentions, kept, strict=True)))
        return onward(self.layers, [x], Given(reading, bends, rope), disturb)

    @property
    def _text_attentions(self) -> list[Attention]:
        return [cast(Layer, layer).text_attention for layer in self.layers]

    def _enter(
        self, tokens: Tensor, rope: Rope, text: Tensor | Reading, text_mask: Tensor | None, level: Tensor
    ) -> tuple[Tensor, Given, Tensor]:
        """What the first layer gets, and the embedded level (B, 1 or N, D), which the end reads again."""
        x = self.patch_in(tokens)
        embedded, bends = self._embed(level, x.dtype)
        reading = text if isinstance(text, Reading) else self.read(text, text_mask)
        return x, Given(reading, bends, rope), embedded

    def _leave(self, x: Tensor, embedded: Tensor) -> Tensor:
        # The last bend reads the embedding before its SiLU and its widening to six rows.
        shift, scale = (self.modulation + embedded[..., None, :]).unbind(-2)
        return self.patch_out(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))

    def _embed(self, level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """level (B, T) -> (B, T, D) and (B, T, 6, D). Tokens share few levels: each distinct one is embedded once."""
        if level.shape[1] == 1:  # nothing to look for, which a GPU would have to be waited for
            embedded = self.level_embedding(level[:, 0] * 1000, dtype)
            return embedded[:, None], self.level_bends(F.silu(embedded)).unflatten(-1, (6, -1))[:, None]
        distinct, where = level.unique(return_inverse=True)
        embedded = self.level_embedding(distinct * 1000, dtype)
        bends = self.level_bends(F.silu(embedded)).unflatten(-1, (6, -1))
        return embedded[where], bends[where]
