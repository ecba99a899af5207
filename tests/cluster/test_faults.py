"""Whatever befalls a job, its run ends with the loss of the undisturbed one, and nothing is left
running.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.cluster import faults, jobs
from tests.cluster.faults import FAULTS, Cost
from tests.cluster.sandbox import Sandbox, kill_9, processes, ranks, wait_until
from tests.cluster.slurm import Slurm, job_log

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
STEP = jobs.EVERY + 2  # a checkpoint is there, and steps after it


def working() -> list[tuple[int, list[str]]]:
    """Steps and job scripts: srun, slurmstepd (which calls itself `slurmstepd: [7.0]`),
    slurm_script.
    """
    names = ("srun", "slurmstepd", "slurm_script")
    return [
        found
        for found in processes()
        if any(name in word for word in found[1][:2] for name in names)
    ]


def nothing_is_left() -> None:
    wait_until("no rank, step or script is left", lambda: not ranks() and not working(), 90, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_goes_on_by_itself_after(
    sandbox: Sandbox,
    slurm: Slurm,
    config: Path,
    tmp_path: Path,
    expected_loss: float,
    costs: list[Cost],
    fault: str,
) -> None:
    run = tmp_path / "run"
    number = slurm.train(config, run)
    begin, step = faults.wait_for_step(run, STEP)
    assert (
        len({name for name in ("srun", "slurmstepd", "slurm_script") if name in str(working())})
        == 3
    )
    try:
        FAULTS[fault](sandbox, slurm)
        job = slurm.wait_for(number, timeout_s=240)
    finally:
        faults.mend(sandbox, slurm)
    assert job["Restarts"] == "1"
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    nothing_is_left()
    costs.append(faults.cost(fault, run, begin, step))
    assert costs[-1].repeated <= jobs.EVERY


def test_a_rank_that_slurm_has_lost_gives_its_folder_up(
    sandbox: Sandbox, slurm: Slurm, config: Path, tmp_path: Path
) -> None:
    """One node, cut off from Slurm and not from the folder: its rank waits for nobody."""
    run, here = tmp_path / "run", tmp_path / "here"
    long = ["--set", "train.max_steps=300"]
    number = slurm.train(config, run, nodes=1, arguments=long)
    faults.wait_for_step(run, STEP)
    (lost,) = ranks()
    try:
        # Slowly, so that it is at work when Slurm has given its node up.
        faults.pause([lost])
        node = slurm.job(number)["NodeList"]
        sandbox.link(node, "down")
        faults.wait_for_node_down(slurm, node)
        faults.go_on([lost])
        slurm.wait_for(number, timeout_s=240)
    finally:
        faults.mend(sandbox, slurm)
    logs = "".join(path.read_text() for path in run.glob("logs/node*.log"))
    assert "an earlier start of this job still works here" in logs
    assert "Slurm has started this job again" in logs
    jobs.train_here(config, here, *long)
    assert jobs.final_loss(run) == pytest.approx(jobs.final_loss(here), rel=1e-5)
    nothing_is_left()


def test_lives_through_a_restart_of_slurmd(
    sandbox: Sandbox, slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float
) -> None:
    run = tmp_path / "run"
    number = slurm.train(config, run)
    faults.wait_for_step(run, STEP)
    kill_9(sandbox.daemons["slurmd-node2"].pid)
    slurm.start_slurmd("node2")
    assert slurm.wait_for(number)["Restarts"] == "0"
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    nothing_is_left()


def test_time_limit_saves_and_requeues(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float, costs: list[Cost]
) -> None:
    run = tmp_path / "run"
    patient = ["--set", "engine.collective_timeout_s=150"]
    number = slurm.train(config, run, "--time=2", "--signal=B:USR1@90", arguments=patient)

    def asked() -> bool:
        return (run / "logs" / "job.log").exists() and "asks to stop (USR1)" in job_log(run)

    # The run must not be done before the signal comes.
    wait_until("a step", lambda: faults.newest_step(run) > 0, 60)
    paused = ranks()
    faults.pause(paused)
    wait_until("the early signal", asked, 60)
    # Slurm looks at its clock twice a minute: the signal may come before the ranks listen. It is
    # given again every five seconds.
    time.sleep(6)
    faults.go_on(paused)
    begin, step = time.time(), faults.newest_step(run)
    wait_until("the requeue", lambda: slurm.job(number)["Restarts"] == "1", 60)
    slurm.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    slurm.wait_for(number)
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    nothing_is_left()
    costs.append(faults.cost("time limit, early signal", run, begin, step))
    assert costs[-1].repeated == 0


def test_preemption_saves_and_requeues(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float, costs: list[Cost]
) -> None:
    run = tmp_path / "run"
    patient = ["--set", "engine.collective_timeout_s=150"]
    number = slurm.train(config, run, arguments=patient)
    begin, step = faults.wait_for_step(run, STEP)
    # The run must not be done before Slurm looks at what is urgent. Slurm wakes what it pre-empts.
    faults.pause(ranks())
    options = ("--partition=urgent", "--nodes=3", "--exclusive", f"--output={tmp_path}/urgent.out")
    urgent = int(slurm.call("sbatch", "--parsable", *options, "--wrap", "sleep 3"))
    slurm.wait_for(urgent)
    assert slurm.wait_for(number)["Restarts"] == "1"
    assert "pre-empted; requeueing" in job_log(run)
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    nothing_is_left()
    costs.append(faults.cost("pre-emption, 60 s of grace", run, begin, step))
    assert costs[-1].repeated == 0


def test_scancel_saves_and_a_smaller_job_goes_on(
    slurm: Slurm, config: Path, tmp_path: Path, expected_loss: float, costs: list[Cost]
) -> None:
    run = tmp_path / "run"
    number = slurm.train(config, run, nodes=3)
    faults.wait_for_step(run, 1)
    second = slurm.wait_for(slurm.train(config, run), ("FAILED",), timeout_s=20)
    assert second["ExitCode"] == "2:0"
    assert f"job {number} is working in this folder" in job_log(run)
    begin, step = faults.wait_for_step(run, STEP)
    slurm.call("scancel", str(number))
    slurm.wait_for(number, ("CANCELLED",))
    nothing_is_left()
    assert not (run / "DONE.json").exists()
    slurm.wait_for(slurm.train(config, run, nodes=2))
    assert jobs.final_loss(run) == pytest.approx(expected_loss, rel=1e-5)
    costs.append(faults.cost("`scancel`, submitted again on one node less", run, begin, step))
    assert costs[-1].repeated == 0
    before = (run / "metrics.jsonl").read_text()
    slurm.wait_for(slurm.train(config, run), timeout_s=60)  # done: not repeated
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("fault", ["rank killed", "asked to stop"])
def test_generation_goes_on_after(
    sandbox: Sandbox, slurm: Slurm, config: Path, undisturbed: Path, tmp_path: Path, fault: str
) -> None:
    """Replies written before are kept, and the file is that of one undisturbed process."""
    arguments = [
        "--set",
        f"data.test={config.parent}/train.jsonl",
        "--set",
        "generate.max_new_tokens=48",
        # One reply after the other: the fault must come before the last of them.
        "--set",
        "generate.batch_size=1",
    ]
    jobs.run_here("spt_ds.generate", str(undisturbed), "--out", str(tmp_path / "here"), *arguments)
    out = tmp_path / "out"
    options = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "slurm/generate.sbatch",
        str(undisturbed),
        "--out",
        str(out),
    )
    number = slurm.submit(*options, *arguments)

    def written() -> int:
        return sum(path.read_text().count("\n") for path in out.glob(".parts-*/rank-*.jsonl"))

    wait_until("replies", lambda: written() > 0, 60, 0.05)
    if fault == "rank killed":
        kill_9(ranks("spt_ds.generate")[-1])
    else:
        slurm.call(
            "scancel", "--batch", "--signal=USR1", str(number)
        )  # as --signal=B:USR1@60 does before the limit
    assert slurm.wait_for(number)["Restarts"] == "1"
    assert (out / "predictions.jsonl").read_bytes() == (
        tmp_path / "here" / "predictions.jsonl"
    ).read_bytes()
    bars = (out / "logs" / "node1.log").read_text()
    assert len(re.findall(r"\| 0/192", bars)) == 1, bars  # the second start did not begin at none
    assert (out / "scores.json").exists()
    nothing_is_left()


def test_gives_up_after_too_many_faults(
    sandbox: Sandbox, slurm: Slurm, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = slurm.train(config, run, SPT_MAX_FAILURES="0")
    faults.wait_for_step(run, 1)
    faults.rank_killed(sandbox, slurm)
    job = slurm.wait_for(number, ("FAILED",))
    assert job["ExitCode"] != "0:0"
    assert job["Restarts"] == "0"
    assert "failed too often" in job_log(run)
    nothing_is_left()


def test_a_mistake_is_not_tried_again(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.wait_for(
        slurm.train(config, run, arguments=["--set", "optim.no_such_key=1"]), ("FAILED",)
    )
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert "step ended with 2, first rank" in job_log(run)
    assert "no_such_key" in "".join(path.read_text() for path in (run / "logs").glob("node*.log"))
