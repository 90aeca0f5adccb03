"""A stream carries frames from chunk to chunk: every way of cutting a video computes the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.nn.temporal_cache import TemporalCache, cat_frames
from tests.oracles import randn


def frames_of(count: int) -> Tensor:
    return randn(1, 2, count, 3, 3)


def test_single_chunk_cache_is_at_its_last_chunk():
    assert TemporalCache.single_chunk().is_last_chunk
    assert not TemporalCache().is_last_chunk


def test_store_reuses_memory_for_frames_of_equal_shape():
    stream = TemporalCache()
    stream.store("a", frames_of(2))
    place = stream.get("a").data_ptr()
    chunk = frames_of(2) + 1
    stream.store("a", chunk)
    assert stream.get("a").data_ptr() == place
    assert torch.equal(stream.get("a"), chunk)
    stream.store("a", chunk[:, :, :1])
    assert torch.equal(stream.get("a"), chunk[:, :, :1])


def test_cat_frames_has_the_memory_format_of_the_last_part():
    first, last = frames_of(1).expand(-1, -1, 2, -1, -1), frames_of(3)
    plain = torch.cat([first, last], dim=2)
    for order, channels_last in ((torch.contiguous_format, False), (torch.channels_last_3d, True)):
        joined = cat_frames(first, last.contiguous(memory_format=order))
        assert torch.equal(joined, plain)
        assert joined.movedim(1, -1).is_contiguous() == channels_last
        assert joined.is_contiguous() != channels_last


def test_get_is_none_before_the_first_store():
    assert TemporalCache().get("a") is None


def test_owners_do_not_share_frames():
    stream = TemporalCache()
    stream.store("a", frames_of(1))
    assert stream.get("b") is None


def test_store_copies_frames():
    stream, x = TemporalCache(), frames_of(6)
    stream.store("a", x[:, :, 4:])
    expected = x[:, :, 4:].clone()
    x.zero_()
    kept = stream.get("a")
    assert torch.equal(kept, expected)
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_last_chunk_is_not_stored():
    stream = TemporalCache.single_chunk()
    stream.store("a", frames_of(1))
    assert stream.get("a") is None


def test_prepend_puts_cached_frames_first():
    stream, x = TemporalCache(), frames_of(5)
    assert torch.equal(stream.prepend("a", x[:, :, :2]), x[:, :, :2])
    stream.store("a", x[:, :, :2])
    assert torch.equal(stream.prepend("a", x[:, :, 2:]), x)


@pytest.mark.parametrize("lengths, asked", [((3, 3, 2), (1, 3, 4)), ((1, 1, 6), (0, 0, 8)), ((4, 0, 4), (0, 3, 5))])
def test_delay_returns_every_frame_once_and_in_order(lengths, asked):
    stream, x = TemporalCache(), frames_of(8)
    parts = x.split(lengths, dim=2)
    returned = []
    for index, (part, count) in enumerate(zip(parts, asked, strict=True)):
        stream.is_last_chunk = index == len(parts) - 1
        returned.append(stream.delay("a", part, count))
        assert returned[-1].shape[2] == count
    assert torch.equal(torch.cat(returned, dim=2), x)


def test_is_first_is_true_once_per_owner():
    stream = TemporalCache()
    assert not stream.is_first("a", frames_of(3)[:, :, :0])  # no frame has come yet
    assert stream.is_first("a", frames_of(3))
    assert not stream.is_first("a", frames_of(3))
    assert stream.is_first("b", frames_of(1))


def test_is_first_stores_no_frames():
    stream = TemporalCache()
    stream.is_first("a", frames_of(3))
    assert sum(kept.untyped_storage().nbytes() for kept in stream._frames.values()) == 0


def test_noise_is_drawn_once_per_owner_in_the_dtype_of_like():
    shapes = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.randn(shape)

    stream, like = TemporalCache(noise_source=noise), torch.zeros(2, 4, 1, 3, 5, dtype=torch.float64)
    first = stream.get_noise("a", like)
    assert first.shape == (3, 5)
    assert first.dtype == torch.float64
    assert torch.equal(stream.get_noise("a", like), first)
    assert not torch.equal(stream.get_noise("b", like), first)
    assert shapes == [(3, 5), (3, 5)]


def test_noise_without_a_source_is_refused():
    with pytest.raises(ValueError, match="noise"):
        TemporalCache().get_noise("a", frames_of(1))
