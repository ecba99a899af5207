"""The parts of the soak: one command each, undisturbed and under faults."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak.child import Sample, newest_step, start
from benchmarks.soak.faults import FAULTS, PATIENCE_S, Case, small_disk

DISK_MIB = 24  # room for four checkpoints and the logs
GROWTH_MIB = 16.0  # of anonymous memory over three quarters of a run
TIGHT = ["--set", "prompts.count=2", "--set", "prompts.tokens=4"]
SHORT = ["--set", "data.max_valid_examples=8", "--set", "data.max_train_examples=2000"]


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    out: Path
    steps: int
    faults: int
    replies: int
    examples: int
    seed: int

    def draw(self, part: str) -> random.Random:
        return random.Random(f"{self.seed} {part}")


def train(plan: Plan) -> dict[str, Any]:
    """Train undisturbed and under faults; compare tensors, moments, losses and learning rates."""
    every = max(1, plan.steps // (4 * plan.faults))
    options = [
        *("--config", "demo", *TIGHT, *SHORT),
        *("--set", f"train.max_steps={plan.steps}", "--set", "train.global_batch=2"),
        *("--set", "train.micro_batch=2", "--set", "data.workers=0"),
        *("--set", f"checkpoint.every_steps={every}", "--set", "log.every_steps=5"),
        *("--set", f"train.eval_every_steps={max(1, plan.steps // 4)}"),
    ]
    calm = plan.out / "calm"
    calm.mkdir(parents=True, exist_ok=True)
    child = start(
        ["spt_ds.train", *options, "--run-dir", str(calm / "run")],
        calm,
        step=lambda: newest_step(calm / "run"),
    )
    assert child.end(24 * 3600) == 0, f"see {calm}/said.log"
    held = plan.out / "calm.samples.json"
    if child.samples[-1].step - child.samples[0].step > plan.steps // 2 or not held.exists():
        held.write_text(json.dumps([vars(sample) for sample in child.samples]))
    storm = plan.out / "storm"
    storm.mkdir(exist_ok=True)
    with small_disk(plan.out / "disk", DISK_MIB) as disk:
        run = disk / "run"
        case = Case(
            ["spt_ds.train", *options, "--run-dir", str(run)],
            storm,
            disk,
            plan.draw("train"),
            step=lambda: newest_step(run),
            pace=max(1, plan.steps // (2 * plan.faults)),
            stops=True,
        )
        events = weather(case, plan.faults, storm / "events.jsonl")
        assert case.begin().end(24 * 3600) == 0, f"see {storm}/said.log"
        holds = {
            "same tensors and moments": tensors(run) == tensors(calm / "run"),
            "same losses and learning rates": losses(run) == losses(calm / "run"),
        }
    samples = [Sample(**sample) for sample in json.loads(held.read_text())]
    memory, descriptors = growth(samples, plan.steps)
    holds["memory does not grow"] = memory < GROWTH_MIB
    holds["descriptors do not grow"] = descriptors <= 0
    return {
        "steps": plan.steps,
        "faults": dict(Counter(event["fault"] for event in events)),
        "exits": sorted({f"{event['fault']}: {event['exit']}" for event in events}),
        "memory growth MiB": round(memory, 1),
        "descriptors growth": descriptors,
        "memory MiB": round(samples[-1].anonymous_mib),
        "descriptors": samples[-1].descriptors,
        "holds": holds,
    }


def weather(case: Case, count: int, log: Path) -> list[dict[str, Any]]:
    """Let `count` faults happen, those in `log` included, each kind in turn in a drawn order."""
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for number in range(len(done), count):
        order = list(FAULTS)
        turn, place = divmod(number, len(order))
        random.Random(f"{case.words} {turn}").shuffle(order)
        fault = order[place]
        before, began = case.step(), time.monotonic()
        code = FAULTS[fault](case)
        event = {
            "fault": fault,
            "exit": code,
            "from": before,
            "to": case.step(),
            "seconds": round(time.monotonic() - began, 1),
        }
        with log.open("a") as file:
            file.write(json.dumps(event) + "\n")
        done.append(event)
    return done


def tensors(run: Path) -> dict[str, str]:
    """The digest of each tensor file of the last checkpoint."""
    folder = max((run / "checkpoints").glob("step-*"))
    return {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}


def losses(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def growth(samples: list[Sample], steps: int) -> tuple[float, int]:
    """How much more the last eighth of the steps holds than the second: MiB and descriptors."""

    def between(low: float, high: float) -> list[Sample]:
        return [sample for sample in samples if low * steps <= sample.step <= high * steps]

    first, last = between(0.125, 0.25), between(0.875, 1.0)
    if not (first and last):
        return float("nan"), 1
    memory = [statistics.median(sample.anonymous_mib for sample in part) for part in (first, last)]
    # A file that is open for a moment, as a checkpoint is, is no leak.
    descriptors = [
        statistics.median(sample.descriptors for sample in part) for part in (first, last)
    ]
    return memory[1] - memory[0], math.ceil(descriptors[1] - descriptors[0])


def generate(plan: Plan) -> dict[str, Any]:
    """Generate undisturbed and under faults: the same bytes."""
    run = plan.out / "calm" / "run"
    options = [
        *(str(run), "--set", "data.test=embedded:train"),
        *("--set", f"data.max_test_examples={plan.replies}", "--set", "generate.batch_size=8"),
        *("--set", "generate.max_new_tokens=12"),
    ]
    folder = plan.out / "generate"
    folder.mkdir(exist_ok=True)
    here = folder / "calm"
    words = ["spt_ds.generate", *options, "--out"]
    assert start([*words, str(here)], folder).end(24 * 3600) == 0
    with small_disk(plan.out / "disk", DISK_MIB) as disk:
        out = disk / "out"

        def written() -> int:
            return sum(path.read_bytes().count(b"\n") for path in out.glob(".parts-*/rank-*.jsonl"))

        case = Case(
            [*words, str(out)], folder, disk, plan.draw("generate"), step=written,
            pace=max(1, plan.replies // 16),
        )  # fmt: skip
        events = weather(case, len(FAULTS), folder / "events.jsonl")
        assert case.begin().end(24 * 3600) == 0
        same = digest(out / "predictions.jsonl") == digest(here / "predictions.jsonl")
    return {"replies": plan.replies, "exits": exits(events), "holds": {"same bytes": same}}


def exits(events: list[dict[str, Any]]) -> list[str]:
    return sorted(f"{event['fault']}: {event['exit']}" for event in events)


def evaluate(plan: Plan) -> dict[str, Any]:
    """Score undisturbed and under faults: the same files, and never a part of one."""
    predictions = plan.out / "generate" / "calm" / "predictions.jsonl"
    words = ["spt_ds.cli", "evaluate", str(predictions), "--out"]
    return _once(plan, "evaluate", words, ["scores.json", "scores.csv", "scores.md", "scores.tex"])


def quantize(plan: Plan) -> dict[str, Any]:
    """Store a base in 4 bits undisturbed and under faults: the same folder, whole or not there."""
    return _once(plan, "quantize", ["spt_ds.cli", "quantize", "embedded"], ["*"])


def _once(plan: Plan, part: str, words: list[str], names: list[str]) -> dict[str, Any]:
    """A command that keeps nothing between starts: after each fault, all of its files or none."""
    folder = plan.out / part
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    shutil.rmtree(folder / "calm", ignore_errors=True)
    assert start([*words, str(folder / "calm")], folder).end(PATIENCE_S) == 0
    seconds = time.monotonic() - began

    def files(where: Path) -> dict[str, str]:
        return {path.name: digest(path) for name in names for path in sorted(where.glob(name))}

    good, events, whole = files(folder / "calm"), [], True
    with small_disk(plan.out / "disk", DISK_MIB) as disk:
        out = disk / "out"
        case = Case([*words, str(out)], folder, disk, plan.draw(part), seconds=seconds)
        for fault, happen in FAULTS.items():
            shutil.rmtree(out, ignore_errors=True)
            events.append({"fault": fault, "exit": happen(case)})
            left = files(out) if out.exists() else {}
            whole = whole and all(good.get(name) == value for name, value in left.items())
        shutil.rmtree(out, ignore_errors=True)
        assert case.begin().end(PATIENCE_S) == 0
        same = files(out) == good
    return {
        "undisturbed seconds": round(seconds, 1),
        "exits": exits(events),
        "holds": {"same files": same, "whole files or none": whole},
    }


SWEEP = """\
name: soak
configs: [demo]
set:
  train.max_steps: 4
  train.global_batch: 2
  data.workers: 0
  data.max_train_examples: 50
  data.max_valid_examples: 4
  data.max_test_examples: 8
  generate.max_new_tokens: 4
