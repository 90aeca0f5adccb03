"""Plan and dry run as HTML: the table of `kadr plan` and that of `--dry-run`; foreign text is text."""

from __future__ import annotations

from kadr import Engine, Plan, Request
from kadr.planning.placement import Placement
from kadr.planning.plan import StagePlan
from tests.html_reader import HtmlReader

HOSTILE = "</td><script>alert('x')</script>\x1b[31m"
ESCAPED = HOSTILE.replace("\x1b", "\\x1b")


def test_plan_is_the_table_of_its_text_and_the_reasons() -> None:
    stage = StagePlan(stage="denoise", component="transformer", placement=Placement(dtype="bfloat16", reason=HOSTILE))
    plan = Plan(device="cpu", base_bytes=0, free_bytes=10**9, stages=(stage,), notes=(HOSTILE,))
    reader = HtmlReader.read(plan._repr_html_())
    assert reader.texts[:8] == ["stage", "component", "weights", "backend", "peak", "time", "denoise", "transformer"]
    assert reader.texts[-3:] == [plan.summary(), ESCAPED, f"denoise: {ESCAPED}"]
    cells = " ".join(reader.texts[:-3])
    assert cells.split() == " ".join(str(plan).splitlines()[:2]).split()


def test_dry_run_is_the_request_and_a_table_of_steps() -> None:
    dry_run = Engine.open("demo").dry_run(Request(HOSTILE, size=(64, 64), frames=9, steps=3))
    reader = HtmlReader.read(dry_run._repr_html_())
    assert [each.tag for each in reader.elements].count("table") == 2
    assert reader.texts[reader.texts.index("prompt") + 1] == ESCAPED
    steps = reader.texts[reader.texts.index("sigma") - 1 :]
    assert steps[:6] == ["step", "sigma", "guidance", "stg", "rescale", "blocks"]
    assert [steps[row] for row in (6, 12, 18)] == ["1", "2", "3"]
    assert steps[-1] == "6 model evaluations."
