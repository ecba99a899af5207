"""Counts the files that a reader must follow: those of a micro-batch, and those of a configuration.

    python benchmarks/stays.py [--calls]         # PYTHONPATH=FOLDER traces another checkout

The trace records each call of a Python function of the package, in order. A *room* is a file. A
*stay* is a run of calls in one room. A *return* is a stay in a room that was visited before, so
stays = rooms + returns. Comprehensions belong to their function; special methods other than
`__init__` and `__call__` (such as `__len__`) are operators and do not count.

The batch: each call from the micro-batch on the host to its losses, on a tiny Llama with K = 3.
The configuration: from the call of the opener with a read recipe `demo` to an open session, with
and without a DeepSpeed file that shards the base; and all of `spt-ds train --config demo`, from the
file to the open session. Here a call counts when an argument, or an attribute of one, is a section
of the configuration, the configuration of the base, or a placement decided from them. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PretrainedConfig

import spt_ds

PACKAGE = Path(spt_ds.__file__).resolve().parent
SESSION = "open_session"  # returns the open session, now and at 0.1.0
LENS = ((5, 3), (9, 1), (7, 4))  # context and response tokens of the examples
# Modules whose classes are the configuration or are decided from it, now and at 0.1.0.
CONFIGURATION = ("spt_ds.config", "spt_ds.placement", "spt_ds.plan", "spt_ds.engine.ds_config")


class Opened(BaseException):
    """Ends the main job once its session is open; the package catches no BaseException."""


class Trace:
    """The package's calls as (room, function), in order."""

    def __init__(self, counts: Callable[[FrameType], bool], until: str = "") -> None:
        """Record the calls that `counts` accepts, until the function `until` returns."""
        self.counts = counts
        self.until = until
        self.calls: list[tuple[str, str]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        sys.setprofile(self._event)
        try:
            function(*args)
        except Opened:
            pass
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        name, path = frame.f_code.co_name, Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):
            return
        if event == "return" and name == self.until:
            raise Opened
        special = name.startswith("__") and name not in ("__init__", "__call__")
        inner = name.startswith("<") and name != "<lambda>"
        if event == "call" and not special and not inner and self.counts(frame):
            # Python 3.10 knows the short name alone.
            name = getattr(frame.f_code, "co_qualname", name)
            self.calls.append((str(path.relative_to(PACKAGE)), name))

    def summary(self) -> dict[str, int]:
        rooms = [room for room, _ in self.calls]
        stays = sum(n == 0 or rooms[n - 1] != room for n, room in enumerate(rooms))
        visited = len(set(rooms))
        return {
            "stays": stays,
            "rooms": visited,
            "returns": stays - visited,
            "calls": len(self.calls),
        }


def batch_trace(placement: str) -> Trace:
    """Calls from a micro-batch on the host to its losses."""
    tiny = importlib.import_module("tests.helpers.tiny")
    model = importlib.import_module("spt_ds.model.spt")
    backbone = tiny.tiny_backbone("llama", torch.float32)
    spt = tiny.tiny_spt(backbone, dtype=torch.float32, prompts={"placement": placement})
    batch = tiny.random_batch(LENS)
    counts = (model.Counts(3, 8),) if hasattr(model, "Counts") else (3, 8)  # 0.1.0, and now
    trace = Trace(lambda frame: True)
    trace.run(backbone, spt.micro_losses, batch, *counts)
    return trace


def config_trace(deepspeed: str | None, *, command: bool = False) -> Trace:
    """Calls that see the configuration, from the opener or the command line to an open session."""

    def holds(value: object) -> bool:
        return type(value).__module__.startswith(CONFIGURATION) or isinstance(
            value, PretrainedConfig
        )

    def sees(frame: FrameType) -> bool:
        given = inspect.getargvalues(frame)
        names = [*given.args, *filter(None, (given.varargs, given.keywords))]
        values = [given.locals.get(name) for name in names]
        ours = [value for value in values if type(value).__module__.startswith("spt_ds")]
        inside = [part for value in ours for part in getattr(value, "__dict__", {}).values()]
        return any(map(holds, [*values, *inside]))

    trace = Trace(sees, until=SESSION)
    with tempfile.TemporaryDirectory() as folder:
        if command:
            cli = importlib.import_module("spt_ds.cli")
            trace.run(cli.main, ["train", "--config", "demo", "--run-dir", f"{folder}/run"])
        else:
            config = importlib.import_module("spt_ds.config.load").load_config("demo")
            world = importlib.import_module("spt_ds.dist").init(config.engine.collective_timeout_s)
            session = importlib.import_module("spt_ds.engine.session")
            opener = getattr(session, "open_untrained", session.open_session)  # now, and at 0.1.0
            trace.run(opener, config, deepspeed, world)
    return trace


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="list every call")
    args = parser.parse_args()
    root = PACKAGE.parent
    sys.path.append(str(root))
    traces = {
        "batch, prefix": batch_trace("prefix"),
        "batch, suffix": batch_trace("suffix"),
        "opener": config_trace(None),
        "opener, zero3.json": config_trace(str(root / "ds_configs" / "zero3.json")),
        "command": config_trace(None, command=True),
    }
    for name, trace in traces.items():
        print(f"{name}: {trace.summary()}")
        for room, function in trace.calls if args.calls else []:
            print(f"  {room:28} {function}")
    print(json.dumps({name: trace.summary() for name, trace in traces.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
