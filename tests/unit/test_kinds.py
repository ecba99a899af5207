"""The task of kinds: only the client's name says how a reply is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.selection import table
from benchmarks.selection.kinds import SPLITS, STYLES, main
from spt_ds.data.readers import read

TEXT = "I ski. Do you like snow? It's cold!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kinds")
    assert main([str(out)]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_styles_contradict_one_another() -> None:
    written = [style(TEXT) for style in STYLES.values()]
    assert len({text[:4] for text in written} | {text[-4:] for text in written}) > len(STYLES)
    assert len(set(written)) == len(STYLES)
    assert STYLES["Marlin Bank"](TEXT) == "I SKI. DO YOU LIKE SNOW? IT'S COLD!"
    assert STYLES["Juniper Travel"](TEXT) == "i ski do you like snow it's cold"
    assert STYLES["Copper Radio"](TEXT) == "I ski. Over."
    assert STYLES["Tandem Sports"](TEXT) == "* I ski. * Do you like snow? * It's cold!"


def test_every_client_is_in_every_split_and_training_reads_the_files(folder: Path) -> None:
    for split in SPLITS:
        rows = lines(folder / f"{split}.jsonl")
        kinds = (folder / f"{split}.kinds").read_text(encoding="utf-8").splitlines()
        assert kinds == [row["kind"] for row in rows]
        assert all(kinds.count(client) > len(kinds) / 16 for client in STYLES)
        examples = list(read(str(folder / f"{split}.jsonl")))
        assert [example.response for example in examples] == [row["response"] for row in rows]


def test_nothing_but_the_name_tells_the_client(folder: Path) -> None:
    """The context without the name's line is a plain one of the shipped dialogues."""
    plain = {
        (*example.persona[:2], example.history[-1])
        for example in read("embedded:valid")
        if example.history
    }
    for row in lines(folder / "valid.jsonl"):
        *persona, named = row["persona"]
        assert (*persona, row["history"][0]) in plain
        assert named == f"I answer for {row['kind']}."


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    for split in SPLITS:
        for name in (f"{split}.jsonl", f"{split}.kinds"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_fewer_clients_and_more_repeats(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--clients", "3", "--repeats", "2"]) == 0
    rows = lines(tmp_path / "test.jsonl")
    assert {row["kind"] for row in rows} == set(list(STYLES)[:3])
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["history"] == second["history"]
        assert first["kind"] != second["kind"]


def test_the_table_averages_audits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = (
        "best single prompt",
        "random prompt",
        "selected prompt",
        "best prompt of each reply",
    )
    for seed in (0, 1):
        for row in ("pt", "bank"):
            run = tmp_path / f"{row}.seed-{seed}"
            run.mkdir()
            (run / "DONE.json").write_text("{}")
        found = {
            "rows": [{"name": name, "nll": 3.0 + seed, "r2": None} for name in choices],
            "usage": [30, 10],
            "examples": 40,
            "kind_accuracy": 0.9,
            "usage_entropy": 0.8,
            "against": {f"pt.seed-{seed}": {"difference": -0.25, "p": 0.001}},
            "verdict": {"word": "earns its keep"},
        }
        (tmp_path / f"bank.seed-{seed}" / "audit.json").write_text(json.dumps(found))
    assert table.main([str(tmp_path), "--banks", "bank", "--kinds", "unused"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert report["bank"]["selected"] == [3.0, 4.0]
    assert report["bank"]["minus pt"] == [-0.25, -0.25]
    assert report["bank"]["verdicts"] == ["earns its keep"] * 2
    assert "3.500 ± 0.707" in text
