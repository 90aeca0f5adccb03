"""The chunked 3D convolution against the official one, on a whole video and in chunks."""

from __future__ import annotations

import pytest
import torch
from ltx_video.models.autoencoders.causal_conv3d import CausalConv3d as OfficialCausalConv3d
from torch import Tensor

from kadr.nn.conv import CausalConv3d
from kadr.nn.temporal_cache import TemporalCache
from tests.oracles import randn, relative_error
from tests.tiny_models import build_random

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
