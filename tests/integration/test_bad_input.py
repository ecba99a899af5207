"""What a user can get wrong ends in one clear message, exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spt_ds import train
from spt_ds.run import job
from spt_ds.run.folder import RunFolder
from spt_ds.run.lock import only_start
from tests.helpers.ranks import run_ranks


def run(run_dir: Path, *overrides: str, deepspeed_config: str | None = None) -> tuple[int, str]:
    """Train in a rank of its own, so that process groups and signal handlers do not leak between
    tests.
    """
    code, text = run_ranks(1, _train, str(run_dir), overrides, deepspeed_config, timeout_s=60)[0]
    return code, text


def _train(
    world: object, run_dir: str, overrides: tuple[str, ...], deepspeed_config: str | None
) -> tuple[int, str]:
    import contextlib
    import io

    argv = ["--config", "demo", "--run-dir", run_dir]
    for override in ("train.max_steps=1", "data.workers=0", *overrides):
        argv += ["--set", override]
    if deepspeed_config is not None:
        argv += ["--deepspeed_config", deepspeed_config]
    spoken = io.StringIO()
    with contextlib.redirect_stderr(spoken):
        code = train.main(argv)
    from spt_ds import dist

    dist.init(30)
    return code, spoken.getvalue()


BAD_DATA = {
    "missing": (None, "nowhere.txt"),
    "empty": (b"", "bad.txt"),
    "no tab": (b"1 your persona: i sing.\n2 hello there\n", "bad.txt:2"),
    "late persona": (b"1 hi\thello\n2 your persona: i sing.\n", "bad.txt:2"),
    "not utf-8": (b"1 your persona: i s\xffng.\n2 hi\thello\n", "bad.txt:1"),
    "long reply": (b"1 hi\t" + b"hello there " * 300 + b"\n", "bad.txt"),
}


@pytest.mark.parametrize("name", list(BAD_DATA))
def test_data_files(name: str, tmp_path: Path) -> None:
    content, where = BAD_DATA[name]
    path = tmp_path / ("nowhere.txt" if content is None else "bad.txt")
    if content is not None:
        path.write_bytes(content)
    code, text = run(tmp_path / "run", f"data.train={path}", f"data.cache_dir={tmp_path / 'cache'}")
    assert code == 2
    assert where in text
    assert "Traceback" not in text
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("prompts.count=0", "prompts.count"),
        ("data.max_tokens=5000", "data.max_tokens"),
        ("model.base=./no-such-folder", "model.base: no folder ./no-such-folder"),
        ("model.attention=flash", "strict"),
    ],
)
def test_configuration(override: str, part: str, tmp_path: Path) -> None:
    code, text = run(tmp_path / "run", override, "engine.strict=true")
    assert code == 2
    assert part in text
    assert "Traceback" not in text


def test_base_folder_without_weights(tmp_path: Path) -> None:
    from importlib import resources
    from shutil import copy

    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        copy(str(resources.files("spt_ds") / "assets" / "base" / name), base)
    code, text = run(tmp_path / "run", f"model.base={base}")
    assert code == 2
    assert "no weights can be loaded" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read the DeepSpeed file"),
        (b"{\xff}", "not UTF-8 text"),
        (b'{"zero": 1}', "problem(s)"),
    ],
)
def test_a_bad_deepspeed_file_leaves_no_folder(
    content: bytes | None, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    code, text = run(tmp_path / "run", deepspeed_config=str(path))
    assert code == 2
    assert part in text
    assert "--run-dir" not in text
    assert not (tmp_path / "run").exists()


def test_the_mended_command_starts_and_another_one_is_refused_when_done(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "data.train=nowhere.txt")[0] == 2
    assert run(tmp_path / "run")[0] == 0
    assert run(tmp_path / "run")[0] == 0  # nothing to do
    code, text = run(tmp_path / "run", "train.seed=5")
    assert code == 2
    assert "train.seed: 0 -> 5" in text


@pytest.mark.parametrize(("local_rank", "speaks"), [("0", True), ("1", False)])
def test_a_host_without_the_configuration_says_so_once(
    tmp_path: Path, local_rank: str, speaks: bool
) -> None:
    """Ranks 2 and 3 of a second host on which the file is not mounted."""
    place = {"RANK": str(2 + int(local_rank)), "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}
    command = [sys.executable, "-m", "spt_ds.train", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(
        command, env={**os.environ, **place}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert ("none.yaml" in done.stderr) is speaks


def _speaks_twice(world: object, run_dir: str) -> list[int]:
    """Two starts with the same address, port and parent; how often this rank speaks in each."""
    import contextlib
    import io

    from spt_ds.config.load import load_config
    from spt_ds.dist import barrier

    counts = []
    for _ in range(2):
        job.join(load_config("demo", []), RunFolder(Path(run_dir)))
        spoken = io.StringIO()
        with contextlib.redirect_stderr(spoken):
            job._speak(RunFolder(Path(run_dir)), "error: x")
        counts.append(spoken.getvalue().count("error: x"))
        barrier()
    return counts


def test_each_start_speaks_once(tmp_path: Path) -> None:
    """A claim of the first start stayed, and silenced every later one with the same port and
    parent.
    """
    first, second = run_ranks(2, _speaks_twice, str(tmp_path))
    assert [a + b for a, b in zip(first, second, strict=True)] == [1, 1]


def test_a_lost_peer_is_told_once_on_each_host_unless_a_rank_told_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hosts see different things when a link is cut; a rank's own fault explains what the
    others see.
    """
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(job, "_started", ["here"])
    for host in ("a", "a", "b"):
        job._speak(RunFolder(tmp_path), f"seen from {host}", host)
    told = capsys.readouterr().err
    assert [told.count(f"seen from {host}") for host in "ab"] == [1, 1]
    job._speak(RunFolder(tmp_path), "the cause")
    job._speak(RunFolder(tmp_path), "seen from c", "c")
    told = capsys.readouterr().err
    assert "the cause" in told
    assert "seen from c" not in told


def _two_files(world: object, folder: str) -> str:
    from spt_ds import dist, errors

    assert isinstance(world, dist.World)
    try:
        dist.same_everywhere("data.train", f"hash of rank {world.rank}")
    except errors.EngineError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_files_all_say_so(tmp_path: Path) -> None:
    messages = run_ranks(2, _two_files, str(tmp_path))
    assert messages[0] == messages[1]
    assert (
        "data.train differs between ranks: ranks [0]: hash of rank 0; ranks [1]: hash of rank 1"
        in messages[0]
    )


def test_a_second_training_in_a_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with only_start(folder.path, "wait"):
        before = sorted(folder.path.iterdir())
        code, text = run(folder.path)
        assert sorted(path for path in folder.path.iterdir() if path.name != "errors") == before
    assert code == 2
    assert "another start works in this folder (host '" in text
    assert f"pid {os.getpid()}" in text
    assert "give another --run-dir" in text
    assert run(folder.path, "data.max_valid_examples=4", "train.global_batch=4")[0] == 0
    assert folder.done.is_file()
    assert not (folder.path / ".lock").exists()
