"""`spt-ds runs` and `spt-ds watch`: what a run folder says from outside, cheaply and harmlessly."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spt_ds import runs, watch
from spt_ds.files import sha256
from spt_ds.run.folder import RunFolder
from spt_ds.run.lock import NAME, lives
from spt_ds.run.metrics_file import BLOCK_BYTES, NEWEST, History, Line
from spt_ds.run.progress import RunWatch, run_folders

HOLD = """
import sys, time
from pathlib import Path
from spt_ds.run.lock import only_start
with only_start(Path(sys.argv[1]), "mend"):
    print("held", flush=True)
    time.sleep(600)
"""


def train_line(step: int, **values: Any) -> Line:
    # A speed of 4 steps a second.
    values = {"loss": 3.0 - step / 10, "prompt_usage": [step, 0, 1], **values}
    return Line(step, "train", 1000 + step / 4, values)


def make(folder: Path, steps: int = 8, total: int = 20) -> RunFolder:
    """A run that trained some steps and was validated at 0, 4 and 8."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("name: x\n", encoding="utf-8")
    start = {"total_steps": total, "first_step": 0, "time": 1000.0}
    run.start.write_text(json.dumps(start), encoding="utf-8")
    lines = []
    for step in range(steps + 1):
        lines += [train_line(step)] if step else []
        if step % 4 == 0:
            loss = {0: 3.0, 4: 1.5, 8: 1.75}[step]
            lines.append(Line(step, "valid", 1000 + step / 4, {"nll_selected": loss}))
    run.metrics.write_bytes(b"".join(line.content() for line in lines))
    return run


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path/live, as one that trains does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "live")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_states_of_runs(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    live, done, stopped = make(tmp_path / "live"), make(tmp_path / "a"), make(tmp_path / "deep/b")
    done.done.write_text(json.dumps({"step": 20}), encoding="utf-8")
    assert runs.main([str(tmp_path)]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "state",
        "done",
        "stopped",
        "training",
    ]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert runs.main([str(tmp_path), str(live), "--json"]) == 0
    found = {
        Path(one["run"]).name: one
        for one in map(json.loads, capsys.readouterr().out.split("\n")[:-1])
    }
    assert {name: one["state"] for name, one in found.items()} == {
        "a": "done",
        "b": "stopped",
        "live": "dead",
    }
    assert (found["a"]["step"], found["b"]["step"], found["b"]["total_steps"]) == (20, 8, 20)
    assert (found["b"]["best_step"], found["b"]["best_nll"]) == (4, 1.5)
    assert 0 <= found["b"]["age_s"] < 60
    assert stopped.path in run_folders(tmp_path)


def test_a_look_leaves_the_lock_alone(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    for _ in range(3):
        assert lives(tmp_path / "live")
    assert lives(tmp_path) is None
    # A file system without locks, and another machine: its beat says it.
    (tmp_path / NAME).write_text('{"machine": "another", "beat": 3}', encoding="utf-8")
    assert lives(tmp_path)
    os.utime(tmp_path / NAME, (time.time() - 60, time.time() - 60))
    assert not lives(tmp_path)


def test_the_time_left_is_that_of_this_start(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    make(tmp_path / "live")
    progress = RunWatch(tmp_path / "live").look()
    assert progress.steps_per_s == pytest.approx(4)
    assert progress.left_s == pytest.approx(3)  # 12 steps
    start = {"total_steps": 20, "first_step": 8, "time": 5000.0}
    RunFolder(tmp_path / "live").start.write_text(json.dumps(start), encoding="utf-8")
    assert RunWatch(tmp_path / "live").look().steps_per_s is None


def test_scores_are_those_of_the_replies_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "x")
    run.replies.path.mkdir()
    run.replies.predictions.write_text("{}\n", encoding="utf-8")
    digest = sha256(run.replies.predictions)
    scores = {"values": {"f1_spt": 12.345, "bleu": "x"}, "settings": {"predictions_sha256": digest}}
    run.replies.scores.write_text(json.dumps(scores), encoding="utf-8")
    assert RunWatch(run.path).look(scores=True).scores == {"f1_spt": 12.345}
    assert runs.main([str(run.path)]) == 0
    assert capsys.readouterr().out.split("\n")[1].split()[-2:] == ["12.35", "-"]
    run.replies.predictions.write_text("{}\n{}\n", encoding="utf-8")
    assert RunWatch(run.path).look(scores=True).scores == {}


def test_a_folder_without_runs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.main([str(tmp_path / "nowhere")]) == 2
    assert runs.main([str(tmp_path)]) == 2
    assert watch.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no such folder" in told
    assert "holds no run folder" in told
    assert "config.yaml is missing" in told


def test_the_history_follows_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.look()
    assert history.last is None
    path.write_bytes(train_line(1).content() + train_line(2).content()[:-5])
    history.look()
    assert [line.step for line in history.steps] == [1]
    with path.open("ab") as file:
        file.write(train_line(2).content()[-5:] + b'{"step": "damaged"}\n[' + b"[" * 99 + b"\n")
        file.write(b"".join(train_line(step).content() for step in range(3, 900)))
    history.look()
    assert [line.step for line in history.steps] == list(range(900 - NEWEST, 900))
    # As a start does that resumes: another file, shorter or not.
    path.with_name("new").write_bytes(train_line(1).content())
    path.with_name("new").replace(path)
    history.look()
    assert [line.step for line in history.steps] == [1]


def test_a_file_without_lines_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2 * BLOCK_BYTES + 5)
    history = History(path)
    history.look()
    history.look()
    assert history.last is None


def test_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "x")
    assert watch.main([str(tmp_path / "x"), "--once"]) == 0
    text = capsys.readouterr().out
    for part in (
        f"stopped: {tmp_path}"[:80],
        "step 8 of 20 (40 %)",
        "4 steps/s, - left",
        "loss              2.2000  █▇▆▅▄▃▂▁",
        "validation at step 8: nll_selected 1.7500",
        "best nll_selected 1.5000 at step 4",
        "prompt 0      81.8 %",  # 36 of 44
        "prompt 2      18.2 %",
    ):
        assert part in text, text


