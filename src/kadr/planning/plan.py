"""The plan of a request: one placement per stage, the peak in bytes, the time, and the reasons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kadr.notebook.html import lines, table
from kadr.planning.placement import Placement, describe_weights

# The seconds that a request takes lie between these multiples of the estimate, by whether the machine was measured.
TIME_FACTORS = {True: (0.75, 1.35), False: (0.4, 2.5)}
_HEAD = ("stage", "component", "weights", "backend", "peak", "time")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage with the placement chosen for it.

    Args:
        component: name of its module in the `ModuleCache`.
        fallbacks: placements after the chosen one, for a stage that runs out of memory in spite of the plan.
        rejected_placement: the best placement, where it did not fit and another one was chosen.
    """

    stage: str
    component: str
    placement: Placement
    fallbacks: tuple[Placement, ...] = ()
    rejected_placement: Placement | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placements of all stages of a request, with memory and time.

    Args:
        device: such as "cpu" or "cuda:0".
        base_bytes: bytes that the process takes without the request.
        free_bytes: bytes on the device that the request may take.
        stages: in the order they run.
        cached_components: components that stay in memory for the next request.
        loaded_components: components that are in memory before it.
        is_calibrated: times come from measurements of this machine; else from assumptions.
        startup_seconds: time that a program takes before the request.
        counts_startup: that time counts, as for a command.
        seconds_per_new_byte: time of a byte of memory that the process did not have before.
        to_fetch: names of the components that are not on disk, and the bytes of each; None where they are not known.
        release: name of the model's release, whose recipe fills in what the request leaves out; None if unreleased.
        notes: what the plan had to assume.
        attention: what computes self-attention; "" where no transformer runs.
    """

    device: str
    base_bytes: int
    free_bytes: int
    stages: tuple[StagePlan, ...]
    cached_components: frozenset[str] = frozenset()
    loaded_components: frozenset[str] = frozenset()
    is_calibrated: bool = False
    startup_seconds: float = 0.0
    counts_startup: bool = False
    seconds_per_new_byte: float = 0.0
    to_fetch: tuple[tuple[str, int | None], ...] = ()
    release: str | None = None
    notes: tuple[str, ...] = ()
    attention: str = ""

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes of the components that are not on disk."""
        return sum(size or 0 for _, size in self.to_fetch)

    @property
    def peak_bytes(self) -> int:
        """Peak of the whole process on a CPU; of the device's memory otherwise."""
        return self.base_bytes + max((self.stage_bytes(stage) for stage in self.stages), default=0)

    @property
    def seconds(self) -> float:
        """Estimated time of all stages, and of starting the program where that counts. Downloads do not."""
        return self.startup_seconds * self.counts_startup + sum(map(self.stage_seconds, self.stages))

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Least and most seconds that a request of this estimate takes; see `TIME_FACTORS`."""
        below, above = TIME_FACTORS[self.is_calibrated]
        return self.seconds * below, self.seconds * above

    def stage_seconds(self, stage: StagePlan) -> float:
        """Returns a stage's estimated time; its module is loaded unless it is cached, for each window if need be."""
        return stage.placement.seconds + self.stage_load_seconds(stage)

    def stage_load_seconds(self, stage: StagePlan) -> float:
        """Returns the part of a stage's time that loads its module and takes memory from the system."""
        new_memory_seconds = self._new_bytes(stage) * self.seconds_per_new_byte
        is_kept = stage.component in self.cached_components
        earlier = self.loaded_components | {item.component for item in self.stages[: self.stages.index(stage)]}
        if is_kept and stage.component in earlier:
            return new_memory_seconds
        num_loads = 1 if is_kept else max(1, stage.placement.window_count)
        return stage.placement.load_seconds * num_loads + new_memory_seconds

    def _new_bytes(self, stage: StagePlan) -> int:
        """Returns the bytes, besides pages of files, by which a stage takes more memory than anything before it."""
        loaded = self.loaded_components.intersection(item.component for item in self.stages)
        before = [sum(cached_component_bytes(self.stages, name) for name in loaded)]
        before += map(self._anonymous_bytes, self.stages[: self.stages.index(stage)])
        return max(0, self._anonymous_bytes(stage) - max(before))

    def _anonymous_bytes(self, stage: StagePlan) -> int:
        return self.stage_bytes(stage) - stage.placement.mapped_bytes

    def stage_bytes(self, stage: StagePlan) -> int:
        """Returns a stage's peak in bytes, with the components that earlier stages left in memory."""
        earlier = self.stages[: self.stages.index(stage)]
        return stage.placement.device_bytes + _cached_bytes(earlier, stage.component, self.cached_components)

    def stage(self, name: str) -> StagePlan:
        """Returns the plan of the stage of that name.

        Raises:
            KeyError: the plan has no such stage.
        """
        for stage in self.stages:
            if stage.stage == name:
                return stage
        raise KeyError(f"the plan has no stage {name}, only {', '.join(stage.stage for stage in self.stages)}")

    def with_startup(self) -> Plan:
        """Returns the plan of a command, whose time begins with the start of its process."""
        return replace(self, counts_startup=True)

    def with_fallback(self, stage: str) -> Plan | None:
        """Returns the plan with the next placement of a stage that takes fewer bytes and with no cached components.

        None if no placement takes fewer bytes. `pipeline.retry` calls this when a stage runs out of memory.
        """
        current = self.stage(stage)
        smaller = [option for option in current.fallbacks if option.device_bytes < current.placement.device_bytes]
        if not smaller:
            return None
        rest = current.fallbacks[current.fallbacks.index(smaller[0]) + 1 :]
        changed = replace(current, placement=smaller[0], fallbacks=rest, rejected_placement=current.placement)
        stages = tuple(changed if planned is current else planned for planned in self.stages)
        return replace(self, stages=stages, cached_components=frozenset())

    def reasons(self) -> list[str]:
        """Returns lines: what is to be fetched, what was assumed, and why stages lack their default placement."""
        lines = [f"release: {self.release}", *self.notes] if self.release else [*self.notes]
        if self.to_fetch:
            names = ", ".join(name if size else f"{name} (of unknown size)" for name, size in self.to_fetch)
            lines.insert(0, f"fetch: {format_bytes(self.bytes_to_fetch)} are not on disk: {names}")
        for stage in self.stages:
            reason, rejected = stage.placement.reason, stage.rejected_placement
            if rejected is not None and rejected.device_bytes > stage.placement.device_bytes:
                needed = format_bytes(rejected.device_bytes)
                shortage = f"{needed} do not fit into {format_bytes(self.free_bytes)}"
                reason = f"{reason}, because {shortage}" if reason else shortage
            if reason:
                lines.append(f"{stage.stage}: {reason}")
            if stage.placement.window_count:
                lines.append(f"{stage.stage}: {stage.placement.window_count} windows, one after the other")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data, as `kadr plan --json` prints it."""
        return {
            "release": self.release,
            "device": self.device,
            "free_bytes": self.free_bytes,
            "base_bytes": self.base_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "seconds_range": [round(bound, 1) for bound in self.seconds_range],
            "calibrated": self.is_calibrated,
            "startup_seconds": round(self.startup_seconds, 1),
            "cached_components": sorted(self.cached_components),
            "bytes_to_fetch": self.bytes_to_fetch,
            "reasons": self.reasons(),
            "attention": self.attention,
            "stages": [
                {
                    "stage": stage.stage,
                    "component": stage.component,
                    "dtype": stage.placement.dtype,
                    "weight_format": stage.placement.weight_format,
                    "backend": stage.placement.backend,
                    "streamed_blocks": stage.placement.streamed_blocks,
                    "window_count": stage.placement.window_count,
                    "weight_bytes": stage.placement.mapped_bytes + stage.placement.private_bytes,
                    "workspace_bytes": stage.placement.workspace_bytes,
                    "host_bytes": stage.placement.host_bytes,
                    "peak_bytes": self.base_bytes + self.stage_bytes(stage),
                    "seconds": round(self.stage_seconds(stage), 1),
                    "load_seconds": round(self.stage_load_seconds(stage), 1),
                }
                for stage in self.stages
            ],
        }

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yields the cells of each stage, under `_HEAD`."""
        for stage in self.stages:
            placement, peak = stage.placement, format_bytes(self.base_bytes + self.stage_bytes(stage))
            cells = describe_weights(placement), placement.backend, peak, format_seconds(self.stage_seconds(stage))
            yield stage.stage, stage.component, *cells

    def _repr_html_(self) -> str:
        return table(self._rows(), head=_HEAD) + lines(self._footer())

    def _footer(self) -> list[str]:
        return [self.summary(), *self.reasons(), *([self.attention] if self.attention else [])]

    def __str__(self) -> str:
        rows = [_HEAD, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        aligned = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*aligned, *self._footer()])

    def summary(self) -> str:
        """Returns peak, available memory and time in one line."""
        peak, available = format_bytes(self.peak_bytes), format_bytes(self.base_bytes + self.free_bytes)
        uncalibrated = "" if self.is_calibrated else ", uncalibrated: run `kadr plan --calibrate`"
        return f"peak {peak} on {self.device}, of {available} available; {self.describe_time()}{uncalibrated}"

    def describe_time(self) -> str:
        """Returns the time in words; on a machine that was not measured, from least to most."""
        if self.is_calibrated:
            return f"about {format_seconds(self.seconds)}"
        least, most = map(format_seconds, self.seconds_range)
        return f"about {most}" if least == most else f"about {least} to {most}"


def _cached_bytes(earlier_stages: Sequence[StagePlan], component: str, cached_components: frozenset[str]) -> int:
    """Returns the bytes of cached components that earlier stages left in memory, without `component` itself."""
    remaining = {stage.component for stage in earlier_stages} & cached_components - {component}
    return sum(cached_component_bytes(earlier_stages, name) for name in remaining)


def cached_component_bytes(stages: Sequence[StagePlan], component: str) -> int:
    """Returns the bytes that a cached component keeps in memory: private ones, as pages of files are released."""
    return max(stage.placement.private_bytes for stage in stages if stage.component == component)


def format_seconds(seconds: float) -> str:
    """Formats a duration in the unit that people use."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def format_bytes(size: int) -> str:
    """Formats bytes as MB or GB."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB"
