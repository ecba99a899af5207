"""Trackers: each line once over kills and resumes, none stops a run, and no key gets out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spt_ds import log
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.run.folder import RunFolder
from spt_ds.run.metrics_file import Line, Mark
from spt_ds.track import trackers as module
from spt_ds.track.trackers import NOTHING, Trackers, chosen
from tests.helpers.fake_trackers import NAMES, Server, _Run, modules

SECRET = "planted-key-0123456789"
VALID_0 = Line(0, "valid", 1.0, {"nll": 3.0})
STEPS = [Line(n, "train", 1.0 + n, {"loss": 3.0 / n, "prompt_usage": [n, 1]}) for n in range(1, 7)]
VALID_2 = Line(2, "valid", 2.5, {"nll": 2.0})
BEGIN = Mark(0, True)
LINES = [VALID_0, *STEPS[:2], VALID_2, *STEPS[2:]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path / "server.jsonl")
    for name, fake in modules(made).items():
        monkeypatch.setitem(sys.modules, name, fake)
    for variable in ("WANDB_RUN_ID", "MLFLOW_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Warnings of the package."""
    monkeypatch.setattr(log, "_said", set())
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keep = Keep(logging.WARNING)
    log.get_logger().addHandler(keep)
    yield messages
    log.get_logger().removeHandler(keep)


def folder_in(path: Path) -> RunFolder:
    (path / "run").mkdir(exist_ok=True)
    return RunFolder(path / "run")


def start(folder: RunFolder, names: Any = NAMES, kept: Any = (), first: Mark = BEGIN) -> Trackers:
    trackers = Trackers(names, Config(name="mine"), folder)
    trackers.start(list(kept), first)
    return trackers


def send(trackers: Trackers, lines: list[Line]) -> None:
    for line in lines:
        trackers.log(line)
    trackers.close()


def history(lines: list[Line]) -> list[tuple[int, dict[str, float]]]:
    return [(line.step, line.numbers()) for line in lines]


def test_each_line_arrives_once_over_a_resume(tmp_path: Path, server: Server) -> None:
    """The second start makes steps 3 and 4 again, which arrived, and 5 and 6."""
    folder = folder_in(tmp_path)
    send(start(folder), LINES[:6])
    send(start(folder, kept=LINES[:4], first=Mark(3, False)), LINES[4:])
    for name in NAMES:
        assert server.steps_of(name) == history(LINES), name
        assert len({line["run"] for line in server.told(name, "log")}) == 1
        assert len(server.told(name, "close")) == 2
    assert [line["resume"] for line in server.told("wandb", "open")] == ["allow"] * 2
    assert len({line["run"] for line in server.told("wandb", "open")}) == 1
    assert len({line["run"] for line in server.told("trackio", "open")}) == 1
    assert len(server.told("mlflow", "open")) == 1  # the second start goes on with its id
    defined = {(line["name"], line["step_metric"]) for line in server.told("wandb", "define")}
    assert defined == {("step", None), ("*", "step")}


def test_what_a_killed_start_could_not_send_is_sent_later(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in(tmp_path)
    server.hangs_at = 2
    killed = start(folder)
    for line in LINES[:6]:
        killed.log(line)
    until = time.monotonic() + 10
    while any(len(server.steps_of(name)) < 2 for name in NAMES) and time.monotonic() < until:
        time.sleep(0.01)
    for name, fake in modules(Server(server.path)).items():  # the first start hangs for ever
        monkeypatch.setitem(sys.modules, name, fake)
    send(start(folder, kept=LINES[:4], first=Mark(3, False)), LINES[4:])
    for name in NAMES:
        assert server.steps_of(name) == history(LINES), name


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_kill_took_from_the_memory_of_a_service_is_sent_again(
    tmp_path: Path, server: Server, name: str
) -> None:
    folder = folder_in(tmp_path)
    send(start(folder, [name]), LINES[:6])
    server.lose(name, 3)  # the validation of step 2, and steps 3 and 4
    send(start(folder, [name], LINES[:4], Mark(3, False)), LINES[4:])
    found = history(LINES)
    if name == "trackio":  # knows its last step, not of what kind that was
        found.remove(history([VALID_2])[0])
    assert server.steps_of(name) == found


def test_an_offline_folder_that_a_kill_tore_is_written_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in(tmp_path)
    for number in range(3):
        own = folder.path / "wandb" / f"offline-run-{number}"
        own.mkdir(parents=True)
        monkeypatch.setattr(_Run, "offline", True)
        monkeypatch.setattr(_Run, "settings", SimpleNamespace(sync_dir=str(own)), raising=False)
        if number == 0:
            send(start(folder, ["wandb"]), LINES[:4])
        elif number == 1:
            torn = start(folder, ["wandb"], LINES[:4], Mark(3, False))
            torn.log(LINES[4])
            until = time.monotonic() + 10
            while len(server.steps_of("wandb")) < 5 and time.monotonic() < until:
                time.sleep(0.01)
            server.lose("wandb", 1)
        else:
            send(start(folder, ["wandb"], LINES[:4], Mark(3, False)), LINES[4:])
    assert server.steps_of("wandb") == history(LINES)
    left = sorted(path.name for path in (folder.path / "wandb").iterdir())
    assert left == ["offline-run-0", "offline-run-2", "torn-offline-run-1"]


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path: Path, server: Server) -> None:
    folder = folder_in(tmp_path)
    send(start(folder, ["mlflow"]), LINES[:4])
    send(start(folder, ["mlflow", "trackio"], LINES[:4], Mark(3, False)), LINES[4:])
    assert server.steps_of("mlflow") == server.steps_of("trackio") == history(LINES)


