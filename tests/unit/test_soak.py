"""The soak's own parts: it sees growth, its faults happen, and it resumes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.soak import child, faults, parts
from benchmarks.soak.child import Sample, family, newest_step
from benchmarks.soak.faults import Case

SLEEP = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]
CLOCK = ["timeit", "-n", "1", "-r", "1", "import time; print(time.time()); time.sleep(0.1)"]


def case(folder: Path, words: list[str] = SLEEP) -> Case:
    return Case(words, folder, folder, random.Random(0), seconds=0.5)


def samples(mib: list[float], descriptors: list[int]) -> list[Sample]:
    return [
        Sample(float(n), n, m, d) for n, (m, d) in enumerate(zip(mib, descriptors, strict=True))
    ]


def test_growth_is_seen_and_a_start_is_none() -> None:
    steps = 100
    flat = samples([50.0] * 10 + [200.0] * 91, [9] * 101)
    assert parts.growth(flat, steps) == (0.0, 0)
    memory, descriptors = parts.growth(
        samples([200.0 + n for n in range(101)], [9 + n // 25 for n in range(101)]), steps
    )
    assert memory == pytest.approx(75, abs=2)
    assert descriptors == 3
    assert math.isnan(parts.growth(flat[:20], steps)[0])


def test_the_newest_step_is_read_from_the_end(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    lines = [json.dumps({"step": n, "kind": "train", "x": "y" * 50}) for n in range(500)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    assert newest_step(tmp_path) == 499


@pytest.mark.parametrize("name", ["kill -9", "SIGSTOP, then kill -9", "out of memory"])
def test_a_fault_ends_the_command_and_leaves_nobody(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    assert faults.FAULTS[name](case(tmp_path)) == -signal.SIGKILL
    assert time.monotonic() - began < 30


def test_a_request_to_stop_reaches_the_command(tmp_path: Path) -> None:
    assert faults.slow_disk(case(tmp_path)) == -signal.SIGTERM


def test_little_memory_ends_by_itself(tmp_path: Path) -> None:
    allocate = ["timeit", "-n", "1", "-r", "1", "bytearray(2 << 30)"]
    assert faults.little_memory(case(tmp_path, allocate)) == 1
    assert "MemoryError" in (tmp_path / "said.log").read_text()


def test_the_clock_jumps(tmp_path: Path) -> None:
    words = [*CLOCK[:-1], "import time\nfor _ in range(100): print(time.time()); time.sleep(0.1)"]
    running = child.start(words, tmp_path, fault="clock")
    running.end(60)
    times = [float(line) for line in (tmp_path / "said.log").read_text().splitlines()[:100]]
    assert max(times) - min(times) > 3000


def test_a_family_is_found(tmp_path: Path) -> None:
    running = child.start([*SLEEP[:-1], "import os; os.system('sleep 60')"], tmp_path)
    until = time.monotonic() + 20
    while len(family(running.process.pid)) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    found = family(running.process.pid)
    assert len(found) >= 2
    running.signal(signal.SIGKILL)
    assert running.end(10) == -signal.SIGKILL
    time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in found)


def test_weather_that_was_interrupted_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {name: lambda _: 0 for name in faults.FAULTS}
    monkeypatch.setattr(parts, "FAULTS", kinds)
    whole = parts.weather(case(tmp_path), 14, tmp_path / "whole.jsonl")
    parts.weather(case(tmp_path), 5, tmp_path / "log.jsonl")
    again = parts.weather(case(tmp_path), 14, tmp_path / "log.jsonl")
    assert [event["fault"] for event in again] == [event["fault"] for event in whole]
    assert sorted({event["fault"] for event in whole[:7]}) == sorted(faults.FAULTS)
