"""Guidance and passes as data: lists by sigma, defaults, and invalid values."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from kadr.errors import RequestError
from kadr.models.registry import RELEASES_BY_NAME
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass, StepGuidance

DEV = RELEASES_BY_NAME["ltxv-13b-0.9.8-dev"].recipe
LINEAR_QUADRATIC = Schedule(sampler="LinearQuadratic")
# Step by step, as the official package resolves the lists of its config: see docs/parity.md.
RESOLVED = (
    (1, (1, 0, 1, ())),
    (2, (1, 0, 1, (11, 25, 35, 39))),
    (2, (6, 4, 0.5, (22, 35, 39))),
    (5, (8, 4, 0.5, (28,))),
    (4, (6, 4, 1, (28,))),
    (5, (1, 2, 1, (28,))),
    (8, (1, 1, 1, (28,))),
)


def test_guidance_of_13b_dev_first_pass_is_resolved_as_officially() -> None:
    sigmas = LINEAR_QUADRATIC.get_sigmas(30, tokens=5600, skip_final=3).tolist()
    expected = [StepGuidance(*values) for count, values in RESOLVED for _ in range(count)]
    assert [DEV.first_pass.guidance.at_sigma(sigma) for sigma in sigmas] == expected


def test_guidance_of_13b_dev_second_pass_is_resolved_as_officially() -> None:
    assert DEV.second_pass is not None
    sigmas = LINEAR_QUADRATIC.get_sigmas(30, tokens=22400, skip_initial=17).tolist()
    assert len(sigmas) == 13
    assert {DEV.second_pass.guidance.at_sigma(sigma) for sigma in sigmas} == {StepGuidance(1, 1, 1, (27,))}


def test_a_step_takes_the_first_entry_at_or_below_its_sigma_else_the_last() -> None:
    guidance = Guidance(cfg_scale=(2.0, 3.0, 4.0), sigmas=(1.0, 0.5, 0.25))
    scales = {sigma: guidance.at_sigma(sigma).cfg_scale for sigma in (1.0, 0.9, 0.5, 0.3, 0.25, 0.1)}
    assert scales == {1.0: 2.0, 0.9: 3.0, 0.5: 3.0, 0.3: 4.0, 0.25: 4.0, 0.1: 4.0}


def test_sigmas_are_compared_as_float32() -> None:
    almost = 0.1 + 1e-10  # the same float32 as 0.1
    assert Guidance(cfg_scale=(2.0, 3.0), sigmas=(almost, 0.0)).at_sigma(0.1).cfg_scale == 2.0


def test_unset_guidance_comes_from_the_defaults_and_else_is_off() -> None:
    merged = Guidance(cfg_scale=5.0).with_defaults(
        Guidance(cfg_scale=(1.0, 2.0), stg_scale=(0.0, 1.0), sigmas=(1.0, 0.5), skip_blocks=(3,))
    )
    assert merged.at_sigma(0.5) == StepGuidance(5.0, 1.0, 1.0, (3,))
    assert Guidance().at_sigma(0.5) == StepGuidance(1.0, 0.0, 1.0, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cfg_scale": 0.5}, "guidance is 0.5; it must lie between 1 and 100; 1 is off"),
        ({"cfg_scale": float("nan")}, "guidance is nan"),
        ({"cfg_scale": ()}, "guidance is an empty list"),
        ({"cfg_scale": (1.0, "3")}, "guidance is '3'"),
        ({"stg_scale": -1}, "stg is -1"),
        ({"rescale": 1.5}, "rescale is 1.5"),
        ({"skip_blocks": (1, -2)}, "skipped blocks"),
        ({"skip_blocks": ((1,), 2)}, "skipped blocks"),
        ({"skip_blocks": 7}, "skipped blocks"),
        ({"stg_mode": "residual"}, "In these models it changes nothing"),
        ({"stg_mode": "attention"}, "must be one of attention_values, attention_skip, transformer_block"),
        ({"sigmas": (0.5, 1.0)}, "must decrease"),
        ({"cfg_star": 1}, "true or false"),
    ],
)
def test_invalid_guidance_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match="(?i)" + message.replace("(", r"\(")):
        Guidance(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cfg_scale": (1.0, 2.0)}, "guidance has 2 values, and no sigmas"),
        ({"stg_scale": (1.0, 2.0), "sigmas": (1.0,)}, "stg has 2 values for 1 sigmas"),
        ({"skip_blocks": ((1,), (2,)), "sigmas": (1.0, 0.5, 0.1)}, "the skipped blocks has 2 values for 3 sigmas"),
    ],
)
def test_lists_that_do_not_fit_their_sigmas_are_refused_on_use(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Guidance(**values).at_sigma(0.5)


def test_a_pass_takes_its_timing_from_the_defaults_as_a_whole() -> None:
    distilled = Pass(sigmas=(1.0, 0.7, 0.4), sampler="euler", tone_map=0.6)
    assert Pass().with_defaults(distilled) == distilled
    assert Pass(steps=5).with_defaults(distilled).sigmas is None
    assert Pass(skip_final=1).with_defaults(distilled) == Pass(steps=3, skip_final=1, sampler="euler", tone_map=0.6)
    assert Pass(sigmas=(0.9,)).with_defaults(Pass(steps=8, skip_initial=2)) == Pass(sigmas=(0.9,))


@pytest.mark.parametrize("name", ["ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.8-distilled"])
def test_a_pass_survives_json(name: str) -> None:
    second = RELEASES_BY_NAME[name].recipe.second_pass
    assert second is not None
    assert Pass.from_json(json.loads(json.dumps(asdict(second)))) == second


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"steps": 2.5}, {"tone_map": 2}, {"sigmas": (1.0,), "skip_final": 1}, {"guidance": 3.0}]
)
def test_an_invalid_pass_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Pass(**values)
