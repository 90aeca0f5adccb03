"""The plan takes the best way that fits, says why, and says no with a number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kadr.errors import PlanError
from kadr.planning.plan import AS_STORED, CONVERTED, Placement, Plan, StageOptions, format_seconds, make_plan

MB = 10**6


def way(own: int, working: int = 0, *, mapped: int = 0, host: int = 0, why: str = "", **more: object) -> Placement:
    choice = Placement(
        dtype="bfloat16",
        private_bytes=own * MB,
        workspace_bytes=working * MB,
        mapped_bytes=mapped * MB,
        host_bytes=host * MB,
        reason=why,
        seconds=2.0,
    )
    return replace(choice, **more)


def needs(**stages: tuple[Placement, ...]) -> list[StageOptions]:
    return [
        StageOptions(stage=stage, component=f"{stage} part", placements=choices) for stage, choices in stages.items()
    ]


def planned(wanted: list[StageOptions], free: int, *, base: int = 0, host_free: int = 10_000) -> Plan:
    return make_plan(wanted, device="cpu", base_bytes=base * MB, free_bytes=free * MB, free_host_bytes=host_free * MB)


BIG, SMALL = way(900, 100), way(100, 100, why="blocks come and go", streamed=28, hold=AS_STORED)


def test_the_first_way_that_fits_is_taken() -> None:
    assert planned(needs(denoise=(BIG, SMALL)), 1000).stage("denoise").placement is BIG
    assert planned(needs(denoise=(BIG, SMALL)), 999).stage("denoise").placement is SMALL


def test_the_peak_is_that_of_the_worst_stage_and_of_what_was_there_before() -> None:
    plan = planned(needs(text=(way(300, 50),), denoise=(way(100, 700),), decode=(way(200, 100),)), 800, base=40)
    assert plan.peak_bytes == 840 * MB
    assert plan.seconds == 6.0


def test_parts_stay_where_all_of_them_fit_and_count_in_the_stages_after_them() -> None:
    three = needs(text=(way(300, 50),), denoise=(way(100, 700),), decode=(way(200, 100),))
    assert planned(three, 800).cached_components == {"denoise part"}
    roomy = planned(three, 1300)
    assert roomy.cached_components == {"text part", "denoise part", "decode part"}
    assert roomy.peak_bytes == 1100 * MB  # denoising, with the text encoder beside it; the decoder comes later
    assert planned(three, 1299).cached_components == {"text part", "denoise part"}


def test_pages_of_files_do_not_stay() -> None:
    two = needs(text=(way(0, 50, mapped=900),), denoise=(way(100, 100),))
    plan = planned(two, 1050)
    assert plan.cached_components == {"text part", "denoise part"}
    assert plan.peak_bytes == 950 * MB
    assert planned(two, 1049).cached_components == {"text part"}  # a second request would begin with 100 of the other's


def test_what_fits_nowhere_is_refused_with_the_shortfall_of_the_smallest_way() -> None:
    with pytest.raises(PlanError, match="denoise needs 200 MB on cpu at the least, and 150 MB are free: 50 MB") as said:
        planned(needs(text=(way(1),), denoise=(BIG, SMALL)), 150)
    assert said.value.shortfall == 50 * MB


def test_the_host_must_hold_what_waits_for_the_device() -> None:
    away = way(100, 100, host=5000)
    assert planned(needs(denoise=(BIG, away)), 500, host_free=5000).stage("denoise").placement is away
    with pytest.raises(
        PlanError, match=r"denoise needs 5\.0 GB on the host at the least, and 4\.8 GB are free"
    ) as said:
        planned(needs(denoise=(BIG, away)), 500, host_free=4800)
    assert said.value.shortfall == 200 * MB
    with pytest.raises(PlanError, match=r"denoise needs 1\.0 GB on cpu"):  # the way that lacks the least
        planned(needs(denoise=(BIG, away)), 500, host_free=4000)


def test_reasons_name_the_way_that_did_not_fit() -> None:
    plan = planned(needs(denoise=(BIG, SMALL)), 500)
    assert plan.reasons() == ["denoise: blocks come and go, because 1.0 GB do not fit into 500 MB"]
    assert planned(needs(denoise=(BIG, SMALL)), 1000).reasons() == []


def test_a_stage_that_ran_out_of_memory_goes_one_way_down_and_keeps_nothing() -> None:
    tiny = way(50, 20)
    plan = planned(needs(text=(way(10),), denoise=(BIG, SMALL, tiny)), 2000)
    lower = plan.with_fallback("denoise")
    assert lower is not None
    assert lower.stage("denoise").placement is SMALL
    assert lower.stage("text") == plan.stage("text")
    assert lower.cached_components == frozenset()
    lowest = lower.with_fallback("denoise")
    assert lowest is not None
    assert lowest.stage("denoise").placement is tiny
    assert lowest.with_fallback("denoise") is None


def test_a_way_that_takes_as_much_is_no_way_down() -> None:
    assert planned(needs(denoise=(SMALL, BIG)), 2000).with_fallback("denoise") is None


def test_passes_of_one_module_hold_it_in_one_way() -> None:
    first = StageOptions(stage="denoise", component="transformer", placements=(BIG, SMALL))
    second = StageOptions(
        stage="refine",
        component="transformer",
        placements=(replace(BIG, workspace_bytes=900 * MB), replace(SMALL, workspace_bytes=300 * MB)),
    )
    plan = planned([first, second], 1500)
    assert [stage.placement.streamed_blocks for stage in plan.stages] == [28, 28]
    assert planned([first, second], 1800).stage("denoise").placement is BIG


def test_a_plan_is_told_as_text_and_as_plain_data() -> None:
    plan = planned(needs(text=(way(300, 50),), denoise=(BIG, SMALL)), 500, base=20)
    text = str(plan)
    assert "as stored, computed in bfloat16, 28 blocks streamed" in text
    assert "peak 520 MB on cpu, where 520 MB can be had; about 4 s" in text
    told = plan.to_json()
    assert told["peak_bytes"] == plan.peak_bytes
    assert [stage["stage"] for stage in told["stages"]] == ["text", "denoise"]
    assert told["stages"][1]["streamed_blocks"] == 28
    assert told["stages"][0]["hold"] == CONVERTED


@pytest.mark.parametrize(
    "seconds, said", [(0.2, "a second"), (119, "119 s"), (150, "2 min"), (7000, "117 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_the_unit_people_use(seconds: float, said: str) -> None:
    assert format_seconds(seconds) == said
