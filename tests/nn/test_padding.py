"""Where a batch ends without the padding behind its longest text."""

import pytest
import torch

from kadr.nn.padding import unpadded_length


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([[1, 1, 1]], 3),
        ([[1, 0, 0]], 1),
        ([[1, 0, 0, 0], [1, 1, 1, 0]], 3),
        ([[0, 1, 0, 1, 0]], 4),
        ([[1, 0, 0], [0, 0, 0]], 3),
        ([[0, 0]], 2),
    ],
    ids=[
        "no padding",
        "padded",
        "longest counts",
        "gap and start",
        "one sample all padding",
        "only sample all padding",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_length_ends_at_the_last_real_token_of_the_longest_text(rows, expected, dtype):
    assert unpadded_length(torch.tensor(rows, dtype=dtype)) == expected
