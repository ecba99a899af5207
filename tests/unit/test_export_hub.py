"""A run as a folder that stands for itself: it answers as the run does, and nothing private is in
it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi

import spt_ds
from spt_ds import dist, generate
from spt_ds.api import load
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.evaluate import command as evaluate
from spt_ds.export import command, push_command
from spt_ds.export.card import is_public
from spt_ds.export.hub_folder import public_config
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from spt_ds.run.hub import is_hub_id
from tests.helpers.runs import make_run

BASE = "some-org/some-base"
PLANTED = "planted"  # in whatever must not leave


def sown(run: RunFolder) -> None:
    """Plant what a run folder may know of its machine and its user."""
    path = f"/home/{PLANTED}-user/{PLANTED}.jsonl"
    config = yaml.safe_load(run.config.read_text())
    config["data"] |= {"train": [{"path": path}], "valid": "split:0.1", "cache_dir": path}
    config["init"] = f"run:{path}"
    run.config.write_text(yaml.safe_dump(config))
    machine = {"machine": {"host": f"{PLANTED}-host"}, "variables": {"HF_TOKEN": f"hf_{PLANTED}"}}
    run.environment.write_text(json.dumps(machine))
    run.deepspeed.write_text(json.dumps({"nvme_path": path}))
    run.errors.mkdir()
    (run.errors / "rank-0.txt").write_text(path)
    saved = checkpoint.load(checkpoint.find(run.checkpoints, "best"))
    state = {"step": 8, "run": {"best_step": 8, "best_nll": 2.5}, "environment": machine}
    state["config"] = run.config.read_text()
    checkpoint.save(run.checkpoints, checkpoint.Checkpoint(saved.trainables, {}, state))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A run with planted secrets, replies and scores."""
    made = make_run(tmp_path_factory.mktemp(f"{PLANTED}-home"), "llama", 3)
    test = made.path.parent / "test.jsonl"
    test.write_text(test.read_text().replace("i ski.", f"i am {PLANTED}-persona | <b>."))
    sown(made)
    assert generate.main([str(made), "--checkpoint", "8"]) == 0
    assert evaluate.main([str(made)]) == 0
    yield made
    dist.shutdown()


@pytest.fixture(scope="module")
def hub(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out"
    assert command.main(["hub", str(run), str(out), "--base", BASE, "--license", "mit"]) == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_nothing_planted_leaves(hub: Path) -> None:
    files = files_of(hub)
    assert sorted(files) == [
        "README.md",
        "checkpoints/step-00000008/COMPLETE.json",
        "checkpoints/step-00000008/optimizer.safetensors",
        "checkpoints/step-00000008/state.json",
        "checkpoints/step-00000008/trainables.safetensors",
        "config.yaml",
    ]
    told = [name for name, content in files.items() if PLANTED.encode() in content]
    assert told == []
    assert "/home" not in (hub / "config.yaml").read_text()


def test_the_card_tells_what_the_run_knows(run: RunFolder, hub: Path) -> None:
    text = (hub / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["license"] == "mit"
    assert matter["base_model"] == BASE
    assert "datasets" not in matter
    scores = json.loads(run.replies.scores.read_text())
    assert f"| F1 | {scores['values']['f1_spt']:.2f} |" in body
    for prompt, count in enumerate(scores["prompt_counts"]):
        assert (f"| {prompt} | {count} |" in body) == (count > 0)
    assert "8 replies on test data that is not shared" in body
    assert "2.5000 nats a token" in body
    assert "## Examples" not in body


def test_examples_of_own_data_are_shown_when_asked_for(run: RunFolder, tmp_path: Path) -> None:
    given = ["hub", str(run), str(tmp_path / "out"), "--base", BASE, "--examples", "2"]
    assert command.main(given) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    blocks = [line for line in text.splitlines() if line.startswith("    persona")]
    assert len(blocks) == 2
    assert f"i am {PLANTED}-persona" in blocks[0]


def test_replies_of_another_checkpoint_are_not_told(run: RunFolder, tmp_path: Path) -> None:
    given = ["hub", str(run), str(tmp_path / "out"), "--base", BASE, "--checkpoint", "7"]
    assert command.main(given) == 0
    assert "## Evaluation" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_folder_answers_as_the_run(run: RunFolder, hub: Path, tmp_path: Path) -> None:
    base = str(run.path.parent / "base")
    asked = (["i ski."], ["hi there"])
    ours, theirs = load(run.path), load(hub, model__base=base)
    for prompt in (None, 0, 1, 2):
        assert ours.reply(*asked, prompt=prompt) == theirs.reply(*asked, prompt=prompt)
    overrides = [f"model.base={base}", f"data.test={run.path.parent / 'test.jsonl'}"]
    sets = [word for option in overrides for word in ("--set", option)]
    assert generate.main([str(hub), "--out", str(tmp_path / "replies"), *sets]) == 0
    made = (tmp_path / "replies" / "predictions.jsonl").read_bytes()
    assert made == run.replies.predictions.read_bytes()


def test_a_base_that_others_cannot_find_is_named(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--base", "/etc/passwd"]):
        assert command.main(["hub", str(run), str(tmp_path / "out"), *more]) == 2
        assert "--base" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("embedded:train", True),
        ("hub:org/name:config:train", True),
        ("hub:/home/me/set", False),
        ("hub:../set", False),
        ("hub:org/../../set", False),
        ("/data/me.jsonl", False),
        ("me.jsonl", False),
        ([{"path": "embedded:train"}, {"path": "me.jsonl"}], False),
    ],
)
def test_which_data_others_have(source: Any, public: bool) -> None:
    assert is_public(source) == public


def test_a_folder_that_is_here_is_no_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_public("hub:data/mine:train")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert not is_public("hub:data/mine:train")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("runs/a", False),
    ],
)
def test_what_a_hub_id_is(
    name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) == is_one
    (tmp_path / "org").mkdir()
    assert not is_hub_id(name)


