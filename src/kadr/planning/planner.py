"""Lists the stages of a request and chooses a placement for each, from headers, the request and free memory.

Which weights may be streamed is decided in `planning.options`: T5 in `options.text`, the transformer in
`options.denoise`, the chunks of the VAE decoder in `options.vae`. `planning.choose` then takes the first placement of
each stage that fits and raises `PlanError` if none does; a stage that runs out of memory in spite of its plan is
retried by `pipeline.retry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kadr.memory.device import free_bytes, resident_bytes
from kadr.planning.calibration.calibration import NEW_MEMORY, Calibration
from kadr.planning.choose import make_plan
from kadr.planning.options.context import StageContext
from kadr.planning.options.denoise import denoise_options, windowed_denoise_options
from kadr.planning.options.text import text_options
from kadr.planning.options.vae import decode_options, encode_options, upscale_options
from kadr.planning.placement import StageOptions
from kadr.planning.plan import Plan
from kadr.planning.workload import Workload
from kadr.spec.model import ModelSpec
from kadr.spec.offload import OFFLOAD_STAGES

RESERVED_FRACTION = 0.05  # of free memory, left to the system and to what cannot be foreseen
# Bytes that any process takes while it runs: kernels, their threads. Measured.
STARTUP_BYTES = 15_000_000


class Planner:
    """Plans one request.

    Args:
        spec: the model, known from headers.
        calibration: how fast the machine is.
        cached: private bytes of cached modules, free to the stage that reuses one.
        loaded: names of the components whose modules are cached.
        reclaimable: bytes of the device that another process frees before this request runs, such as a worker's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        workload: Workload,
        calibration: Calibration,
        *,
        cached: int = 0,
        loaded: frozenset[str] = frozenset(),
        reclaimable: int = 0,
    ) -> None:
        self.spec, self.workload, self.calibration = spec, workload, calibration
        self.cached, self.loaded, self.reclaimable = cached, loaded, reclaimable

    def plan(self) -> Plan:
        """Returns the plan.

        Raises:
            PlanError: a stage does not fit into free memory.
        """
        on_cpu = self.spec.device.type == "cpu"
        free = free_bytes(self.spec.device) + self.cached + self.reclaimable
        host = free if on_cpu else free_bytes(torch.device("cpu"))
        base = resident_bytes() - self.cached + STARTUP_BYTES if on_cpu else 0
        plan = make_plan(
            list(self.stage_options()),
            device=str(self.spec.device),
            base_bytes=base,
            free_bytes=int(free * (1 - RESERVED_FRACTION)),
            free_host_bytes=int(host * (1 - RESERVED_FRACTION)),
        )
        plan = replace(
            plan,
            loaded_components=self.loaded,
            is_calibrated=self.calibration.is_measured,
            startup_seconds=self.calibration.startup_seconds,
            seconds_per_new_byte=self.calibration.rate(NEW_MEMORY) if on_cpu else 0.0,
        )
        return replace(plan, cached_components=frozenset()) if self.spec.offload == OFFLOAD_STAGES else plan

    def stage_options(self) -> Iterator[StageOptions]:
        """Yields the stages in the order they run."""
        for options in self._all_stage_options():
            if not self.workload.stages or options.stage in self.workload.stages:
                yield options

    def _all_stage_options(self) -> Iterator[StageOptions]:
        context = StageContext(self.spec, self.workload, self.calibration)
        if self.workload.tokens_to_encode:
            yield text_options(context)
        if any(self.workload.encode_grids):
            yield encode_options(context)
        for pass_index, resolved_pass in enumerate(self.workload.passes):
            if pass_index:
                yield upscale_options(context)
            if self.workload.windows:
                yield windowed_denoise_options(context)
            else:
                yield denoise_options(context, pass_index, resolved_pass)
        yield decode_options(context)
