"""The temporal cache: what it stores, returns and copies from chunk to chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.nn.temporal_cache import TemporalCache, cat_frames
from tests.oracles import randn


def random_frames(count: int) -> Tensor:
    return randn(1, 2, count, 3, 3)


def test_single_chunk_cache_is_at_its_last_chunk():
    assert TemporalCache.single_chunk().is_last_chunk
    assert not TemporalCache().is_last_chunk


def test_store_reuses_memory_for_frames_of_equal_shape():
    cache = TemporalCache()
    cache.store("a", random_frames(2))
    address = cache.get("a").data_ptr()
    chunk = random_frames(2) + 1
    cache.store("a", chunk)
    assert cache.get("a").data_ptr() == address
    assert torch.equal(cache.get("a"), chunk)
    cache.store("a", chunk[:, :, :1])
    assert torch.equal(cache.get("a"), chunk[:, :, :1])


def test_cat_frames_has_the_memory_format_of_the_last_part():
    first, last = random_frames(1).expand(-1, -1, 2, -1, -1), random_frames(3)
    plain = torch.cat([first, last], dim=2)
    for order, channels_last in ((torch.contiguous_format, False), (torch.channels_last_3d, True)):
        joined = cat_frames(first, last.contiguous(memory_format=order))
        assert torch.equal(joined, plain)
        assert joined.movedim(1, -1).is_contiguous() == channels_last
        assert joined.is_contiguous() != channels_last


def test_get_is_none_before_the_first_store():
    assert TemporalCache().get("a") is None


def test_owners_do_not_share_frames():
    cache = TemporalCache()
    cache.store("a", random_frames(1))
    assert cache.get("b") is None


def test_store_copies_frames():
    cache, x = TemporalCache(), random_frames(6)
    cache.store("a", x[:, :, 4:])
    expected = x[:, :, 4:].clone()
    x.zero_()
    cached = cache.get("a")
    assert torch.equal(cached, expected)
    assert cached.untyped_storage().nbytes() == cached.nbytes


def test_last_chunk_is_not_stored():
    cache = TemporalCache.single_chunk()
    cache.store("a", random_frames(1))
    assert cache.get("a") is None


def test_prepend_puts_cached_frames_first():
    cache, x = TemporalCache(), random_frames(5)
    assert torch.equal(cache.prepend("a", x[:, :, :2]), x[:, :, :2])
    cache.store("a", x[:, :, :2])
    assert torch.equal(cache.prepend("a", x[:, :, 2:]), x)


@pytest.mark.parametrize("lengths, counts", [((3, 3, 2), (1, 3, 4)), ((1, 1, 6), (0, 0, 8)), ((4, 0, 4), (0, 3, 5))])
def test_delay_returns_every_frame_once_and_in_order(lengths, counts):
    cache, x = TemporalCache(), random_frames(8)
    parts = x.split(lengths, dim=2)
    returned = []
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        cache.is_last_chunk = index == len(parts) - 1
        returned.append(cache.delay("a", part, count))
        assert returned[-1].shape[2] == count
    assert torch.equal(torch.cat(returned, dim=2), x)


def test_is_first_is_true_once_per_owner():
    cache = TemporalCache()
    assert not cache.is_first("a", random_frames(3)[:, :, :0])  # no frame has come yet
    assert cache.is_first("a", random_frames(3))
    assert not cache.is_first("a", random_frames(3))
    assert cache.is_first("b", random_frames(1))


def test_is_first_stores_no_frames():
    cache = TemporalCache()
    cache.is_first("a", random_frames(3))
    assert sum(cached.untyped_storage().nbytes() for cached in cache._frames.values()) == 0


def test_noise_is_drawn_once_per_owner_in_the_dtype_of_like():
    shapes = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.randn(shape)

    cache, like = TemporalCache(noise_source=noise), torch.zeros(2, 4, 1, 3, 5, dtype=torch.float64)
    first = cache.get_noise("a", like)
    assert first.shape == (3, 5)
    assert first.dtype == torch.float64
    assert torch.equal(cache.get_noise("a", like), first)
    assert not torch.equal(cache.get_noise("b", like), first)
    assert shapes == [(3, 5), (3, 5)]


def test_noise_without_a_source_is_refused():
    with pytest.raises(ValueError, match="noise"):
        TemporalCache().get_noise("a", random_frames(1))
