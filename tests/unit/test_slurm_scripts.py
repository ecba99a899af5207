"""The job scripts' functions without a Slurm: its commands are replaced by small ones that write
down their calls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
# What srun tells the only rank of a step on node n7.
ALONE = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURMD_NODENAME": "n7",
}

RECORD = "JobId=9 Requeue=1 Restarts=1\n StartTime=2026-11-23T07:00:00 PreemptTime=None\n"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH whose Slurm commands append their arguments to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    told = {
        "scontrol": (
            'case $* in "show job"*) cat "${CALLS%/calls}/record" ;; requeue*) kill $PPID ;; esac'
        ),
        "sbatch": 'echo "$(wc -l < "$CALLS");cluster"',
        "squeue": "true",
    }
    for name, body in told.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        path.chmod(0o755)
    (folder / "record").write_text(RECORD)
    return folder


def bash(
    script: str, commands: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": os.environ["HOME"],
        **variables,
    }
    if commands is not None:
        environment["CALLS"] = str(commands / "calls")
    text = f"set -euo pipefail\n. slurm/common.sh\n{script}"
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=30
    )


def calls(commands: Path) -> list[str]:
    path = commands / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("listed", "expected"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("4(x2),2", [4, 4, 2]), ("1,8(x2),3", [1, 8, 8, 3])],
)
def test_every_node_knows_its_number_of_ranks(listed: str, expected: list[int]) -> None:
    found = [int(bash(f'spt_tasks_of "{listed}" {index}').stdout) for index in range(len(expected))]
    assert found == expected
    assert bash(f'spt_tasks_of "{listed}" {len(expected)}').returncode == 1


def test_a_rank_gets_its_place_and_ignores_an_early_signal() -> None:
    place = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4,2",
        "SLURMD_NODENAME": "n1",
    }
    told = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE; kill -USR1 $$; echo alive"
    done = bash(f"spt_rank bash -c '{told}'", None, **place)
    assert done.stdout.split() == ["5", "6", "1", "2", "alive"]


def test_what_a_site_sets_reaches_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text(
        "SPT_PYTHON=/bin/true\nNCCL_SOCKET_IFNAME=ib0$NOT_SET_BY_ANYBODY\n"
    )
    (tmp_path / "slurm" / "common.sh").symlink_to(ROOT / "slurm" / "common.sh")
    script = (
        f"cd {tmp_path}; spt_site; bash -c 'echo $NCCL_SOCKET_IFNAME $OMP_NUM_THREADS'; echo $-"
    )
    told = bash(script, None, SLURM_CPUS_PER_TASK="3")
    assert told.stdout.splitlines()[0] == "ib0 3", told.stderr
    assert "u" in told.stdout.splitlines()[1]


def test_a_site_whose_last_line_fails_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text(
        "SPT_PYTHON=bash\n[[ -d /no/such/folder ]] && SPT_CACHE=/no\n"
    )
    (tmp_path / "slurm" / "common.sh").symlink_to(ROOT / "slurm" / "common.sh")
    done = bash(f"cd {tmp_path}; spt_site; echo $SPT_PYTHON $-")
    assert done.returncode == 0
    python, options = done.stdout.split()
    assert python == "bash"
    assert {"e", "u"} <= set(options)


OPEN = {
    "SLURM_JOB_ID": "9",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_NTASKS": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SPT_PYTHON": "bash",
    "SPT_PATIENCE_S": "0",
}


@pytest.mark.parametrize(
    ("squeue", "code"),
    [
        ("echo '7 all spt R'", 2),  # at work
        ("true", 0),  # ended
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", 0),  # ended long ago
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
            2,
        ),  # who knows
    ],
)
def test_one_job_at_a_time_owns_a_folder(
    tmp_path: Path, commands: Path, squeue: str, code: int
) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "owner").write_text("7")
    (commands / "squeue").write_text(f"#!/bin/bash\n{squeue}\n")
    done = bash(
        f"cp() {{ :; }}\nspt_open {tmp_path}/run", commands, **OPEN
    )  # there is no script to keep here
    told = done.stdout + done.stderr + (tmp_path / "run" / "logs" / "job.log").read_text()
    assert done.returncode == code, told
    assert (tmp_path / "run" / "slurm" / "owner").read_text() == ("7" if code else "9")


def test_of_two_jobs_that_start_at_once_one_stays(tmp_path: Path, commands: Path) -> None:
    run = tmp_path / "run"
    other = (
        f"(until grep -qs 9 {run}/slurm/owner; do sleep 0.01; done; printf 8 >{run}/slurm/owner) &"
    )
    done = bash(f"{other} spt_open {run}; echo stays", commands, **OPEN)
    assert done.returncode == 2
    log = (run / "logs" / "job.log").read_text()
    assert "job 8 started in this folder at the same time" in log
    assert "stays" not in log


def test_a_heterogeneous_job_is_refused(tmp_path: Path, commands: Path) -> None:
    done = bash(f"spt_open {tmp_path}/run", commands, **OPEN, SLURM_HET_SIZE="2")
    assert done.returncode == 2
    assert "heterogeneous jobs" in done.stderr


def test_a_controller_that_restarts_is_asked_again(tmp_path: Path, commands: Path) -> None:
    busy = (
        'if [[ ! -e "$CALLS.up" ]]; then touch "$CALLS.up"; echo "Unable to contact slurm'
        ' controller" >&2; exit 1; fi'
    )
    (commands / "scontrol").write_text(
        (commands / "scontrol").read_text().replace("case", f"{busy}\ncase")
    )
    script = (
        f"sleep() {{ :; }}\nSPT_FOLDER={tmp_path} SPT_CODE=75 SPT_ASKED=USR1\nspt_conclude"
        f" {tmp_path}/DONE.json"
    )
    bash(script, commands, SLURM_JOB_ID="9", SLURM_RESTART_COUNT="1")
    assert calls(commands) == ["scontrol show job 9", "scontrol show job 9", "scontrol requeue 9"]


def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    done = bash("spt_site", None, SPT_PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2
    assert f"SPT_PYTHON: {tmp_path / 'python'} cannot be run" in done.stderr


def test_a_node_with_idle_gpus_is_pointed_out() -> None:
    place = {**ALONE, "SLURM_GPUS_ON_NODE": "4"}
    assert (
        "n7 has 4 GPUs for 1 ranks; ask for --ntasks-per-node=4"
        in bash("spt_rank true", None, **place).stdout
    )
    assert bash("spt_rank true", None, **{**place, "SLURM_GPUS_ON_NODE": "1"}).stdout == ""


def test_the_first_rank_that_ends_tells_why(tmp_path: Path) -> None:
    place = {**ALONE, "SPT_ENDED": str(tmp_path / "ended")}
    done = bash("spt_rank bash -c 'kill -TERM $PPID; sleep 0.2; exit 75'", None, **place)
    assert done.returncode == 75
    assert (tmp_path / "ended").read_text() == "75 0 n7\n"


@pytest.mark.parametrize(
    "words", ["--a 1 --run-dir 'x y' --b", "--run-dir='x y'", "--run-dir=q --run-dir 'x y'"]
)
def test_an_option_is_found_in_both_forms(words: str) -> None:
    found = bash(f"spt_option --run-dir {words}").stdout
    assert found == "x y"  # the last one counts, as it does for argparse


def test_an_option_without_value_is_not_there() -> None:
    assert bash("spt_option --run-dir --config demo --run-dir").returncode == 1


@pytest.mark.parametrize(
    ("code", "asked", "restarts", "failures", "expected", "requeued"),
    [
        (75, "USR1", 1, 0, 75, True),  # the early signal: saved, goes on
        (75, "", 1, 0, 75, False),  # stopped by hand
        (75, "TERM", 1, 0, 75, False),  # scancel
        (2, "", 1, 0, 2, False),  # a mistake
        (2, "USR1", 1, 0, 2, False),
        (
            0,
            "",
            1,
            0,
            1,
            False,
        ),  # 0 without DONE is no success; forgiven once more, but see failures below
        (137, "", 1, 0, 137, True),  # a rank was killed
        (137, "", 1, 3, 137, False),  # for the fourth time
        (137, "", 0, 0, 137, False),  # Slurm has restarted this job already
    ],
)
def test_the_exit_status_tells_the_truth(
    tmp_path: Path,
    commands: Path,
    code: int,
    asked: str,
    restarts: int,
    failures: int,
    expected: int,
    requeued: bool,
) -> None:
    (tmp_path / "slurm").mkdir()
    failed = 3 if code == 0 else failures
    (tmp_path / "slurm" / "9.failures").write_text("1\n" * failed)
    script = (
        f"SPT_FOLDER={tmp_path} SPT_CODE={code} SPT_ASKED={asked}\nspt_conclude"
        f" {tmp_path}/DONE.json"
    )
    done = bash(script, commands, SLURM_JOB_ID="9", SLURM_RESTART_COUNT=str(restarts))
    assert ("scontrol requeue 9" in calls(commands)) is requeued
    assert done.returncode == expected, done.stdout + done.stderr


def test_done_is_success_whatever_the_launcher_says(tmp_path: Path) -> None:
    (tmp_path / "DONE.json").write_text("{}")
    script = f"SPT_FOLDER={tmp_path} SPT_CODE=137\nspt_conclude {tmp_path}/DONE.json"
    assert bash(script, SLURM_JOB_ID="9").returncode == 0


def test_an_old_result_does_not_make_a_failed_step_a_success(
    tmp_path: Path, commands: Path
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "scores.json").write_text("{}")
    os.utime(tmp_path / "scores.json", (0, 0))
    (tmp_path / "slurm" / "owner").write_text("9")
    conclude = f"SPT_FOLDER={tmp_path} SPT_CODE=CODE\nspt_conclude {tmp_path}/scores.json"
    assert bash(conclude.replace("=CODE", "=2"), commands, SLURM_JOB_ID="9").returncode == 2
    assert bash(conclude.replace("=CODE", "=0"), commands, SLURM_JOB_ID="9").returncode == 0
    (tmp_path / "scores.json").touch()  # written by this job, whose launcher was killed afterwards
    assert bash(conclude.replace("=CODE", "=137"), commands, SLURM_JOB_ID="9").returncode == 0


def test_the_last_task_of_an_array_requeues_itself_alone(tmp_path: Path, commands: Path) -> None:
    array = {
        "SLURM_JOB_ID": "40",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "1",
    }
    bash(
        f"SPT_FOLDER={tmp_path} SPT_CODE=75 SPT_ASKED=USR1\nspt_conclude {tmp_path}/DONE.json",
        commands,
        **array,
    )
    assert calls(commands) == ["scontrol show job 40_3", "scontrol requeue 40_3"]


def test_a_long_answer_of_slurm_is_an_answer(tmp_path: Path, commands: Path) -> None:
    (commands / "record").write_text(RECORD + " Comment=x\n" * 100_000)
    bash(
        f"SPT_FOLDER={tmp_path} SPT_CODE=75 SPT_ASKED=USR1\nspt_conclude {tmp_path}/DONE.json",
        commands,
        SLURM_JOB_ID="9",
        SLURM_RESTART_COUNT="1",
    )
    assert "scontrol requeue 9" in calls(commands)


@pytest.mark.parametrize(
    ("preempted", "requeued"),
    [
        ("2026-11-23T07:30:00", True),
        ("2026-11-23T06:30:00", False),
        ("None", False),
    ],  # of this start, an earlier one
)
@pytest.mark.parametrize(
    "asked", ["", "TERM"]
)  # with a GraceTime the ranks hear of it first, then the script
def test_a_job_that_is_pre_empted_is_requeued(
    tmp_path: Path, commands: Path, preempted: str, requeued: bool, asked: str
) -> None:
    (commands / "record").write_text(RECORD.replace("PreemptTime=None", f"PreemptTime={preempted}"))
    script = (
        f"SPT_FOLDER={tmp_path} SPT_CODE=75 SPT_ASKED={asked}\nspt_conclude {tmp_path}/DONE.json"
    )
    done = bash(script, commands, SLURM_JOB_ID="9", SLURM_RESTART_COUNT="1")
    assert done.returncode == 75
    assert ("scontrol requeue 9" in calls(commands)) is requeued


STEP = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"}


def slow_step(commands: Path, scontrol: str, srun: str) -> None:
    """Replace scontrol and srun: what they do, a line of bash each."""
    for name, body in (("scontrol", scontrol), ("srun", f'echo "srun $*" >> "$CALLS"; {srun}')):
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)


def test_a_step_that_a_stop_came_before_counts_as_stopped(tmp_path: Path, commands: Path) -> None:
    script = (
        f"SPT_FOLDER={tmp_path} SPT_ASKED=USR1\nspt_step {tmp_path}/logs true\necho code $SPT_CODE"
    )
    assert bash(script, commands, **STEP).stdout == "code 75\n"
    assert calls(commands) == []


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_reaches_the_ranks_whenever_it_comes(
    tmp_path: Path, commands: Path, early: bool
) -> None:
    (tmp_path / "slurm").mkdir()
    ranks = "for i in {1..100}; do sleep 0.1; done"
    told = "trap 'echo told >> \"$CALLS\"; exit 75' USR1"
    tell = "kill -USR1 $SCRIPT"
    if early:  # before the step is there: scontrol runs just before srun
        slow_step(commands, f"{tell}; echo n1", f"{told}; {ranks}")
    else:
        slow_step(commands, "echo n1", f"{told}; {tell}; {ranks}")
    script = (
        f"SPT_FOLDER={tmp_path}\ntrap 'spt_asked USR1' USR1\nspt_step {tmp_path}/a%b true\necho"
        " code $SPT_CODE"
    )
    script = f"export SCRIPT=$$\n{script}"
    done = bash(script, commands, **STEP)
    assert done.stdout.splitlines()[-1] == "code 75", done.stdout + done.stderr
    assert calls(commands)[-1] == "told"
    assert f"--output={tmp_path}/a%%b/%N.log" in calls(commands)[0]


def test_restarts_are_bounded(tmp_path: Path, commands: Path) -> None:
    script = f"SPT_FOLDER={tmp_path} SPT_CODE=75 SPT_ASKED=USR1\nspt_conclude {tmp_path}/DONE.json"
    done = bash(script, commands, SLURM_JOB_ID="9", SLURM_RESTART_COUNT="1", SPT_MAX_RESTARTS="1")
    assert done.returncode == 75
    assert calls(commands) == []


def submit_sweep(commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(commands / "calls"),
        "SPT_PYTHON": sys.executable,
    }
    command = ["bash", "slurm/sweep.sbatch", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60
    )


def test_a_sweep_is_an_array_and_a_job_that_waits_for_it(tmp_path: Path, commands: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: s\nconfigs: [demo]\ngrid: {train.seed: [0, 1], prompts.count: [1, 2, 4]}\n"
    )
    arguments = f"{file} --out {tmp_path}/s --set train.max_steps=2"
    done = submit_sweep(
        commands, "--nodes=2", "--account=me", "-p", "gpu", "--", *arguments.split()
    )
    assert done.stdout == "array 1, table in job 2\n", done.stderr
    first, second = calls(commands)
    assert (
        first == "sbatch --parsable --array=0-5 --nodes=2 --account=me -p gpu slurm/sweep.sbatch"
        f" {arguments}"
    )
    assert second.startswith(
        "sbatch --parsable --account=me -p gpu --dependency=afterany:1 --ntasks=1 "
    )
    assert second.endswith(f"slurm/sweep.sbatch {arguments}")


def test_a_wrong_sweep_is_not_submitted(tmp_path: Path, commands: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: s\nconfigs: [demo]\ngrid: {train.sed: [0, 1]}\n")
    done = submit_sweep(commands, "--", str(file))
    assert done.returncode == 2
    assert "did you mean 'train.seed'?" in done.stderr
    assert calls(commands) == []


def test_every_option_of_a_site_is_read() -> None:
    ours = re.findall(
        r"^#?(?:: \"\$\{)?(SPT_\w+):?=",
        (ROOT / "slurm" / "site.env.example").read_text(),
        re.MULTILINE,
    )
    text = "".join(path.read_text() for path in (ROOT / "slurm" / "common.sh", *SCRIPTS))
    text += "".join(path.read_text() for path in (ROOT / "spt_ds").rglob("*.py"))
    assert ours
    assert [name for name in ours if name not in text] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_started_by_hand_says_how_to_start_it(script: Path) -> None:
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode != 0
    assert "sbatch" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", "slurm/common.sh", *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
