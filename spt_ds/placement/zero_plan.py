"""What DeepSpeed is to do with the frozen base of a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["replicate", "zero3", "zero3_offload"]
"""A whole copy per rank, shards on the devices, or shards in host memory or on a disk."""
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ZeroPlan:
    """Stage, offload and settings of ZeRO, checked against the configuration of the run."""

    stage: int
    """0 to 3. Below 3 the base is replicated and no DeepSpeed engine is needed."""
    offload: Offload
    """Where the shards live at stage 3."""
    engine_config: dict[str, Any]
    """For HfDeepSpeedConfig and deepspeed.initialize, without "auto" and without the keys that the
    YAML owns.
    """
    notes: tuple[str, ...] = ()
    """Consequences and warnings for the reader."""

    @property
    def kind(self) -> Kind:
        """The value of `engine.placement` that the plan amounts to."""
        if self.stage < 3:
            return "replicate"
        return "zero3" if self.offload == "none" else "zero3_offload"

    @property
    def copy_ranks(self) -> int:
        """Ranks among which a second copy of the base is sharded (hpZ); 0 where there is none."""
        ranks: int = self.engine_config["zero_optimization"].get("zero_hpz_partition_size", 1)
        return ranks if ranks > 1 else 0

    def remove_swap_files(self) -> None:
        """Delete this process's swap files of NVMe offload, which DeepSpeed leaves behind."""
        if self.offload == "nvme":
            offload = self.engine_config["zero_optimization"]["offload_param"]
            shutil.rmtree(offload["nvme_path"], ignore_errors=True)
