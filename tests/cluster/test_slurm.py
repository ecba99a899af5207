"""The job scripts on a real Slurm: the loss of every run equals that of one undisturbed process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster import jobs
from tests.cluster.sandbox import HOSTS, wait_until
from tests.cluster.slurm import Slurm, job_log

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
TEST_EXAMPLES = 12  # two replies of the persona's owner in each of six dialogues


def test_trains_over_three_nodes_as_one_process_does(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    slurm.wait_for(slurm.train(config, run, nodes=3, SPT_DOCTOR="1"))
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    assert {path.stem for path in (run / "logs").glob("node*.log")} == set(HOSTS)
    assert "3 ranks" in job_log(run)
    assert "3 ranks on 3 hosts met" in (run / "logs" / "node1.log").read_text()


def test_trains_the_demo_recipe_over_two_and_three_nodes(slurm: Slurm, tmp_path: Path) -> None:
    """The shipped base and dialogues; three of its forty steps, each of the recipe's sixteen
    examples.
    """
    arguments = []
    cache = f"data.cache_dir={tmp_path}/cache"
    for option in ("train.max_steps=3", "data.max_valid_examples=8", "data.workers=0", cache):
        arguments += ["--set", option]
    jobs.train_here("demo", tmp_path / "here", *arguments)
    expected = jobs.final_loss(tmp_path / "here")
    for nodes in (2, 3):
        run = tmp_path / str(nodes)
        slurm.wait_for(slurm.train("demo", run, nodes=nodes, arguments=arguments), timeout_s=240)
        assert jobs.final_loss(run) == pytest.approx(expected, rel=1e-5)


def test_srun_alone_starts_ranks_that_find_one_another(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    command = f"srun {sys.executable} -m spt_ds.train --config {config} --run-dir {run}"
    slurm.wait_for(slurm.submit("--nodes=2", "--ntasks-per-node=1", "--wrap", command))
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    assert json.loads((run / "DONE.json").read_text())["world_size"] == 2


def test_trains_over_two_nodes_and_then_generates(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    first = slurm.train(config, run, nodes=2)
    options = (f"--dependency=afterok:{first}", "--nodes=2", "--ntasks-per-node=1")
    second = slurm.submit(*options, "slurm/generate.sbatch", str(run))
    assert slurm.job(second)["JobState"] == "PENDING"
    slurm.wait_for(second, timeout_s=180)
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    replies = [
        json.loads(line)
        for line in (run / "generate" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(replies) == TEST_EXAMPLES
    assert "bleu" in json.loads((run / "generate" / "scores.json").read_text())["values"]


def test_sweep_makes_its_table(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    file, root = tmp_path / "sweep.yaml", tmp_path / "sweep"
    file.write_text(f"name: s\nconfigs: ['{config}']\ngrid: {{prompts.count: [1, 3]}}\n")
    arguments = [str(file), "--out", str(root), "--set", "train.max_steps=2"]
    told = slurm.call(
        "bash", "slurm/sweep.sbatch", "--ntasks=1", "--", *arguments, **slurm.job_environment
    )
    slurm.wait_for(int(told.split()[-1]), timeout_s=240)
    names = ["tiny.count-1", "tiny.count-3"]
    table = (root / "table.md").read_text()
    assert all(name in table for name in names)
    assert json.loads((root / "table.json").read_text())["failed"] == {}
    counts = [
        yaml.safe_load((root / name / "config.yaml").read_text())["prompts"]["count"]
        for name in names
    ]
    assert counts == [1, 3]


def test_nodes_may_have_different_numbers_of_ranks(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "place.sbatch"
    ranks = 'spt_step "$1" bash -c \'echo "place $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE"\''
    script.write_text(f"#!/bin/bash\n. slurm/common.sh\nspt_open $1\n{ranks}\n")
    slurm.wait_for(
        slurm.submit("--nodes=2", "--ntasks=5", str(script), str(tmp_path)), timeout_s=30
    )
    text = "".join(path.read_text() for path in tmp_path.glob("node*.log"))
    places = sorted(line.split()[1:] for line in text.splitlines() if line.startswith("place"))
    assert places == [
        ["0", "5", "0", "4"],
        ["1", "5", "1", "4"],
        ["2", "5", "2", "4"],
        ["3", "5", "3", "4"],
        ["4", "5", "0", "1"],
    ]


def test_a_task_of_an_array_requeues_itself_alone(slurm: Slurm, tmp_path: Path) -> None:
    """The last one has the number of the whole array, and fails while the first one works."""
    script = tmp_path / "array.sbatch"
    fails = (
        "if ((SLURM_ARRAY_TASK_ID == 1 && ${SLURM_RESTART_COUNT:-0} == 0)); then SPT_CODE=137; else"
        " sleep 8; fi"
    )
    conclude = (
        f'{fails}\n((SPT_CODE)) || echo done >"$SPT_FOLDER/DONE"\nspt_conclude "$SPT_FOLDER/DONE"'
    )
    script.write_text(
        f"#!/bin/bash\nset -u\n. slurm/common.sh\nspt_open $1/$SLURM_ARRAY_TASK_ID\n{conclude}\n"
    )
    number = slurm.submit("--array=0-1", "--ntasks=1", str(script), str(tmp_path))
    for task in (0, 1):
        wait_until(f"task {task}", (tmp_path / str(task) / "DONE").exists, 60)
    starts = [job_log(tmp_path / str(task)).count("] start ") for task in (0, 1)]
    assert starts == [1, 2], f"array {number}"


def test_a_benchmark_leaves_its_line(slurm: Slurm, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    arguments = [
        "step",
        "--shape",
        "tiny",
        "--cases",
        "prefix",
        "--steps",
        "1",
        "--batch",
        "2",
        "--max-tokens",
        "256",
    ]
    slurm.wait_for(slurm.submit("slurm/bench.sbatch", str(result), *arguments))
    assert json.loads(result.read_text())["results"][0]["case"] == "prefix"