@pytest.mark.parametrize("revalidates", [False, True])
def test_tensorboard_forgets_what_is_made_again(tmp_path: Path, revalidates: bool) -> None:
    """Also its numbers: those of the start that was killed are not shown any more."""
    folder, place = folder_in(tmp_path), 3 if revalidates else 4
    killed = start(folder, ["tensorboard"])
    send(killed, [*LINES[:4], *(Line(n, "train", 0.0, {"loss": 99.0}) for n in (3, 4, 5))])
    time.sleep(1.1)  # the names of event files have whole seconds
    first = Mark(2, True) if revalidates else Mark(3, False)
    send(start(folder, ["tensorboard"], LINES[:place], first), LINES[place:])
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    found = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    count = sum(len(events.Scalars(name)) for name in events.Tags()["scalars"])
    expected = {(n, name): v for n, values in history(LINES) for name, v in values.items()}
    assert count == len(found) == len(expected)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_tracker_that_dies_is_said_once(tmp_path: Path, server: Server, said: list[str]) -> None:
    """The others go on, the key in its error stays where it is, and the next start tries again."""
    folder = folder_in(tmp_path)
    server.fails_at = 2
    send(start(folder, ["wandb"]), LINES)
    assert [step for step, _ in server.steps_of("wandb")] == [0, 1]
    assert len(said) == 1
    assert "wandb gets no more lines (ConnectionError: https://***@server refused ***" in said[0]
    assert SECRET not in said[0]
    server.fails_at = None
    send(start(folder, ["wandb"], LINES, Mark(7, False)), [])
    assert server.steps_of("wandb") == history(LINES)


def test_a_tracker_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, server: Server, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.3)
    monkeypatch.setattr(module, "WAITING_LINES", 4)
    server.hangs_at = 1
    started = time.monotonic()
    hung = start(folder_in(tmp_path), ["mlflow"])
    send(hung, LINES[:4])
    assert time.monotonic() - started < 30  # the tracker hangs for an hour
    assert ["mlflow gets no more" in message for message in said] == [True]


def test_a_full_disk_is_a_dead_tracker(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in(tmp_path)
    folder.tensorboard.write_text("no folder", encoding="utf-8")
    send(start(folder, ["tensorboard"]), LINES)
    assert ["tensorboard gets no more" in message for message in said] == [True]


def test_the_id_of_the_environment_names_a_new_run(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept one counts more: it is the run that this folder continues."""
    folder = folder_in(tmp_path)
    for variable in ("WANDB_RUN_ID", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(variable, "given")
    send(start(folder, ["wandb", "mlflow"]), LINES[:1])
    for variable in ("WANDB_RUN_ID", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(variable, "another")
    send(start(folder, ["wandb", "mlflow"], LINES[:1], Mark(1, False)), LINES[1:])
    runs = {line["run"] for name in ("wandb", "mlflow") for line in server.told(name, "log")}
    assert runs == {"given"}


def test_no_key_gets_into_the_folder_or_to_a_service(tmp_path: Path, server: Server) -> None:
    folder = folder_in(tmp_path)
    server.fails_at = 4
    send(start(folder), LINES)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    assert not any(SECRET in path.read_text(encoding="utf-8") for path in written)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
        with pytest.raises(ConfigError, match=rf"{name} cannot be imported.*spt-ds\[{name}\]"):
            chosen(["auto", name])


def test_auto_is_tensorboard_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(["auto"]) == chosen(["tensorboard"]) == chosen(["auto", "tensorboard"])
    assert chosen([]) == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert chosen(["auto"]) == []
    with pytest.raises(ConfigError, match=r"spt-ds\[tensorboard\]"):
        chosen(["tensorboard"])


def test_the_old_option_is_read_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_said", set())
    assert load_config("demo", ["log.tensorboard=true"]).log.trackers == ("tensorboard",)
    assert load_config("demo", ["log.tensorboard=false"]).log.trackers == ()
    [note] = log._said
    assert note.endswith("log.tensorboard (now log.trackers)")


def test_a_damaged_record_is_a_new_run(tmp_path: Path, server: Server) -> None:
    folder = folder_in(tmp_path)
    send(start(folder, ["wandb"]), LINES[:2])
    (folder.trackers / "wandb.json").write_text('{"id": "x", "sent": [')
    assert module._Record(folder.trackers / "wandb.json").sent == NOTHING
    send(start(folder, ["wandb"], LINES[:2], Mark(2, False)), LINES[2:])
    assert [step for step, _ in server.steps_of("wandb")] == [0, 1, 0, 1, 2, 2, 3, 4, 5, 6]
