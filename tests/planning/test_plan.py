"""The plan takes the best placement that fits, gives its reasons, and refuses with the shortfall in bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kadr.errors import PlanError
from kadr.planning.choose import make_plan
from kadr.planning.placement import AS_STORED, CONVERTED, Placement, StageOptions
from kadr.planning.plan import Plan, format_seconds

MB = 10**6


def placement(private: int, workspace: int = 0, *, mapped: int = 0, host: int = 0, **fields: Any) -> Placement:
    """A placement of so many MB."""
    return Placement(
        dtype="bfloat16",
        private_bytes=private * MB,
        workspace_bytes=workspace * MB,
        mapped_bytes=mapped * MB,
        host_bytes=host * MB,
        seconds=2.0,
        **fields,
    )


def stage_options(**placements: tuple[Placement, ...]) -> list[StageOptions]:
    return [
        StageOptions(stage=stage, component=f"{stage} component", placements=options)
        for stage, options in placements.items()
    ]


def plan_in(options: list[StageOptions], free: int, *, base: int = 0, host_free: int = 10_000) -> Plan:
    """The plan with so many MB free."""
    return make_plan(options, device="cpu", base_bytes=base * MB, free_bytes=free * MB, free_host_bytes=host_free * MB)


RESIDENT = placement(900, 100)
STREAMED = placement(100, 100, reason="transformer blocks are streamed", streamed_blocks=28, weight_format=AS_STORED)


def test_first_placement_that_fits_is_chosen() -> None:
    assert plan_in(stage_options(denoise=(RESIDENT, STREAMED)), 1000).stage("denoise").placement is RESIDENT
    assert plan_in(stage_options(denoise=(RESIDENT, STREAMED)), 999).stage("denoise").placement is STREAMED


def test_peak_is_base_bytes_plus_the_largest_stage() -> None:
    options = stage_options(text=(placement(300, 50),), denoise=(placement(100, 700),), decode=(placement(200, 100),))
    plan = plan_in(options, 800, base=40)
    assert plan.peak_bytes == 840 * MB
    assert plan.seconds == 6.0


def test_components_stay_cached_if_they_fit_and_count_in_later_stages() -> None:
    options = stage_options(text=(placement(300, 50),), denoise=(placement(100, 700),), decode=(placement(200, 100),))
    assert plan_in(options, 800).cached_components == {"denoise component"}
    roomy = plan_in(options, 1300)
    assert roomy.cached_components == {"text component", "denoise component", "decode component"}
    assert roomy.peak_bytes == 1100 * MB  # denoising, with the text encoder cached; the decoder comes later
    assert plan_in(options, 1299).cached_components == {"text component", "denoise component"}


def test_mapped_pages_do_not_count_for_cached_components() -> None:
    options = stage_options(text=(placement(0, 50, mapped=900),), denoise=(placement(100, 100),))
    plan = plan_in(options, 1050)
    assert plan.cached_components == {"text component", "denoise component"}
    assert plan.peak_bytes == 950 * MB
    # A second request would begin with 100 MB of the transformer.
    assert plan_in(options, 1049).cached_components == {"text component"}


def test_no_fit_is_refused_with_shortfall_of_smallest_placement() -> None:
    with pytest.raises(PlanError, match="denoise needs at least 200 MB on cpu, and 150 MB are free: 50 MB") as raised:
        plan_in(stage_options(text=(placement(1),), denoise=(RESIDENT, STREAMED)), 150)
    assert raised.value.shortfall == 50 * MB


def test_host_memory_must_fit_streamed_weights() -> None:
    streamed = placement(100, 100, host=5000)
    options = stage_options(denoise=(RESIDENT, streamed))
    assert plan_in(options, 500, host_free=5000).stage("denoise").placement is streamed
    with pytest.raises(PlanError, match=r"denoise needs at least 5\.0 GB on the host, and 4\.8 GB are free") as raised:
        plan_in(options, 500, host_free=4800)
    assert raised.value.shortfall == 200 * MB
    with pytest.raises(PlanError, match=r"denoise needs at least 1\.0 GB on cpu"):  # the one that lacks the least
        plan_in(options, 500, host_free=4000)


def test_reasons_give_bytes_of_placement_that_did_not_fit() -> None:
    plan = plan_in(stage_options(denoise=(RESIDENT, STREAMED)), 500)
    assert plan.reasons() == ["denoise: transformer blocks are streamed, because 1.0 GB do not fit into 500 MB"]
    assert plan_in(stage_options(denoise=(RESIDENT, STREAMED)), 1000).reasons() == []


def test_fallback_takes_next_smaller_placement_and_caches_nothing() -> None:
    smallest = placement(50, 20)
    plan = plan_in(stage_options(text=(placement(10),), denoise=(RESIDENT, STREAMED, smallest)), 2000)
    fallback = plan.with_fallback("denoise")
    assert fallback is not None
    assert fallback.stage("denoise").placement is STREAMED
    assert fallback.stage("text") == plan.stage("text")
    assert fallback.cached_components == frozenset()
    last = fallback.with_fallback("denoise")
    assert last is not None
    assert last.stage("denoise").placement is smallest
    assert last.with_fallback("denoise") is None


def test_placement_of_as_many_bytes_is_no_fallback() -> None:
    assert plan_in(stage_options(denoise=(STREAMED, RESIDENT)), 2000).with_fallback("denoise") is None


def test_both_passes_of_one_module_share_a_placement() -> None:
    first = StageOptions(stage="denoise", component="transformer", placements=(RESIDENT, STREAMED))
    second = StageOptions(
        stage="refine",
        component="transformer",
        placements=(replace(RESIDENT, workspace_bytes=900 * MB), replace(STREAMED, workspace_bytes=300 * MB)),
    )
    plan = plan_in([first, second], 1500)
    assert [stage.placement.streamed_blocks for stage in plan.stages] == [28, 28]
    assert plan_in([first, second], 1800).stage("denoise").placement is RESIDENT


def test_plan_converts_to_text_and_to_plain_data() -> None:
    plan = plan_in(stage_options(text=(placement(300, 50),), denoise=(RESIDENT, STREAMED)), 500, base=20)
    text = str(plan)
    assert text.split()[:6] == ["stage", "component", "weights", "backend", "peak", "time"]
    assert "as stored, computed in bfloat16, 28 blocks streamed" in text
    expected = "peak 520 MB on cpu, of 520 MB available; about 2 s to 10 s, uncalibrated: run `kadr plan --calibrate`"
    assert expected in text
    data = plan.to_json()
    assert data["peak_bytes"] == plan.peak_bytes
    assert [stage["stage"] for stage in data["stages"]] == ["text", "denoise"]
    assert data["stages"][1]["streamed_blocks"] == 28
    assert data["stages"][0]["weight_format"] == CONVERTED


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "1 s"), (119, "119 s"), (150, "2 min"), (7000, "117 min"), (9000, "2.5 h"), (950_000, "11 days")],
)
def test_seconds_are_formatted_in_the_usual_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_calibrated_plan_says_one_time_and_uncalibrated_a_range() -> None:
    plan = plan_in(stage_options(text=(placement(10),), denoise=(placement(10),)), 100)
    data = plan.to_json()
    assert (data["calibrated"], data["seconds"], data["seconds_range"]) == (False, 4.0, [1.6, 10.0])
    quick = plan_in(stage_options(text=(replace(placement(10), seconds=0.1),)), 100)
    assert quick.describe_time() == "about 1 s"  # rather than "about 1 s to 1 s"
    calibrated = replace(plan, is_calibrated=True, startup_seconds=3.0).with_startup()
    assert calibrated.summary().endswith("; about 7 s")
    data = calibrated.to_json()
    assert (data["calibrated"], data["seconds"], data["startup_seconds"]) == (True, 7.0, 3.0)
    least, most = calibrated.seconds_range
    assert most - least < plan.seconds_range[1] - plan.seconds_range[0] + 3


def test_loading_counts_once_for_a_cached_component() -> None:
    loading = placement(10, load_seconds=5.0)
    first, second = stage_options(denoise=(loading,), refine=(loading,))
    shared = [replace(first, component="transformer"), replace(second, component="transformer")]
    plan = plan_in(shared, 1000)
    assert [plan.stage_seconds(stage) for stage in plan.stages] == [7.0, 2.0]
    assert [stage["load_seconds"] for stage in plan.to_json()["stages"]] == [5.0, 0.0]
    assert replace(plan, loaded_components=frozenset({"transformer"})).seconds == 4.0
    assert replace(plan, cached_components=frozenset()).seconds == 14.0


def test_module_that_is_not_cached_is_loaded_for_every_window() -> None:
    plan = plan_in(stage_options(denoise=(placement(10, load_seconds=5.0, window_count=3),)), 1000)
    assert plan.seconds == 7.0
    assert replace(plan, cached_components=frozenset()).seconds == 17.0


def test_only_memory_that_the_process_did_not_have_before_takes_time() -> None:
    options = stage_options(
        text=(placement(300, 100),), denoise=(placement(100, 200),), decode=(placement(500, 100, mapped=900),)
    )
    plan = replace(plan_in(options, 2000), cached_components=frozenset(), seconds_per_new_byte=1 / MB)
    assert [plan.stage_load_seconds(stage) for stage in plan.stages] == [400, 0, 200]
    loaded = replace(plan, loaded_components=frozenset({"decode component"}))
    assert [loaded.stage_load_seconds(stage) for stage in loaded.stages] == [0, 0, 100]