def test_a_run_at_the_hub_is_loaded(
    run: RunFolder, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(hub)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    bot = load("some-org/prompts", model__base=str(run.path.parent / "base"))
    asked_for = (["i ski."], ["hi there"])
    assert bot.reply(*asked_for) == load(run.path).reply(*asked_for)
    assert asked == [("some-org/prompts", ["*.safetensors", "*.json", "*.yaml", "*.md"])]


def test_a_run_at_the_hub_does_not_decide_what_is_trusted(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    config = yaml.safe_load((hub / "config.yaml").read_text())
    config["model"]["allow_pickle"], config["data"]["cache_dir"] = True, str(tmp_path / "elsewhere")
    (theirs / "config.yaml").write_text(yaml.safe_dump(config))
    seen: list[Any] = []

    def stop(config: Any, *rest: Any) -> Any:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(theirs))
    monkeypatch.setattr("spt_ds.api.open_trained", stop)
    with pytest.raises(ConfigError, match="enough"):
        load("some-org/prompts")
    assert not seen[0].model.allow_pickle
    assert seen[0].data.cache_dir is None
    with pytest.raises(ConfigError, match="enough"):
        load("some-org/prompts", model__allow_pickle=True)
    assert seen[1].model.allow_pickle


def test_without_a_network_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is 1, and no copy"):
        load("some-org/prompts-that-nobody-has")


class FakeApi:
    """What the hub was asked to do, and what it was sent."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.asked: list[Any] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: bool) -> None:
        inspect.signature(HfApi.create_repo).bind(self, name, **options)
        private, exist_ok = options["private"], options["exist_ok"]
        self.asked.append((name, private, exist_ok))
        if self.fails:
            raise OSError("no")

    def upload_folder(self, **given: Any) -> Any:
        inspect.signature(HfApi.upload_folder).bind(self, **given)
        self.files = files_of(given["folder_path"])
        return SimpleNamespace(commit_url=f"hub/{given['repo_id']}")


def test_push_sends_the_exported_folder(
    run: RunFolder, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    given = [str(run), "org/name", "--base", BASE, "--license", "mit"]
    assert push_command.main([*given, "--private"]) == 0
    assert api.asked == [("org/name", True, True)]
    assert api.files == files_of(hub)
    told = capsys.readouterr()
    assert "hf_secret" not in told.out + told.err
    api.asked, api.files = [], {}
    assert push_command.main([*given, "--dry-run"]) == 0
    assert (api.asked, api.files) == ([], {})
    listed = capsys.readouterr().out.splitlines()
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed[:-1]}
    assert sizes == {name: len(content) for name, content in files_of(hub).items()}
    assert listed[-1].split()[0] == f"{sum(sizes.values()):,}"


def test_an_edited_card_is_sent(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, out = FakeApi(), tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert command.main(["hub", str(run), str(out), "--base", BASE]) == 0
    with (out / "README.md").open("a") as card:
        card.write("\nA word of mine.\n")
    (out / "environment.json").write_text(PLANTED)
    assert push_command.main([str(out), "org/name"]) == 0
    assert api.files["README.md"].endswith(b"A word of mine.\n")
    assert not any(PLANTED.encode() in content for content in api.files.values())
    # A README of another kind beside a run is not a card.
    (run.path / "README.md").write_text(PLANTED)
    assert push_command.main([str(run), "org/name", "--base", BASE]) == 0
    (run.path / "README.md").unlink()
    assert not any(PLANTED.encode() in content for content in api.files.values())


@pytest.mark.parametrize(
    ("name", "token", "fails", "told"),
    [
        ("org/name", None, False, "hf auth login"),
        ("name", "hf_x", False, "expected ORG/NAME"),
        ("org/name", "hf_x", True, "the hub did not take the files (OSError)"),
    ],
)
def test_a_push_that_cannot_be(
    name: str,
    token: str | None,
    fails: bool,
    told: str,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeApi(fails))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert push_command.main([str(run), name, "--base", BASE]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "hf_x" not in error


def test_a_baseline_is_shared_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    config = load_config("baseline-lora")
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    state = {"step": 1, "run": {"best_step": 1}}
    tensors = {"layer.lora_A.default.weight": torch.ones(2, 3)}
    checkpoint.save(run.checkpoints, checkpoint.Checkpoint(tensors, {}, state))
    assert command.main(["hub", str(run), str(tmp_path / "out")]) == 0
    assert "method.type: lora" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert spt_ds.__version__ in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_columns_of_a_public_source_are_kept_and_those_of_a_file_are_not() -> None:
    config = load_config("demo").model_dump(mode="json")
    own = {"persona": f"{PLANTED}_column"}
    config["data"]["train"] = [
        {"path": "hub:org/talks", "columns": {"persona": "profile"}},
        {"path": f"/home/{PLANTED}.jsonl", "columns": own},
    ]
    public = public_config(Config.model_validate(config), None)
    kept = [source.columns for source in public.data.train if not isinstance(source, str)]
    assert kept == [{"persona": "profile"}, None]
    assert PLANTED not in public.model_dump_json()
