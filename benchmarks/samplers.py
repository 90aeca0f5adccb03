"""Measures how near samplers come to the flow ODE: `python -m benchmarks.samplers`. Writes docs/guides/samplers.md.

The demo's own guidance, the same captions and noise. The reference is 200 Euler steps of the demo's own schedule; a
sampler gets as many steps as fit into a number of evaluations, of that schedule and of a shifted one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from kadr import Engine, Request
from kadr.sampling.samplers import EULER_STOCHASTIC, SAMPLERS
from kadr.sampling.schedules import Schedule
from tests import doc_tables
from train.scenes import held_out_captions

PAGE = doc_tables.DOCS / "guides" / "samplers.md"
TABLE = "sampler errors"
SEED = 77
REFERENCE_STEPS = 200
EVALUATIONS = (4, 8, 16, 32)
SAMPLER_NAMES = tuple(name for name in SAMPLERS if name != EULER_STOCHASTIC)  # which does not follow the flow ODE
OWN, SHIFTED = "own", "shifted"
SCHEDULES: Mapping[str, Schedule] = {
    OWN: Schedule(sampler="LinearQuadratic"),
    SHIFTED: Schedule(shifting="SD3", shift_terminal=0.1),
}
TOKENS = 1024  # that the shifted schedule is for: more than the demo's 64, so that it shifts further

Errors = Mapping[tuple[str, str], Mapping[int, Sequence[float]]]  # (schedule, sampler) -> evaluations -> by video


def relative_error(latents: Tensor, reference: Tensor) -> float:
    """Returns the L2 norm of the difference, relative to that of the reference."""
    return float((latents - reference).norm() / reference.norm())


def fit_steps(sampler: str, evaluations: int) -> tuple[int, int]:
    """Returns the most steps of a sampler that take at most `evaluations`, and the evaluations that they take."""
    per_step, last_step = (len(SAMPLERS[sampler].evaluation_sigmas(1.0, following)) for following in (0.5, 0.0))
    steps = 1 + (evaluations - last_step) // per_step
    return steps, (steps - 1) * per_step + last_step


def measure_errors(
    videos: int, schedules: Sequence[str] = tuple(SCHEDULES), evaluations: Sequence[int] = EVALUATIONS
) -> Errors:
    """Measures the errors of all samplers on the latents of the first `videos` captions."""
    engine = Engine.open("demo", device="cpu", dtype="float32")
    errors: dict[tuple[str, str], dict[int, list[float]]] = {
        (schedule, name): {count: [] for count in evaluations} for schedule in schedules for name in SAMPLER_NAMES
    }
    for seed, (caption, _) in enumerate(held_out_captions(videos, SEED)):
        reference = engine.denoise(Request(prompt=caption, seed=seed, steps=REFERENCE_STEPS))
        for (schedule, name), by_count in errors.items():
            for count, values in by_count.items():
                sigmas = SCHEDULES[schedule].get_sigmas(fit_steps(name, count)[0], tokens=TOKENS).tolist()
                request = Request(prompt=caption, seed=seed, sigmas=tuple(sigmas), sampler=name)
                values.append(relative_error(engine.denoise(request), reference))
    return errors


def table_rows(errors: Errors) -> Iterator[Sequence[str]]:
    for count in EVALUATIONS:
        steps = (f"{steps} ({total})" for steps, total in (fit_steps(name, count) for name in SAMPLER_NAMES))
        yield str(count), *steps, *(f"{np.mean(by_count[count]):.3f}" for by_count in errors.values())


def format_table(errors: Errors) -> str:
    """Formats the table of the page: steps of each sampler, and its mean error on each schedule."""
    steps = (f"steps of `{name}`" for name in SAMPLER_NAMES)
    columns = (f"`{name}`, {schedule} schedule" for schedule, name in errors)
    return doc_tables.markdown_table(("evaluations, at most", *steps, *columns), table_rows(errors))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--videos", type=int, default=4)
    table = format_table(measure_errors(parser.parse_args().videos))
    doc_tables.write_table(PAGE, TABLE, table)
    print(table)


if __name__ == "__main__":
    main()
