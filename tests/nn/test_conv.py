"""The chunked 3D convolution against the official one, on a whole video and in chunks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ltx_video.models.autoencoders.causal_conv3d import CausalConv3d as OfficialCausalConv3d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE
from kadr.nn.conv import CausalConv3d, Conv2d, Conv3d
from kadr.nn.temporal_cache import TemporalCache
from tests import tiny_models
from tests.oracles import randn, relative_error
from tests.tiny_models import build_random

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
STRIDES = [(1, 1, 1), (2, 2, 2), (2, 1, 1), (1, 2, 2)]


def build_pair(causal: bool, stride: tuple[int, int, int]) -> tuple[CausalConv3d, OfficialCausalConv3d]:
    ours = build_random(lambda: CausalConv3d(5, 7, causal=causal, stride=stride))
    with torch.device("meta"):
        official = OfficialCausalConv3d(5, 7, kernel_size=3, stride=stride)
    official.conv.load_state_dict(ours.state_dict(), assign=True)
    return ours, official


def convolve_in_chunks(conv: CausalConv3d, x: Tensor, lengths: list[int]) -> Tensor:
    cache, outputs = TemporalCache(), []
    chunks = x.split(lengths, dim=2)
    for index, chunk in enumerate(chunks):
        cache.is_last_chunk = index == len(chunks) - 1
        outputs.append(conv(chunk, cache))
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("frames", [1, 2, 9])
@torch.no_grad()
def test_conv_equals_official_causal_conv3d(causal, stride, frames):
    ours, official = build_pair(causal, stride)
    x = randn(2, 5, frames, 6, 8)
    assert relative_error(ours(x, TemporalCache.single_chunk()), official(x, causal=causal)) <= 1e-6


@pytest.mark.parametrize("causal, stride", [(True, stride) for stride in STRIDES] + [(False, (1, 1, 1))])
@pytest.mark.parametrize("lengths", [[1] * 9, [2, 2, 2, 3], [1, 8], [8, 1], [3, 0, 5, 1], [0, 4, 5]], ids=str)
@torch.no_grad()
def test_chunked_conv_equals_conv_of_whole_video(causal, stride, lengths):
    conv, _ = build_pair(causal, stride)
    x = randn(2, 5, 9, 6, 8)
    assert relative_error(convolve_in_chunks(conv, x, lengths), conv(x, TemporalCache.single_chunk())) <= 1e-6


@torch.no_grad()
def test_only_a_single_frame_video_needs_no_later_frame():
    conv, _ = build_pair(False, (1, 1, 1))
    x = randn(1, 5, 1, 4, 4)
    assert conv(x, TemporalCache.single_chunk()).shape == (1, 7, 1, 4, 4)
    assert conv(x, TemporalCache()).shape == (1, 7, 0, 4, 4)


@torch.no_grad()
def test_chunk_without_frames_has_the_output_shape():
    conv, _ = build_pair(True, (2, 2, 2))
    assert conv(randn(1, 5, 0, 7, 8), TemporalCache()).shape == (1, 7, 0, 4, 4)


@torch.no_grad()
def test_conv_caches_at_most_two_frames():
    for causal, stride in [(True, (1, 1, 1)), (True, (2, 2, 2)), (False, (1, 1, 1))]:
        conv, _ = build_pair(causal, stride)
        cache = TemporalCache()
        for chunk in randn(1, 5, 12, 4, 4).split([1, 4, 3, 4], dim=2):
            conv(chunk, cache)
            assert cache.get(conv).shape[2] <= 2


class RecordConvolutions(TorchDispatchMode):
    """Records of each convolution whether it may round to TF32; None where torch's flag of the process decides."""

    def __init__(self):
        super().__init__()
        self.may_use_tf32 = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in CONVOLUTIONS:
            self.may_use_tf32.append(None if function is CONVOLUTIONS[0] else args[12])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, expected", [(torch.float32, False), (torch.bfloat16, None)])
@torch.no_grad()
def test_no_convolution_of_float32_on_a_gpu_rounds_to_tf32(dtype, expected, monkeypatch):
    sizes = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1}
    configs = [UpscalerConfig(**sizes, spatial_upsample=space, temporal_upsample=not space) for space in (True, False)]
    upscalers = [build_random(partial(LatentUpscaler, config)).to(dtype) for config in configs]
    vae = build_random(lambda: VAE(tiny_models.vae_config("0.9.5"))).to(dtype)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with RecordConvolutions() as record:
        vae.encode(vae.decode(randn(1, tiny_models.CHANNELS, 2, 2, 2).to(dtype), timestep=torch.zeros(1)))
        for upscaler in upscalers:
            upscaler(randn(1, 4, 2, 4, 4).to(dtype))
    assert len(record.may_use_tf32) > 20
    assert set(record.may_use_tf32) == {expected}
    assert torch.backends.cudnn.allow_tf32  # of the process, which is not kadr's


@pytest.mark.parametrize("layer, shape", [(Conv2d, (2, 4, 7, 8)), (Conv3d, (2, 4, 3, 7, 8))])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}], ids=str
)
@torch.no_grad()
def test_the_explicit_convolution_computes_as_torchs(layer, shape, options, monkeypatch):
    conv, x = build_random(lambda: layer(4, 6, 3, **options)), randn(*shape)
    expected = conv(x)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert torch.equal(conv(x), expected)
