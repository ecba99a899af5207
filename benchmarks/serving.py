"""How many replies `spt-ds serve` gives: 64 callers against one at a time, and 10,000 in a row.

    python benchmarks/serving.py RUN [--long 10000]

The server is a process of its own. Callers come from this process, over HTTP on this machine.
Limits: all callers get 8 times the replies of one at the longest replies, and from the first tenth
of the long test to its end the server's memory grows by 16 MiB at most.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
LEAST_TIMES, MOST_MIB = 8, 16


def main() -> int:
    """Measure, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--alone", type=int, default=24, help="requests of the single caller")
    parser.add_argument("--together", type=int, default=256, help="requests of all callers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--long", type=int, default=0, help="requests of the memory test")
    args = parser.parse_args()
    result: dict[str, Any] = {"callers": args.callers, "speed": [], "memory": []}
    for tokens in args.tokens:
        row = speed(args, tokens)
        result["speed"].append(row)
        print(json.dumps(row), flush=True)
    if args.long:
        result["memory"] = memory(args.run, args.long, args.callers)
    print(json.dumps(result))
    grown = [row["mib"] for row in result["memory"]]
    slow = max(row["times"] for row in result["speed"]) < LEAST_TIMES
    return int(slow or bool(grown and grown[-1] - grown[0] > MOST_MIB))


def speed(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Replies a second of one caller and of all, and the server's own processor time for each."""
    # Replies of one length, so that both sides do the same work; a window that holds the longest.
    fixed = [f"generate.{end}_new_tokens={tokens}" for end in ("min", "max")]
    more = [part for one in (*fixed, "data.max_tokens=512") for part in ("--set", one)]
    with server(args.run, [*more, "--max-tokens", str(tokens)]) as (url, process):
        asyncio.run(ask(url, args.callers, args.callers))  # warm
        rates, costs = [0.0, 0.0], [0.0, 0.0]
        # In turns: a neighbour on the machine slows both.
        for _ in range(args.rounds):
            for place, (count, callers) in enumerate(
                ((args.alone, 1), (args.together, args.callers))
            ):
                before = processor_seconds(process)
                rates[place] += count / asyncio.run(ask(url, count, callers)) / args.rounds
                costs[place] += (processor_seconds(process) - before) / count / args.rounds
    row = {"tokens": tokens, "alone_per_s": rates[0], "together_per_s": rates[1]}
    row |= {"times": rates[1] / rates[0]}
    row |= {"alone_cpu_ms": 1000 * costs[0], "together_cpu_ms": 1000 * costs[1]}
    return {name: round(value, 2) for name, value in row.items()}


def processor_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(run: Path, requests: int, callers: int) -> list[dict[str, float]]:
    """Resident memory of the server in MiB after each tenth of so many requests."""
    rows = []
    with server(run, ["--set", "generate.max_new_tokens=8"]) as (url, process):
        for tenth in range(1, 11):
            seconds = asyncio.run(ask(url, requests // 10, callers, tenth))
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            kib = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            row = {"requests": tenth * requests // 10, "mib": int(kib.split()[1]) / 1024}
            rows.append(row)
            print(f"{row['requests']} requests: {row['mib']:.0f} MiB, {seconds:.0f} s", flush=True)
    return rows


@contextmanager
def server(run: Path, more: list[str]) -> Iterator[tuple[str, int]]:
    """`spt-ds serve` on a free port; gives its address and its process."""
    command = [sys.executable, "-m", "spt_ds.cli", "serve", str(run), "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2], process.pid
        process.terminate()
        if process.wait(30):
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


async def ask(url: str, requests: int, callers: int, round: int = 0) -> float:
    """Seconds that so many callers take for so many requests, all of which must succeed."""
    path = resources.files("spt_ds") / "assets" / "clients" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=callers)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def caller() -> None:
            for number in numbers:
                row = rows[number % len(rows)]
                # Every text is new: nothing that the server keeps by text may grow unseen.
                said = f"{row['history'][-1]} {round} {number}"
                message = [{"role": "user", "content": said}]
                body = {"messages": message, "persona": row["persona"]}
                response = await client.post(CHAT, json=body)
                response.raise_for_status()

        began = time.perf_counter()
        await asyncio.gather(*itertools.starmap(caller, [()] * callers))
        return time.perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
