"""A series: each of several prompts with each of several seeds, as requests that differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from kadr.errors import RequestError
from kadr.request.request import MAX_SEED_BITS, Request
from kadr.validation import check_range

MAX_VARIATIONS = 1000


class SeriesItem(NamedTuple):
    """One video of a series. number: from 1."""

    number: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class RequestSeries:
    """Requests that differ in prompt and seed, ordered by prompt: the first with every seed, then the next.

    Args:
        template: the request of every video, but for prompt and seed; its seed is the first.
        prompts: at least one.
        variations: number of seeds for each prompt, 1 to 1000: seed, seed + 1, ...

    Raises:
        RequestError: the variations are too many, or the last seed is too large.
    """

    template: Request
    prompts: tuple[str, ...]
    variations: int = 1

    def __post_init__(self) -> None:
        check_range("variations", self.variations, 1, MAX_VARIATIONS, is_whole=True)
        if self._seeds[-1].bit_length() > MAX_SEED_BITS:
            raise RequestError(
                f"the seed of variation {self.variations} has {self._seeds[-1].bit_length()} bits; a seed has at most "
                f"{MAX_SEED_BITS}. Give a smaller --seed."
            )

    @property
    def _seeds(self) -> range:
        return range(self.template.seed, self.template.seed + self.variations)

    def __len__(self) -> int:
        return len(self.prompts) * self.variations

    def __iter__(self) -> Iterator[SeriesItem]:
        pairs = ((prompt, seed) for prompt in self.prompts for seed in self._seeds)
        for number, (prompt, seed) in enumerate(pairs, 1):
            yield SeriesItem(number, prompt, seed)

    def request(self, prompt: str, seed: int) -> Request:
        """Returns the request of one prompt and seed.

        Raises:
            RequestError: the prompt does not fit the template, such as an empty prompt of a window.
        """
        return replace(self.template, prompt=prompt, seed=seed)
