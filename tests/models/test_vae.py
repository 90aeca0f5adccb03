"""The video VAE in its three families against official and diffusers modules, whole and chunk by chunk."""

import json
import re
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.autoencoders.causal_video_autoencoder import patchify as official_patchify
from ltx_video.models.autoencoders.causal_video_autoencoder import unpatchify as official_unpatchify
from ltx_video.models.autoencoders.vae_encode import normalize_latents, un_normalize_latents
from ltx_video.utils.diffusers_config_mapping import OURS_VAE_CONFIG
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kadr.errors import CheckpointError
from kadr.models.vae import VAE, BlockConfig, VAEConfig
from kadr.models.vae import model as vae_module
from kadr.models.vae.blocks import patchify, unpatchify
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5
from kadr.nn.temporal_cache import TemporalCache
from tests.oracles import VAES, diffusers_vae, narrow_vae_config, official_vae, randn, relative_error
from tests.tiny_models import build_random

pytestmark = pytest.mark.usefixtures("no_gradients")

# Blocks that the official package has and no released VAE uses; smaller models may.
UNRELEASED = VAEConfig(
    encoder_blocks=(
        BlockConfig(kind="res_x", num_layers=1),
        BlockConfig(kind="compress_time"),
        BlockConfig(kind="res_x_y", multiplier=3),
        BlockConfig(kind="compress_space_res", multiplier=1),
        BlockConfig(kind="compress_time_res", multiplier=1),
        BlockConfig(kind="compress_space"),
        BlockConfig(kind="compress_all_res", multiplier=4),
        BlockConfig(kind="res_x", num_layers=1),
    ),
    decoder_blocks=(
        BlockConfig(kind="res_x", num_layers=1),
        BlockConfig(kind="compress_space"),
        BlockConfig(kind="res_x_y", multiplier=3),
        BlockConfig(kind="compress_time"),
        BlockConfig(kind="compress_all", multiplier=4, residual=True),
        BlockConfig(kind="res_x", num_layers=2, inject_noise=True),
        BlockConfig(kind="compress_all", multiplier=1),
    ),
    timestep_conditioning=True,
    encoder_base_channels=8,
    decoder_base_channels=8,
    latent_channels=6,
)


@dataclass(frozen=True)
class SharedWeightModels:
    """Our VAE and both oracles, with the same weights."""

    ours: VAE
    official: CausalVideoAutoencoder
    diffusers: AutoencoderKLLTXVideo


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=VAES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family: str) -> SharedWeightModels:
    ours = build_random(lambda: VAE(narrow_vae_config(VAES[family])))
    return SharedWeightModels(ours, official_vae(ours), diffusers_vae(ours, family))


@pytest.fixture(scope="module")
def vae(family: str) -> VAE:
    return build_random(lambda: VAE(narrow_vae_config(VAES[family], width=8, latent_channels=4)), seed=1)


