"""A request to plan on a device, and how a placement is made of an option's bytes and work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kadr.planning import backends
from kadr.planning.calibration.calibration import Calibration
from kadr.planning.costs.weight_bytes import WeightBytes
from kadr.planning.placement import Placement
from kadr.planning.workload import Workload
from kadr.spec.model import ModelSpec

HEAP_FRAGMENTATION = 0.35  # of a stage's workspace: free memory that the host's heap keeps between blocks. Measured.


@dataclass(frozen=True)
class WeightOption:
    """A weight format of a component and why it is offered; see `Placement`.

    Args:
        is_streamed: its blocks are streamed.
        is_pinned: they wait in pinned memory.
    """

    weight_format: str
    is_streamed: bool = False
    is_pinned: bool = False
    reason: str = ""


@dataclass(frozen=True)
class StageContext:
    """A model, the work that it is to do, and how fast the machine is."""

    spec: ModelSpec
    workload: Workload
    calibration: Calibration

    @property
    def device(self) -> torch.device:
        """Device that the stages run on."""
        return self.spec.device

    @property
    def dtype(self) -> torch.dtype:
        """Default dtype of the computation."""
        return self.spec.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number in it."""
        return self.spec.dtype.itemsize

    @property
    def on_cpu(self) -> bool:
        """True where the host's memory is the device's."""
        return self.spec.device.type == "cpu"

    def placement(
        self,
        option: WeightOption,
        weights: WeightBytes,
        workspace_bytes: int,
        backend: str = backends.TORCH,
        *,
        seconds: float,
        load_seconds: float,
        buffer_bytes: int = 0,
    ) -> Placement:
        """Returns a placement with the bytes and the time of an option; other arguments as for `Placement`.

        Args:
            workspace_bytes: of the module's tensors, between which the heap keeps free memory.
            buffer_bytes: workspace that lies outside of the heap, or is taken once.
        """
        placement = Placement(
            dtype=str(self.dtype).removeprefix("torch."),
            weight_format=option.weight_format,
            mapped_bytes=weights.mapped,
            private_bytes=weights.private,
            workspace_bytes=workspace_bytes
            + int(HEAP_FRAGMENTATION * workspace_bytes * self.on_cpu)
            + buffer_bytes
            + weights.scratch,
            seconds=seconds,
            load_seconds=load_seconds,
            backend=backend,
            reason=option.reason,
        )
        if not self.on_cpu:
            placement = replace(placement, mapped_bytes=0, private_bytes=weights.mapped + weights.private)
        return self._stream_blocks(placement, weights, is_pinned=option.is_pinned) if option.is_streamed else placement

    def _stream_blocks(self, placement: Placement, weights: WeightBytes, *, is_pinned: bool) -> Placement:
        """Returns the placement with blocks in memory only while they run."""
        if self.on_cpu:
            # One block runs; what the system has read ahead of the next one does not count as the process's.
            mapped = weights.mapped - weights.mapped_blocks + weights.largest_mapped_block
            return replace(placement, streamed_blocks=weights.num_blocks, mapped_bytes=mapped)
        all_blocks = weights.all_blocks_total
        block = all_blocks // max(1, weights.num_blocks)
        return replace(
            placement,
            streamed_blocks=weights.num_blocks,
            private_bytes=placement.private_bytes - all_blocks + 2 * block,  # two slots; see `memory.block_swap`
            host_bytes=all_blocks,
            pins_blocks=is_pinned,
            # The system can neither swap nor drop pinned memory: it keeps as much for everything else.
            spare_host_bytes=all_blocks if is_pinned else 0,
        )