def test_a_chart_of_one_value_and_of_plain_characters() -> None:
    assert watch.sparkline([2.0], 9, watch.BARS) == "▁"
    assert watch.sparkline([9.0, 0.0, 1.0, 0.5], 3, watch.PLAIN_BARS) == "_#+"


def evil(folder: Path) -> RunFolder:
    run = make(folder)
    clear = "\x1b[2J\x9b2J"
    lines = [
        Line(9, clear, 1e300, {"loss": clear, "nll": float("nan"), clear: 1.0}),
        train_line(10, prompt_usage=[clear, 1e400, -5, None], nll_selected=10**200),
        train_line(11, prompt_usage=[1] * 500),
    ]
    with run.metrics.open("ab") as file:
        file.write(b"".join(line.content() for line in lines))
    run.start.write_text(json.dumps({"total_steps": clear, "time": None}), encoding="utf-8")
    return run


@pytest.mark.parametrize("command", [["watch", "--once"], ["runs"], ["runs", "--json"]])
def test_what_files_hold_does_not_steer_a_terminal(tmp_path: Path, command: list[str]) -> None:
    run = evil(tmp_path / "a\x1b[31mb")
    name, *options = command
    text, modules = call(name, str(run.path), *options)
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "json" in modules
    # It starts at once, without the large ones.
    assert not modules & {"torch", "transformers", "numpy"}


def call(*words: str) -> tuple[str, set[str]]:
    """The output of a command, and the modules that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "spt_ds.cli", *words]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    times = [line for line in done.stderr.decode().splitlines() if line.startswith("import time:")]
    return done.stdout.decode(), {line.rpartition("|")[2].strip() for line in times}


def test_a_terminal_is_redrawn_until_the_run_ends(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    run = evil(tmp_path / "live")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "spt_ds.cli", "watch", str(run.path)], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while seen.count(b"\x1b[H") < 2:
            seen += os.read(ours, 65536)
        holder.kill()
        holder.wait()
        assert process.wait(20) == 0
        seen += os.read(ours, 65536)
    finally:
        process.kill()
        os.close(ours)
    assert b"training" in seen
    assert b"dead" in seen
    for code in (b"\x1b[2J", b"\x1b[H", b"\x1b[K", b"\x1b[J"):
        seen = seen.replace(code, b"")
    assert b"\x1b" not in seen
