"""Sweeps: the cells of a file, what is refused before anything runs, and the runner over scripted
steps.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from spt_ds import dist
from spt_ds.config.load import dump_config, load_config, recipe_names
from spt_ds.errors import ConfigError, EngineError
from spt_ds.sweep import command
from spt_ds.sweep.cells import load_cells
from spt_ds.sweep.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """\
name: s
configs: [baseline-pt, {config: demo, name: spt, set: {optim.lr: 2e-3}}]
set: {train.max_steps: 3, data.max_test_examples: 8}
grid: {train.seed: [0, 1], losses.tau_gold: [0.05, 1]}
"""
# Stands in for the interpreter: each step writes what the real one does, for runs whose name has no
# "bad" in it.
STEPS = """\
#!/bin/bash
echo "$@" >> "$CALLS"
case "$*" in
*spt_ds.train*) folder=${6} ;;
*spt_ds.generate*) folder=${3} ;;
*evaluate*) folder=${4} ;;
esac
[[ ! -e $WAIT ]] || { echo waiting >> "$CALLS"; sleep 60; }
if [[ $folder == *bad* && $2 == spt_ds.$BAD ]]; then
    echo "spt-ds [rank 0] error: no such thing"; exit 2
fi
mkdir -p "$folder/generate"
case "$*" in
*spt_ds.train*) echo '{}' > "$folder/DONE.json" ;;
*spt_ds.generate*) cp "$PREDICTIONS" "$folder/generate/predictions.jsonl" ;;
*evaluate*) exec "$PYTHON" "$@" ;;
esac
"""
LINE = {"id": "a", "dialogue_id": "a", "reference": "i like tea", "raw": "i like tea a lot"}


def sweep_file(folder: Path, text: str = SWEEP) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cells(sweep_file(folder, text), folder / "out", overrides)
    return str(caught.value)


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps that take no time; returns the file that holds their calls."""
    (tmp_path / "predictions").write_text(json.dumps({"index": 0, **LINE}) + "\n")
    script = tmp_path / "python"
    script.write_text(STEPS)
    script.chmod(0o755)
    names = {"CALLS": "calls", "WAIT": "wait", "PREDICTIONS": "predictions"}
    for name, file in names.items():
        monkeypatch.setenv(name, str(tmp_path / file))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("BAD", "none")
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "calls"


def steps(calls: Path) -> list[tuple[str, str]]:
    """(step, name of the run's folder) of each call."""
    found = []
    for line in calls.read_text().splitlines():
        words = line.split()
        place, step = (
            (5, "train")
            if "spt_ds.train" in line
            else (2, "generate")
            if "generate" in line
            else (3, "score")
        )
        if len(words) > place:
            found.append((step, Path(words[place]).name))
    return found


def test_cells_are_every_configuration_under_every_combination(tmp_path: Path) -> None:
    root, cells = load_cells(sweep_file(tmp_path), None, ["data.workers=0"])
    assert root == Path("runs/s")
    assert [cell.folder.name for cell in cells] == [
        f"{row}.tau_gold-{tau}.seed-{seed}"
        for row in ("baseline-pt", "spt")
        for seed in (0, 1)
        for tau in (0.05, 1)
    ]
    for cell in cells:
        assert cell.config.name == cell.row == cell.folder.name.rpartition(".seed")[0]
        assert (cell.config.train.max_steps, cell.config.data.workers) == (3, 0)
        assert (cell.config.optim.lr == 2e-3) == cell.row.startswith("spt")
        assert cell.config == load_config(cell.source, cell.overrides)
    assert {(cell.config.train.seed, cell.config.losses.tau_gold) for cell in cells} == {
        (0, 0.05),
        (0, 1.0),
        (1, 0.05),
        (1, 1.0),
    }


def test_values_of_any_kind_make_names_and_come_back(tmp_path: Path) -> None:
    text = (
        "name: s\nconfigs: [demo]\ngrid: {optim.betas: [[0.9, 0.99]], optim.lr: [1e-5],"
        " optim.prompts_lr: [null], "
    )
    text += "prompts.init: [text], prompts.init_texts: [['a b: é 😀']]}\n"
    (cell,) = load_cells(sweep_file(tmp_path, text), tmp_path)[1]
    assert cell.row == "demo.betas-0.9_0.99.lr-1e-05.prompts_lr-None.init-text.init_texts-a_b"
    assert cell.config.prompts.init_texts == ("a b: é 😀",)
    assert (cell.config.optim.betas, cell.config.optim.prompts_lr) == ((0.9, 0.99), None)


def test_axes_that_end_alike_keep_their_section(tmp_path: Path) -> None:
    text = (
        "name: s\nconfigs: [demo]\ngrid: {log.every_steps: [1], checkpoint.every_steps: [2],"
        " prompts.count: [3]}\n"
    )
    (cell,) = load_cells(sweep_file(tmp_path, text), tmp_path)[1]
    assert cell.row == "demo.log.every_steps-1.checkpoint.every_steps-2.count-3"