def with_seed(function: Callable[[], Tensor], seed: int = 5) -> Tensor:
    """Calls a function with torch's global generator at `seed`, because the oracles draw from that generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function()


def random_pixels(*shape: int) -> Tensor:
    return randn(*shape, seed=2).tanh()


def bf16_noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def timesteps_of(vae: VAE, *timesteps: float) -> Tensor | None:
    return torch.tensor(timesteps) if vae.config.timestep_conditioning else None


def decode(vae: VAE, latents: Tensor, *timesteps: float) -> Tensor:
    return with_seed(lambda: vae.decode(latents, timestep=timesteps_of(vae, *timesteps), noise_source=torch.randn))


def official_decode(oracle: CausalVideoAutoencoder, latents: Tensor, timestep: Tensor | None) -> Tensor:
    raw = un_normalize_latents(latents, oracle, vae_per_channel_normalize=True)
    return with_seed(lambda: oracle.decode(raw, target_shape=raw.shape, timestep=timestep, return_dict=False)[0])


# Against the oracles


@pytest.mark.parametrize("batch, frames, height, width", [(2, 9, 64, 64), (1, 17, 64, 96), (1, 1, 32, 64)])
def test_moments_equal_official_and_diffusers(models, family, batch, frames, height, width, parity):
    pixels = random_pixels(batch, 3, frames, height, width)
    moments = models.ours.encode_moments(pixels)
    assert moments.mean.shape == (batch, 12, (frames - 1) // 8 + 1, height // 32, width // 32)
    for oracle in ("official", "diffusers"):
        expected = getattr(models, oracle).encode(pixels).latent_dist
        assert parity("VAE encode", family, oracle, relative_error(moments.mean, expected.mean)) <= 1e-5
        assert relative_error(moments.log_variance.clamp(-30, 20).expand_as(expected.logvar), expected.logvar) <= 1e-5


def test_encoded_latents_are_the_official_mean_normalised(models):
    pixels = random_pixels(1, 3, 9, 64, 96)
    expected = normalize_latents(models.official.encode(pixels).latent_dist.mode(), models.official, True)
    assert relative_error(models.ours.encode(pixels), expected) <= 1e-5


def test_sampled_latent_equals_official_on_the_same_noise(models):
    pixels = random_pixels(2, 3, 9, 32, 64)
    expected = with_seed(lambda: models.official.encode(pixels).latent_dist.sample())
    noise = with_seed(lambda: torch.randn(expected.shape))
    expected = normalize_latents(expected, models.official, True)
    assert relative_error(models.ours.encode(pixels, noise=noise), expected) <= 1e-5
    assert relative_error(models.ours.encode(pixels), expected) > 1e-2  # the noise has an effect


@pytest.mark.parametrize("timesteps", [(0.05, 0.3), (0.0, 1.0), (0.025, 0.025)], ids=str)
def test_pixels_at_two_timesteps_equal_official_and_diffusers(models, family, timesteps, parity):
    latents = randn(2, 12, 2, 2, 2)
    ours, timestep = decode(models.ours, latents, *timesteps), timesteps_of(models.ours, *timesteps)
    raw = models.ours.statistics.denormalise(latents)
    expected = {
        "official": official_decode(models.official, latents, timestep),
        "diffusers": with_seed(lambda: models.diffusers.decode(raw, timestep, return_dict=False)[0]),
    }
    assert ours.shape == (2, 3, 9, 64, 64)
    for oracle, theirs in expected.items():
        assert parity("VAE decode", family, oracle, relative_error(ours, theirs)) <= 1e-5


@pytest.mark.parametrize("frames, height, width", [(3, 2, 3), (1, 1, 1)])
def test_pixels_equal_official_at_every_shape(models, frames, height, width):
    latents = randn(1, 12, frames, height, width)
    expected = official_decode(models.official, latents, timesteps_of(models.ours, 0.05))
    assert relative_error(decode(models.ours, latents, 0.05), expected) <= 1e-5


def test_denormalise_equals_official_and_inverts_normalise(models):
    latents = randn(2, 12, 3, 2, 2)
    denormalised = models.ours.statistics.denormalise(latents)
    assert torch.equal(denormalised, un_normalize_latents(latents, models.official, vae_per_channel_normalize=True))
    assert relative_error(models.ours.statistics.normalise(denormalised), latents) <= 1e-6


def test_unreleased_blocks_equal_official():
    ours = build_random(lambda: VAE(UNRELEASED))
    official = official_vae(ours)
    pixels, latents = random_pixels(1, 3, 17, 64, 64), randn(1, 6, 3, 2, 2)
    assert relative_error(ours.encode_moments(pixels).mean, official.encode(pixels).latent_dist.mean) <= 1e-5
    expected = official_decode(official, latents, torch.tensor([0.05]))
    assert relative_error(decode(ours, latents, 0.05), expected) <= 1e-5


def test_vae_equals_official_at_activations_near_epsilon(models):
    faint = deepcopy(models.ours)
    for name, weight in faint.state_dict().items():
        if re.search(r"conv|blocks\.\d+\.(weight|bias)$", name):
            weight *= 1e-4
    official = official_vae(faint)
    pixels, latents = random_pixels(1, 3, 9, 64, 64), randn(1, 12, 2, 2, 2)
    assert relative_error(faint.encode_moments(pixels).mean, official.encode(pixels).latent_dist.mean) <= 1e-5
    expected = official_decode(official, latents, timesteps_of(faint, 0.05))
    assert relative_error(decode(faint, latents, 0.05), expected) <= 1e-5


def test_bf16_error_is_close_to_that_of_official(models):
    latents, pixels = randn(2, 12, 2, 2, 2), random_pixels(2, 3, 9, 64, 96)
    timestep = timesteps_of(models.ours, 0.05, 0.3)
    half = deepcopy(models.ours).to(torch.bfloat16)
    official = official_vae(half)

    def decode_both(vae: VAE) -> Tensor:
        return with_seed(
            lambda: vae.decode(latents.to(vae.statistics.mean), timestep=timestep, noise_source=bf16_noise)
        )

    ours = decode_both(half), half.encode_moments(pixels.bfloat16()).mean
    theirs = (
        official_decode(official, latents.bfloat16(), timestep),
        official.encode(pixels.bfloat16()).latent_dist.mean,
    )
    exact = decode_both(models.ours), models.ours.encode_moments(pixels).mean
    for our_output, official_output, fp32_output in zip(ours, theirs, exact, strict=True):
        assert our_output.dtype == torch.bfloat16
        assert relative_error(our_output, fp32_output) <= 1.3 * relative_error(official_output, fp32_output)


def test_decode_without_timestep_or_noise_source_is_refused():
    conditioned, injecting = (
        build_random(lambda c=c: VAE(narrow_vae_config(c, width=8))) for c in (VAE_0_9_5, VAE_0_9_1)
    )
    latents = randn(1, 12, 1, 1, 1)
    with pytest.raises(ValueError, match="timestep"):
        conditioned.decode(latents)
    with pytest.raises(ValueError, match="noise"):
        injecting.decode(latents, timestep=torch.tensor([0.05]))


# Patches


def test_patches_have_the_published_order():
    patched = patchify(torch.arange(192.0).view(1, 3, 1, 8, 8), 4)
    assert patched.shape == (1, 48, 1, 2, 2)
    assert patched[0, :6, 0, 0, 0].tolist() == [0, 8, 16, 24, 1, 9]
    assert patched[0, 16:19, 0, 0, 0].tolist() == [64, 72, 80]
    assert patched[0, :3, 0, 0, 1].tolist() == [4, 12, 20]


def test_patchify_equals_official_and_unpatchify_inverts_it():
    pixels = randn(2, 3, 5, 32, 64)
    for patch_size in (1, 2, 4, 8):
        patched = patchify(pixels, patch_size)
        assert torch.equal(patched, official_patchify(pixels, patch_size_hw=patch_size, patch_size_t=1))
        assert torch.equal(unpatchify(patched, patch_size), pixels)
        assert torch.equal(official_unpatchify(patched, patch_size_hw=patch_size, patch_size_t=1), pixels)


# Chunk by chunk


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 20])
def test_streamed_decode_equals_decode(vae, chunk):
    latents = randn(2, 4, 7, 1, 2)
    expected = decode(vae, latents, 0.05, 0.4)
    timestep = timesteps_of(vae, 0.05, 0.4)
    chunks = with_seed(
        lambda: torch.cat(
            [*vae.decode_stream(latents, timestep=timestep, noise_source=torch.randn, input_chunk_frames=chunk)], dim=2
        )
    )
    assert chunks.shape == expected.shape
    assert (chunks - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 25, 99])
def test_chunked_encode_equals_encode(vae, chunk):
    pixels = random_pixels(2, 3, 25, 32, 64)
    expected, chunks = vae.encode(pixels), vae.encode(pixels, chunk_frames=chunk)
    assert chunks.shape == expected.shape
    assert (chunks - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("sizes", [(9, 8, 8), (1, 24), (8, 8, 8, 1)], ids=str)
def test_streamed_encode_frees_each_chunk_before_the_next(vae, sizes):
    pixels, alive = random_pixels(1, 3, 25, 32, 64), weakref.WeakSet()

    def chunks():
        start = 0
        for size in sizes:
            assert not alive
            chunk = pixels[:, :, start : (start := start + size)].clone()
            alive.add(chunk)
            holder = [chunk]
            del chunk
            yield holder.pop()

    assert relative_error(vae.encode_stream(chunks(), 25), vae.encode(pixels)) <= 1e-5


@pytest.mark.parametrize("frames", [8, 10, 24])
def test_frame_counts_other_than_8k_plus_1_are_refused(vae, frames):
    with pytest.raises(ValueError, match=f"{frames} frames; the encoder takes 8k"):
        vae.encode(random_pixels(1, 3, frames, 32, 32))


def test_chunks_with_too_few_frames_are_refused(vae):
    with pytest.raises(ValueError, match="the chunks have 9 frames, not 17"):
        vae.encode_stream(iter([random_pixels(1, 3, 9, 32, 32)]), 17)


def test_image_is_encoded_like_the_first_frame_of_a_clip(vae):
    pixels = random_pixels(1, 3, 17, 64, 64)
    assert relative_error(vae.encode(pixels[:, :, :1]), vae.encode(pixels)[:, :, :1]) <= 1e-6


def test_latents_do_not_depend_on_later_frames(vae):
    pixels = random_pixels(1, 3, 17, 32, 32)
    other = torch.cat([pixels[:, :, :9], random_pixels(1, 3, 8, 32, 32)], dim=2)
    before, after = vae.encode(pixels), vae.encode(other)
    assert relative_error(after[:, :, :2], before[:, :, :2]) <= 1e-6
    assert relative_error(after[:, :, 2:], before[:, :, 2:]) > 1e-2


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])
def test_f_latent_frames_decode_to_8f_minus_7_frames(vae, frames):
    latents = randn(1, 4, frames, 1, 1)
    pixels = decode(vae, latents, 0.05)
    assert pixels.shape == (1, 3, 8 * (frames - 1) + 1, 32, 32)
    assert vae.encode(pixels).shape == latents.shape


def test_injected_noise_is_drawn_once_per_layer_with_any_chunks():
    vae = build_random(lambda: VAE(narrow_vae_config(VAE_0_9_1, width=8)))
    latents, timestep, shapes = randn(1, 12, 4, 1, 1), torch.tensor([0.05]), []

    def noise(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.zeros(shape)

    vae.decode(latents, timestep=timestep, noise_source=noise)
    shapes_at_once = list(shapes)
    shapes.clear()
    list(vae.decode_stream(latents, timestep=timestep, noise_source=noise))
    assert shapes_at_once == [(2, 2)] * 14 + [(4, 4)] * 12 + [(8, 8)] * 10
    assert shapes == shapes_at_once


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations have created; `peak` is their maximum.

    Counts neither tensors that existed before nor the workspace of operations.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.alive[reference.cdata] = (reference, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return outputs


def peak_bytes(vae: VAE, latents: Tensor, chunk: int | None) -> int:
    """Returns the peak bytes of a decode in chunks of `chunk` latent frames, or with None all at once."""
    timestep = timesteps_of(vae, 0.05)
    known = [latents, *vae.state_dict().values()] + ([] if timestep is None else [timestep])
    with LiveBytes(*known) as live:
        if chunk is None:
            vae.decode(latents, timestep=timestep, noise_source=torch.ones)
        else:
            for _ in vae.decode_stream(latents, timestep=timestep, noise_source=torch.ones, input_chunk_frames=chunk):
                pass
    return live.peak


def cached_storages(cache: TemporalCache) -> dict[int, int]:
    """Returns the bytes of every storage that a cache keeps alive, by address."""
    storages = [tensor.untyped_storage() for tensor in (*cache._frames.values(), *cache._noise_maps.values())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[TemporalCache]:
    """Records the caches that the VAE creates."""
    created: list[TemporalCache] = []

    class RecordedCache(TemporalCache):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            created.append(self)

    monkeypatch.setattr(vae_module, "TemporalCache", RecordedCache)
    return created


def cached_bytes_while_decoding(vae: VAE, frames: int, caches: list[TemporalCache]) -> list[int]:
    """Returns the bytes in the cache each time that pixels are ready."""
    latents, timestep = randn(1, 4, frames, 1, 1), timesteps_of(vae, 0.05)
    chunks = vae.decode_stream(latents, timestep=timestep, noise_source=torch.ones, input_chunk_frames=8)
    return [sum(cached_storages(caches[-1]).values()) for _ in chunks]


def test_decode_cache_does_not_grow_with_the_video(vae, caches):
    short, long = cached_bytes_while_decoding(vae, 48, caches), cached_bytes_while_decoding(vae, 72, caches)
    assert len(long) > len(short)
    assert max(long) == max(short)


def test_encode_cache_does_not_grow_with_the_video(vae, caches):
    cached_bytes = []
    for frames in (17, 65):
        vae.encode(random_pixels(1, 3, frames, 32, 32), chunk_frames=4)
        cached_bytes.append(sum(cached_storages(caches[-1]).values()))
    assert cached_bytes[0] == cached_bytes[1] > 0


def test_cache_stores_copies_and_no_views_of_chunks(vae, caches):
    list(
        vae.decode_stream(
            randn(1, 4, 40, 1, 1), timestep=timesteps_of(vae, 0.05), noise_source=torch.ones, input_chunk_frames=8
        )
    )
    vae.encode(random_pixels(1, 3, 17, 32, 32), chunk_frames=4)
    for cache in caches:
        tensors = [*cache._frames.values(), *cache._noise_maps.values()]
        assert sum(cached_storages(cache).values()) == sum(tensor.nbytes for tensor in tensors)


def test_peak_of_streamed_decode_does_not_grow_with_the_video(vae):
    short, long = (peak_bytes(vae, randn(1, 4, frames, 1, 1), chunk=8) for frames in (48, 72))
    assert long == short


def test_streamed_decode_of_121_frames_needs_a_third_of_the_memory(vae):
    latents = randn(1, 4, 16, 1, 1)  # 121 frames
    assert peak_bytes(vae, latents, chunk=1) <= peak_bytes(vae, latents, chunk=None) / 3


# The header


@pytest.mark.parametrize(
    "config",
    [*VAES.values(), UNRELEASED, *map(narrow_vae_config, VAES.values())],
    ids=[*VAES, "unreleased", *map(str, range(3))],
)
def test_header_round_trips_through_json(config):
    assert VAEConfig.from_header(json.loads(json.dumps(config.to_header()))) == config


# As in the released files: 0.9 from the official package, the others as ComfyUI has them for files without a header.
def released(encoder: list[Any], decoder: list[Any]) -> dict[str, Any]:
    return {name: value for name, value in OURS_VAE_CONFIG.items() if name != "blocks"} | {
        "encoder_blocks": encoder,
        "decoder_blocks": decoder,
        "timestep_conditioning": True,
    }


UP = ["compress_all", {"residual": True, "multiplier": 2}]
RELEASED: dict[str, dict[str, Any]] = {
    "0.9": OURS_VAE_CONFIG,
    "0.9.1": released(
        OURS_VAE_CONFIG["blocks"],
        [
            ["res_x", {"num_layers": 5, "inject_noise": True}], UP,
            ["res_x", {"num_layers": 6, "inject_noise": True}], UP,
            ["res_x", {"num_layers": 7, "inject_noise": True}], UP,
            ["res_x", {"num_layers": 8, "inject_noise": False}],
        ],
    ),
    "0.9.5": released(
        [
            ["res_x", {"num_layers": 4}], ["compress_space_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 6}], ["compress_time_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 6}], ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
        ],
        [
            ["res_x", {"num_layers": 5, "inject_noise": False}], UP,
            ["res_x", {"num_layers": 5, "inject_noise": False}], UP,
            ["res_x", {"num_layers": 5, "inject_noise": False}], UP,
            ["res_x", {"num_layers": 5, "inject_noise": False}],
        ],
    ),
}  # fmt: skip


def test_released_header_gives_the_config_of_its_family(family):
    assert VAEConfig.from_header(RELEASED[family]) == VAES[family]


HEADER = VAE_0_9_5.to_header()


@pytest.mark.parametrize(
    "key, value",
    [
        ("causal_decoder", True),
        ("norm_layer", "group_norm"),
        ("norm_layer", "layer_norm"),
        ("latent_log_var", "per_channel"),
        ("latent_log_var", "constant"),
        ("use_quant_conv", True),
        ("normalize_latent_channels", True),
        ("spatial_padding_mode", "reflect"),
        ("scaling_factor", 0.5),
        ("dims", 2),
        ("dims", [2, 1]),
        ("in_channels", 4),
        ("out_channels", 4),
        ("_class_name", "AutoencoderKLLTXVideo"),
        ("encoder_blocks", [["attn_res_x", {"num_layers": 1, "attention_head_dim": 8}], *HEADER["encoder_blocks"]]),
        ("decoder_blocks", [["attn_res_x", {"num_layers": 1, "attention_head_dim": 8}], *HEADER["decoder_blocks"]]),
        ("encoder_blocks", [["compress_all_x_y", {"multiplier": 2}], *HEADER["encoder_blocks"]]),
        ("decoder_blocks", [["compress_all_res", {"multiplier": 2}], *HEADER["decoder_blocks"]]),
        ("decoder_blocks", [["spiral", 2], *HEADER["decoder_blocks"]]),
    ],
    ids=str,
)
def test_unreleased_header_value_is_refused_by_value(key, value):
    named = value[0][0] if key.endswith("blocks") else value
    with pytest.raises(CheckpointError, match=re.escape(repr(named))):
        VAEConfig.from_header(HEADER | {key: value})


def test_unknown_block_setting_is_refused_by_name():
    blocks = [["res_x", {"num_layers": 2, "swirl": 1}], *HEADER["decoder_blocks"]]
    with pytest.raises(CheckpointError, match="swirl"):
        VAEConfig.from_header(HEADER | {"decoder_blocks": blocks})


@pytest.mark.parametrize("absent", ["latent_log_var", "norm_layer", "use_quant_conv"])
def test_header_without_a_required_key_is_refused(absent):
    with pytest.raises(CheckpointError, match=absent):
        VAEConfig.from_header({name: value for name, value in HEADER.items() if name != absent})


@pytest.mark.parametrize(
    "change, numbers",
    [
        ({"patch_size": 8}, "patches of 8 reduce time 8 and space 64"),
        ({"encoder_blocks": VAE_0_9.encoder_blocks[:7]}, "encoder_blocks .* time 4 and space 16"),
        ({"decoder_blocks": VAE_0_9_1.decoder_blocks[2:]}, "decoder_blocks .* time 4 and space 16"),
    ],
    ids=["patch", "encoder", "decoder"],
)
def test_vae_without_compression_8_and_32_is_refused_by_number(change, numbers):
    with pytest.raises(CheckpointError, match=numbers):
        replace(VAE_0_9_5, **change)
