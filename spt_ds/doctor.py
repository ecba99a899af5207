"""`spt-ds doctor`: what is wrong with this machine, or these nodes, before a run finds out.

One line per finding: `ok`, `warn` (a run works, but perhaps not as meant) or `FAIL`. Start it as
the run will be started: `torchrun ... -m spt_ds.doctor --distributed`; the job scripts do so with
SPT_DOCTOR=1. Exit code 0, or 2 when a line says FAIL.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from spt_ds.config.load import load_config
from spt_ds.errors import ConfigError, EngineError, SptError
from spt_ds.files import STALE_LOCK_S, build_locks, sha256
from spt_ds.log import say_loading
from spt_ds.placement.memory import GIB
from spt_ds.run.command import EXIT_DONE, EXIT_USER_ERROR, add_overrides, run_command

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes")
MIN_DISK_GIB = 5.0
MAX_CLOCK_SPREAD_S = 2.0
MEASURED_MIB, REPEATS = 16, 5
BACKENDS_S = 600  # DeepSpeed may build an operation first


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    """`ok`, `warn` or `FAIL`."""
    text: str

    def line(self) -> str:
        return f"{self.level:<5}{self.text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings, shared ones on rank 0 only; return 0, or 2 when one is a FAIL."""
    parser = argparse.ArgumentParser(
        prog="spt-ds doctor", description="Check machine, ranks and network before a run."
    )
    parser.add_argument(
        "--distributed", action="store_true", help="compare all ranks and measure an all-reduce"
    )
    parser.add_argument(
        "--config", help="recipe or YAML file whose data is to be there, and the same on every rank"
    )
    add_overrides(parser, "override an option of --config, such as data.train=FILE")
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="DeepSpeed file to check for --config and the ranks",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path(), help="run folder, whose disk is looked at"
    )
    parser.add_argument(
        "--timeout", type=int, default=60, metavar="S", help="seconds to wait for the other ranks"
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return run_command(parser, argv, _report)


def _report(args: argparse.Namespace) -> int:
    if args.deepspeed_config and not args.config:
        raise ConfigError("--deepspeed_config is checked against a --config; give both")
    say_loading()
    findings, everybody_knows = list(machine(os.environ, args.run_dir)), False
    try:
        if not args.distributed:
            findings += [Finding("ok", f"{name}: {value}") for name, value in _job(args, 1).items()]
        # A rank that cannot run does not join. The others say so when their time is up.
        elif any(finding.level == "FAIL" for finding in findings):
            findings = [_of_rank(finding) for finding in findings if finding.level != "ok"]
        else:
            findings, everybody_knows = across_ranks(args, findings), True
    except SptError as error:
        # Over ranks every process prints here: the error alone, not each one's list.
        findings = [*([] if args.distributed else findings), Finding("FAIL", str(error))]
    if not everybody_knows or os.environ.get("RANK", "0") == "0":
        print("\n".join(finding.line() for finding in findings), flush=True)
    return EXIT_USER_ERROR if any(finding.level == "FAIL" for finding in findings) else EXIT_DONE


def machine(environment: os._Environ[str], run_dir: Path) -> Iterator[Finding]:
    """Findings that one process can make: packages, devices, disk, leftovers of killed builds."""
    yield Finding(
        "ok", f"{socket.gethostname()}: Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    broken: list[str] = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            yield Finding("ok", f"{name} {metadata.version(name)}")
        except (ImportError, OSError) as error:  # OSError: a library of another CUDA version
            broken.append(name)
            yield Finding("FAIL", f"{name} cannot be imported: {error}")
    if "torch" not in broken:
        yield from _devices(environment)
    # Each rank has a GPU of its own; on CPUs the ranks of a host compute on the same.
    if not broken and (_gpus() or environment.get("LOCAL_RANK", "0") == "0"):
        yield from _backends()
    yield _disk("run folder", run_dir)
    yield _disk("cache", Path(environment.get("SPT_CACHE", Path.home())))
    yield from _stale_locks(
        Path(environment.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _devices(environment: os._Environ[str]) -> Iterator[Finding]:
    import torch

    from spt_ds import dist

    place = dist.launch_variables(environment)
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield Finding(
        "ok",
        (
            f"{count} GPUs: {names}"
            if count
            else "no GPU: ranks compute on the CPU and talk through gloo"
        ),
    )
    if not count:
        yield from _cpu(place["LOCAL_WORLD_SIZE"])
    if count > 1 and place["WORLD_SIZE"] == 1:
        yield Finding(
            "warn",
            f"world size 1 on a host with {count} GPUs: start with `deepspeed --num_gpus {count}"
            " --module ...`",
        )
    try:
        dist.gpu_of(place["LOCAL_RANK"])
    except SptError as error:
        yield Finding("FAIL", str(error))


def _cpu(ranks: int) -> Iterator[Finding]:
    """What decides how fast ranks compute on this machine's cores."""
    from spt_ds.dist import own_cores
    from spt_ds.model.bf16 import bf16_advice, bf16_units

    threads = os.environ.get("OMP_NUM_THREADS")
    who = f"{ranks} ranks share them" if ranks > 1 else "one rank takes them all"
    how = f"OMP_NUM_THREADS={threads}" if threads else f"{who} (OMP_NUM_THREADS is not set)"
    yield Finding("ok", f"cores that this process may use: {len(own_cores())}; {how}")
    if advice := bf16_advice(16):
        yield Finding("warn", advice)
    elif bf16_units():
        yield Finding("ok", "products in bf16: this CPU has units for them (model.base_bits: 16)")


def _disk(what: str, folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / GIB
    text = f"{what}: {free:.0f} GiB free at {existing}"
    return (
        Finding("ok", text)
        if free >= MIN_DISK_GIB
        else Finding("warn", f"{text}, less than {MIN_DISK_GIB:.0f} GiB")
    )


def _stale_locks(folder: Path) -> Iterator[Finding]:
    for lock, age_s in build_locks(folder):
        if age_s > STALE_LOCK_S:
            yield Finding(
                "FAIL", f"{lock}: a killed build left this lock {age_s / 3600:.1f} h ago; remove it"
            )


def _of_rank(finding: Finding) -> Finding:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return Finding(finding.level, f"rank {rank} on {socket.gethostname()}: {finding.text}")


def across_ranks(args: argparse.Namespace, here: list[Finding]) -> list[Finding]:
    """Findings that need all ranks, the same list on each; `here` are this process's own.

    Raises EngineError when they do not meet, and on all ranks what is wrong with the job on one of
    them.
    """
    from spt_ds import dist

    place = dist.launch_variables(os.environ)
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    begin = time.monotonic()
    try:
        world = dist.init(args.timeout)
    # torch's DistStoreError and DistNetworkError are RuntimeErrors.
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"rank {place['RANK']} on {socket.gethostname()}: not all of {place['WORLD_SIZE']}"
            f" ranks met at {where} within {args.timeout} s ({str(error).splitlines()[0]}); was"
            " every node started, did a rank say FAIL, and does NCCL_SOCKET_IFNAME or"
            " GLOO_SOCKET_IFNAME name the network they share?"
        ) from error
    met = time.monotonic() - begin
    dist.barrier()
    # Behind a barrier, so that all ranks read their clocks in nearly the same moment.
    mine = dist.agreed(lambda: _facts(args, world.size))
    facts: list[dict[str, Any]] = dist.gather_json(mine)
    local = dist.gather_json([finding.line() for finding in here if finding.level != "ok"])
    gib_s = _bandwidth(dist)
    dist.shutdown()
    findings = [
        Finding(
            "ok",
            f"{world.size} ranks on {len({one['host'] for one in facts})} hosts met in {met:.1f} s",
        )
    ]
    findings += [_same(name, facts) for name in facts[0] if name not in ("host", "clock")]
    findings.append(_clocks([one["clock"] for one in facts]))
    findings.append(
        Finding("ok", f"all-reduce of {MEASURED_MIB} MiB: {gib_s:.2f} GiB/s on {world.device.type}")
    )
    for rank, lines in enumerate(local):
        findings += [
            Finding(line[:5].strip(), f"rank {rank} on {facts[rank]['host']}: {line[5:]}")
            for line in lines
        ]
    return findings


def _backends() -> Iterator[Finding]:
    """One operation of each attention, quantisation and sharding backend, in another process.

    A kernel that does not fit the machine may end the process, or leave its GPU unusable.
    """
    command = [sys.executable, "-m", "spt_ds.engine.backends"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BACKENDS_S)
    except subprocess.TimeoutExpired:
        yield Finding("FAIL", f"one operation of each backend took more than {BACKENDS_S} s")
        return
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # libraries print too
            trial = json.loads(line)
            level = "ok" if trial["works"] else "FAIL"
            yield Finding(level, f"{trial['name']}: {trial['note']}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("FAIL", f"the trial of the next backend ended with {done.returncode}: {last}")


def _facts(args: argparse.Namespace, size: int) -> dict[str, Any]:
    from spt_ds.run.environment import commit

    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "clock": time.time(),
        "code": f"{commit()} {_code_hash()}",
    }
    facts |= {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }
    return facts | _job(args, size)


def _job(args: argparse.Namespace, size: int) -> dict[str, str]:
    """What the job named by --config will read; its DeepSpeed file is checked for `size` ranks.

    Of the base only configuration and tokenizer: where those are, in a folder or a cache, the
    weights are too.
    """
    if args.config is None:
        return {}
    from spt_ds.data.readers import Split
    from spt_ds.data.sources import digests
    from spt_ds.model.loading import load_base_config, load_tokenizer
    from spt_ds.placement.ds_check import plan_of_file
    from spt_ds.placement.estimate import BaseShape
    from spt_ds.shipped import ds_config_path

    config = load_config(args.config, args.overrides)
    base, tokenizer = load_base_config(config.model), load_tokenizer(config.model)
    found = {"base": f"{base.model_type}, {len(tokenizer)} tokens"}
    splits: tuple[Split, ...] = ("train", "valid", "test")
    found |= {f"data.{name}": digests(config.data, name) for name in splits}
    if args.deepspeed_config is not None:
        plan_of_file(args.deepspeed_config, config, BaseShape.from_config(base.to_dict()), size)
        found["DeepSpeed file"] = sha256(ds_config_path(args.deepspeed_config))[:16]
    return found


def _code_hash() -> str:
    """SHA-256, shortened, over the package's files in the order of their names."""
    state = hashlib.sha256()
    root = Path(__file__).resolve().parent
    for path in sorted(root.rglob("*.py")):
        state.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:12]


def _same(name: str, facts: list[dict[str, Any]]) -> Finding:
    groups: dict[str, list[str]] = {}
    for rank, one in enumerate(facts):
        groups.setdefault(str(one[name]), []).append(f"rank {rank} on {one['host']}")
    if len(groups) == 1:
        return Finding("ok", f"{name}: {facts[0][name]} everywhere")
    listing = "; ".join(f"{value}: {', '.join(members)}" for value, members in groups.items())
    return Finding(
        "FAIL",
        f"{name} differs: {listing}; give every node the same environment, checkout and files",
    )


def _clocks(clocks: list[float]) -> Finding:
    spread = max(clocks) - min(clocks)
    if spread <= MAX_CLOCK_SPREAD_S:
        return Finding("ok", f"clocks within {spread:.1f} s")
    return Finding(
        "warn", f"clocks differ by {spread:.0f} s: times in logs cannot be compared, check NTP"
    )


def _bandwidth(dist: Any) -> float:
    """GiB/s of an all-reduce, counted as bytes of the tensor over the median time."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.ones(MEASURED_MIB * 2**18, device=device)
    # A GPU only queues the reduction: without a wait the time would be that of the queue.
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        tensor.fill_(1)
        wait()
        begin = time.perf_counter()
        dist.all_reduce_sum(tensor)
        wait()
        times.append(time.perf_counter() - begin)
    median = sorted(times[1:])[REPEATS // 2]
    return MEASURED_MIB / 1024 / median


if __name__ == "__main__":
    sys.exit(main())
