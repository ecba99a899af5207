"""`spt_ds.train` with a rank that fails in one step, for a launcher.

$SPT_TEST_FAULT says `RANK:STEP:HOW`; the file $SPT_TEST_DIED is made at that moment. With
$SPT_TEST_MARGIN the group of all ranks has a longer time-out than decisions, as NCCL's has.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from spt_ds import dist
from spt_ds.engine.engine import Engine
from spt_ds.run.job import exit_with
from spt_ds.train import main


def fail(how: str) -> None:
    Path(os.environ["SPT_TEST_DIED"]).touch()
    if how == "exit":
        os._exit(9)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(3600)
    raise RuntimeError("a fault of this rank alone")


if __name__ == "__main__":
    victim, fatal, how = os.environ["SPT_TEST_FAULT"].split(":")
    dist.MARGIN_S["gloo"] = int(os.environ.get("SPT_TEST_MARGIN", "0"))
    train_window, one_micro_batch = Engine.train_window, Engine._forward_backward

    def stopping(self: Engine, *args: Any) -> Any:
        out = one_micro_batch(self, *args)
        fail(how)
        return out

    def dying(self: Engine, window: Any, step: int, *args: Any) -> Any:
        if self.world.rank == int(victim) and step + 1 == int(fatal):
            if how == "stop":  # in the middle of a step, when the others have begun theirs
                Engine._forward_backward = stopping  # type: ignore[method-assign,assignment]
            else:
                fail(how)
        return train_window(self, window, step, *args)

    Engine.train_window = dying  # type: ignore[method-assign,assignment]
    exit_with(main())