def test_a_file_beside_the_sweep_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (cell,) = load_cells(sweep_file(tmp_path, "name: s\nconfigs: [mine.yaml]\n"), tmp_path)[1]
    assert (cell.row, cell.source) == ("mine", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: s\nconfigs: [demo]\ngird: {}\n", "gird: unknown key; did you mean 'grid'?"),
        (
            "name: s\nconfigs: [{config: demo, sett: {}}]\n",
            "configs.0.sett: unknown key; did you mean 'set'?",
        ),
        ("name: s\nconfigs: []\n", "configs"),
        ("name: s\nconfigs: [demo]\ngrid: {train.seed: []}\n", "grid.train.seed"),
        (
            "name: s\nconfigs: [demo]\nset: {train.max_step: 1}\n",
            "set.train.max_step: unknown option; did you mean",
        ),
        ("name: s\nconfigs: [demo]\nset: {name: x}\n", "set.name: unknown option"),
        (
            "name: s\nconfigs: [demo]\nset: {train.seed: 1}\ngrid: {train.seed: [1]}\n",
            "is an axis of the grid too",
        ),
        ("name: s\nconfigs: [demmo]\n", "did you mean 'demo'?"),
        ("name: s\nconfigs: [demo, demo]\n", "two cells are called demo"),
        ("name: s\nconfigs: [demo]\ngrid: {prompts.count: [1, 0]}\n", "cell demo.count-0"),
        ("name: s\nname: t\n", "sweep.yaml:2: not valid YAML: key 'name' is given twice"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path: Path, text: str, told: str) -> None:
    assert told in problem(tmp_path, text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "name: s\nconfigs: [demo]\ngrid: {data.test: ['embedded:test', 'embedded:valid']}\n",
        "name: s\nconfigs: [demo, {config: demo, name: b, set: {data.max_test_examples: 7}}]\n",
        "name: s\nconfigs: [demo, baseline-pt]\n",  # the demo answers 96 examples, a baseline all
    ],
)
def test_cells_that_answer_other_examples_are_refused(tmp_path: Path, text: str) -> None:
    """Their table could not be made once all of them had been trained."""
    assert "all cells of a sweep answer the same examples" in problem(tmp_path, text)