grid: {train.seed: [0, 1]}
"""


def sweep(plan: Plan) -> dict[str, Any]:
    """A sweep undisturbed and killed, frozen, and without memory: the same table."""
    folder = plan.out / "sweep"
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(SWEEP)
    words = ["spt_ds.cli", "sweep", str(path), "--out"]
    began = time.monotonic()
    assert start([*words, str(folder / "calm")], folder).end(24 * 3600) == 0
    case = Case(
        [*words, str(folder / "storm")], folder, folder, plan.draw("sweep"),
        seconds=(time.monotonic() - began) / 2,
    )  # fmt: skip
    kinds = ("kill -9", "SIGSTOP, then kill -9", "out of memory", "clock jumps, stop request")
    events = [{"fault": fault, "exit": FAULTS[fault](case)} for fault in kinds]
    assert case.begin().end(24 * 3600) == 0
    same = digest(folder / "storm" / "table.md") == digest(folder / "calm" / "table.md")
    return {"cells": 2, "exits": exits(events), "holds": {"same table": same}}


def examples(plan: Plan) -> dict[str, Any]:
    """Tokenise a large file and train a few steps on it: time, and memory beside the file's own."""
    folder = plan.out / "examples"
    folder.mkdir(exist_ok=True)
    data = folder / "large.jsonl"
    words = ("dog", "cat", "tea", "music", "night", "run", "book", "sea", "rain", "bread")
    draw = plan.draw("examples")
    with data.open("w") as file:
        for number in range(plan.examples):
            pick = [words[draw.randrange(len(words))] for _ in range(8)]
            row = {
                "persona": [f"i like {pick[0]} and {pick[1]}."],
                "history": [f"do you like {pick[2]}, {pick[3]} or {pick[4]}?"],
                "response": f"i like {pick[5]}, not {pick[6]}. {number}",
            }
            file.write(json.dumps(row) + "\n")
    run = folder / "run"
    options = [
        *("--config", "demo", "--run-dir", str(run), *TIGHT, "--set", f"data.train={data}"),
        *("--set", "data.max_valid_examples=4", "--set", "train.max_steps=20"),
        *("--set", "train.global_batch=2", "--set", "data.workers=0"),
        *("--set", "log.every_steps=5"),
    ]
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "said.log").unlink(missing_ok=True)
    child = start(["spt_ds.train", *options], folder, step=lambda: newest_step(run))
    assert child.end(24 * 3600) == 0, f"see {folder}/said.log"
    said = (folder / "said.log").read_text(errors="replace")
    (took,) = (line for line in said.splitlines() if "tokenised" in line and "large" in line)
    data.unlink()
    largest = max(sample.anonymous_mib for sample in child.samples)
    usual = max(
        sample["anonymous_mib"]
        for sample in json.loads((plan.out / "calm.samples.json").read_text())
    )
    return {
        "examples": plan.examples,
        "tokenised in s": float(took.rpartition(" in ")[2].removesuffix(" s")),
        "memory MiB": round(largest),
        "memory on the shipped data MiB": round(usual),
        "holds": {"memory does not follow the data": largest < usual + 200},
    }
