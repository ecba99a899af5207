"""`spt_ds.train` with a rank that fails in one step, for a launcher.

$SPT_TEST_FAULT says `RANK:STEP:HOW`; the file $SPT_TEST_DIED is made at that moment.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from spt_ds.engine.engine import Engine
from spt_ds.run.job import exit_with
from spt_ds.train import main


def fail(how: str) -> None:
    Path(os.environ["SPT_TEST_DIED"]).touch()
    if how == "exit":
        os._exit(9)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    raise RuntimeError("a fault of this rank alone")


if __name__ == "__main__":
    victim, fatal, how = os.environ["SPT_TEST_FAULT"].split(":")
    train_window = Engine.train_window

    def dying(self: Engine, window: Any, step: int, *args: Any) -> Any:
        if self.world.rank == int(victim) and step + 1 == int(fatal):
            fail(how)
        return train_window(self, window, step, *args)

    Engine.train_window = dying  # type: ignore[method-assign,assignment]
    exit_with(main())