@pytest.mark.parametrize("name", ["2024", "1e3", "2026-11-23", "null", "true"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(tmp_path: Path, name: str) -> None:
    path = sweep_file(tmp_path, f"name: s\nconfigs: [{{config: demo, name: '{name}'}}]\n")
    assert [cell.config.name for cell in load_cells(path, tmp_path / "out")[1]] == [name]


def test_an_override_must_not_flatten_an_axis(tmp_path: Path) -> None:
    assert "--set train.seed=5: is an axis of the grid" in problem(tmp_path, SWEEP, "train.seed=5")


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    path, out = sweep_file(tmp_path), tmp_path / "out"
    cell = load_cells(path, out)[1][0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump_config(cell.config))
    load_cells(path, out, ["train.max_steps=3", "generate.batch_size=2"])
    text = SWEEP.replace("max_steps: 3", "max_steps: 4, generate.max_new_tokens: 5")
    load_cells(
        sweep_file(tmp_path, text), out
    )  # a run that goes on may be longer, and its replies are still to come
    (cell.folder / "DONE.json").write_text("{}")
    told = problem(tmp_path, text)
    assert f"{cell.folder}: train.max_steps: 3 -> 4; generate.max_new_tokens: 32 -> 5" in told
    load_cells(sweep_file(tmp_path), out, ["generate.batch_size=2"])
    assert "optim.clip_norm: 1.0 -> 2.0" in problem(tmp_path, SWEEP, "optim.clip_norm=2.0")


def test_shipped_table_has_every_baseline_with_the_same_budget() -> None:
    cells = load_cells(ROOT / "benchmarks" / "table.yaml")[1]
    assert {cell.source for cell in cells} == {
        "demo",
        *(name for name in recipe_names() if "baseline" in name),
    }
    assert len({cell.row for cell in cells}) * 3 == len(cells)
    budgets = {
        (cell.config.train.max_steps, cell.config.train.global_batch, cell.config.model.base)
        for cell in cells
    }
    assert len(budgets) == 1


def test_all_cells_and_one_table(
    tmp_path: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(sweep_file(tmp_path)), tmp_path / "out"
    assert command.main([path, "--out", str(out), "--jobs", "3"]) == 0
    names = [cell.folder.name for cell in load_cells(tmp_path / "sweep.yaml", out)[1]]
    assert sorted(steps(scripted)) == sorted(
        (step, name) for step in ("train", "generate", "score") for name in names
    )
    first = [call for call in steps(scripted) if call[1] == names[0]]
    assert [step for step, _ in first] == ["train", "generate", "score"]
    table = json.loads((out / "table.json").read_text())
    assert table["failed"] == {}
    assert {recipe["name"]: len(recipe["runs"]) for recipe in table["recipes"]} == dict.fromkeys(
        names, 1
    )
    scripted.unlink()
    assert command.main([path, "--out", str(out)]) == 0
    assert not scripted.exists()  # nothing was run again
    assert capsys.readouterr().out.count("finished before") == 8


def test_a_cell_that_fails_is_named_and_ends_no_other(
    tmp_path: Path,
    scripted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(sweep_file(tmp_path, "name: s\nconfigs: [{config: demo, name: bad}, demo]\n"))
    arguments = [path, "--out", str(tmp_path / "out")]
    monkeypatch.setenv("BAD", "generate")
    assert command.main(arguments) == 1
    assert (
        "bad: failed in generation: spt-ds [rank 0] error: no such thing (see "
        in capsys.readouterr().err
    )
    for suffix in ("md", "csv", "json", "tex"):
        assert "no such thing" in (tmp_path / "out" / f"table.{suffix}").read_text()
    assert "| demo | 1 |" in (tmp_path / "out" / "table.md").read_text()
    assert command.main([*arguments, "--table"]) == 1
    assert "bad: not finished" in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.setenv("BAD", "none")
    scripted.unlink()
    assert command.main(arguments) == 0
    assert steps(scripted) == [
        ("generate", "bad"),
        ("score", "bad"),
    ]  # its training is not repeated


def test_a_table_without_its_baseline_says_so(
    tmp_path: Path,
    scripted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAD", "train")
    path = sweep_file(
        tmp_path, "name: s\nconfigs: [{config: demo, name: bad}, demo, {config: demo, name: b}]\n"
    )
    assert command.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert "bad: failed in training" in capsys.readouterr().err
    assert (
        "| bad: the baseline is not finished; gains are over demo |"
        in (tmp_path / "out" / "table.md").read_text()
    )


def test_all_cells_failed_still_makes_a_table(
    tmp_path: Path,
    scripted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(sweep_file(tmp_path, "name: s\nconfigs: [{config: demo, name: bad}]\n"))
    monkeypatch.setenv("BAD", "train")
    assert command.main([path, "--out", str(tmp_path / "out")]) == 1
    assert "failed in training" in (tmp_path / "out" / "table.md").read_text()


def test_stopped_by_a_signal(
    tmp_path: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(sweep_file(tmp_path)), "--out", str(tmp_path / "out"), "--jobs", "2"]
    (tmp_path / "wait").touch()
    before = signal.getsignal(signal.SIGTERM)  # of this process: a trainer leaves its own in place

    def stop_when_two_wait() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end and not (
            scripted.exists() and scripted.read_text().count("waiting") == 2
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_two_wait)
    thread.start()
    assert command.main(arguments) == 75
    thread.join()
    assert len(steps(scripted)) == 2  # those that ran; no other was begun
    assert (tmp_path / "out" / "table.md").read_text().count("stopped") == 8
    (tmp_path / "wait").unlink()
    assert command.main(arguments) == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_in_which_another_process_works_is_left_alone(
    tmp_path: Path, scripted: Path
) -> None:
    cells = load_cells(sweep_file(tmp_path, "name: s\nconfigs: [demo]\n"), tmp_path / "out")[1]
    log = cells[0].folder / "logs" / "sweep.log"
    log.parent.mkdir(parents=True)
    with log.open("ab") as held:  # as a step that outlived its sweep does
        fcntl.flock(held, fcntl.LOCK_EX)
        (reason,) = Runner(1, 1).run(cells).values()
        assert "another process works in this folder" in reason
        assert not scripted.exists()
    assert Runner(1, 1).run(cells) == {}


def test_one_task_and_its_list(
    tmp_path: Path, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(sweep_file(tmp_path)), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--count"]) == 0
    assert capsys.readouterr().out == "8\n"
    assert command.main([*arguments, "--task", "5", "--list"]) == 0
    number, folder, *words = capsys.readouterr().out.split()
    assert (number, words[:4]) == ("5", ["--config", "demo", "--run-dir", folder])
    assert command.main([*arguments, "--task", "5"]) == 0
    assert {name for _, name in steps(scripted)} == {Path(folder).name}
    assert not (tmp_path / "out" / "table.md").exists()
    assert command.main([*arguments, "--task", "8"]) == 2
    assert "give 0 to 7" in capsys.readouterr().err


def test_ranks_start_by_the_launcher_and_gpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Runner(1, 1)._launched(["m", "a"], ()) == [sys.executable, "-m", "m", "a"]
    command_line = Runner(1, 2)._launched(["m", "a"], ())
    assert command_line[1:4] == ["-m", "deepspeed.launcher.runner", "--master_port"]
    assert command_line[5:] == ["--num_gpus", "2", "--module", "m", "a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    runner = Runner(2, 2)
    assert [runner._slots.get(), runner._slots.get()] == [("3", "5"), ("6", "7")]
    assert "--include localhost:6,7" in " ".join(runner._launched(["m"], ("6", "7")))
    with pytest.raises(EngineError, match="need 6 GPUs, this machine shows 4"):
        Runner(3, 2)


def test_jobs_share_the_cores_that_the_sweep_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the machine may be more: a job of a cluster has a part of them."""
    monkeypatch.setattr(dist, "own_cores", lambda: list(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ask = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    for given, told in ((None, "3"), ("5", "5")):
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with (tmp_path / "log").open("wb") as log:
            assert Runner(2, 2)._call(ask, log, ()) == 0
        assert (tmp_path / "log").read_text().strip() == told
