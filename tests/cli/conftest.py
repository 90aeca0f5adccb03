"""Fixtures that run the command line in this process, on a fake engine that records its calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from kadr.cancellation import cancellable
from kadr.cli import run, series
from kadr.cli.main import main
from kadr.models.registry import Recipe
from kadr.pipeline.progress import Progress
from kadr.planning.placement import Placement
from kadr.planning.plan import Plan, StagePlan
from kadr.request.complete import complete_request
from kadr.request.request import Request
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import Size

RECIPE = Recipe(
    first_pass=Pass(steps=4, guidance=Guidance(cfg_scale=3.0)),
    second_pass=Pass(sigmas=(0.9, 0.5)),
    size=Size(64, 64),
    frames=9,
    fps=24.0,
)


class CommandResult(NamedTuple):
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


@dataclass
class FakeEngine:
    """An engine that records its calls, and writes a few bytes for a video."""

    model_name: str = "fake"
    open_calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)  # every request that was planned, including those written
    written_requests: list[Request] = field(default_factory=list)
    on_half_written: Callable[[], None] = lambda: None  # called while the video is half written
    latents: Any = None
    resume_flags: list[bool] = field(default_factory=list)
    preview_flags: list[bool] = field(default_factory=list)
    prompts_encoded_ahead: list[str] = field(default_factory=list)

    def open(self, model: str | Path, **options: Any) -> FakeEngine:
        self.open_calls.append((str(model), {name: value for name, value in options.items() if value is not None}))
        self.model_name = str(model)
        return self

    @property
    def spec(self) -> SimpleNamespace:
        """Name and recipe of the model."""
        return SimpleNamespace(name=self.model_name, recipe=RECIPE)

    def complete(self, request: Request) -> Request:
        """Returns the request with the recipe's defaults."""
        return complete_request(replace(request, input_video=None, denoise_strength=None), RECIPE)  # opens no file

    def resolve(self, request: Request) -> Request:
        return self.complete(request)

    def encode_prompts_ahead(self, engine: FakeEngine, series: Any, prompts: Sequence[str], **options: Any) -> None:
        self.prompts_encoded_ahead += prompts

    def plan(self, request: Request) -> Plan:
        self.requests.append(request)
        placement = Placement(dtype="bfloat16", private_bytes=10**9, seconds=60.0, reason="it is a fake")
        stage = StagePlan(stage="denoise", component="transformer", placement=placement)
        return Plan(device="cpu", base_bytes=0, free_bytes=2 * 10**9, stages=(stage,), is_calibrated=True)

    def write(
        self,
        request: Request,
        path: Path,
        *,
        watch: Callable[[Progress], None],
        on_plan: Callable[[Plan], None],
        resume: bool = False,
        preview: bool = False,
    ) -> SimpleNamespace:
        self.resume_flags.append(resume)
        self.preview_flags.append(preview)
        self.written_requests.append(request)
        on_plan(self.plan(request))
        resolved = self.complete(request)
        partial = path.with_name(".part.mp4")
        partial.write_bytes(b"half")
        with cancellable():
            try:
                for step in range(3):
                    watch(Progress("denoise", step, 2, eta=1.0))
                self.on_half_written()
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return SimpleNamespace(
            path=path,
            frames=resolved.frames,
            size=resolved.size,
            fps=resolved.fps,
            seconds=1.5,
            latents=self.latents,
            request=resolved,
            notices=(),
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """A fake engine in place of `Engine.open`, in an empty working directory."""
    fake = FakeEngine()
    monkeypatch.setattr(run, "open_engine", fake.open)
    monkeypatch.setattr(series, "encode_prompts_ahead", fake.encode_prompts_ahead)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def kadr(capfd: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """A function that runs `kadr` with the given arguments."""

    def run(*args: str | os.PathLike[str]) -> CommandResult:
        with pytest.raises(SystemExit) as exit_info:
            main([os.fspath(arg) for arg in args])
        out, err = capfd.readouterr()
        code = exit_info.value.code
        return CommandResult(0 if code is None else int(code), out, err)

    return run
