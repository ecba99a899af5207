"""The task of kinds: only the client's name says how a reply is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.selection import table
from benchmarks.selection.kinds import SPLITS, STYLES, main
from spt_ds.data.readers import ASSETS, read

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


def saved(run: Path, losses: np.ndarray, scores: np.ndarray) -> None:
    run.mkdir()
    (run / "DONE.json").write_text("{}")
    count = len(losses)
    texts = json.dumps([[[], ["hi"], "yes", f"d{n // 2}"] for n in range(count)])
    np.savez(
        run / "measured.npz",
        losses=losses,
        scores=scores,
        tokens=np.full(count, 10.0),
        ensemble=losses.mean(axis=1),
        texts=texts,
    )


def test_the_table_compares_rows_and_averages_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["a", "b"] * 10
    (tmp_path / "kinds").write_text("".join(f"{kind}\n" for kind in kinds))
    for seed in (0, 1):
        one = np.full((20, 1), 30.0 + 10 * seed)
        saved(tmp_path / f"pt-64.seed-{seed}", one, np.zeros_like(one))
        two = np.where(np.eye(2)[[0, 1] * 10] > 0, 20.0, 50.0)  # each prompt is good for its kind
        saved(tmp_path / f"bank.seed-{seed}", two, -two)
    words = [str(tmp_path), "--against", "pt-64"]
    assert table.main([*words, "--kinds", str(tmp_path / "kinds")]) == 0
    text = capsys.readouterr().out
    bank = json.loads(text.splitlines()[-1])["bank"]
    assert bank["nll"] == [2.0, 2.0]
    assert bank["minus"] == pytest.approx([-1.0, -2.0])
    assert bank["best single"] == bank["random"] == [3.5, 3.5]
    assert bank["by kind"] == bank["oracle"] == [2.0, 2.0]
    assert (bank["kind %"], bank["entropy"]) == ([100.0, 100.0], [1.0, 1.0])
    assert "3.500 ± 0.707" in text  # pt-64 over its seeds
    assert f"{max(bank['p']):.4f}" in text
    assert table.main(words) == 0
    without = json.loads(capsys.readouterr().out.splitlines()[-1])["bank"]
    assert set(bank) - set(without) == {"by kind", "kind %"}


def test_the_shipped_clients_are_made_by_this_script(tmp_path: Path) -> None:
    names = ["Juniper Travel", "Quarry Tools", "Copper Radio", "Tandem Sports"]
    assert main([str(tmp_path), "--only", *names]) == 0
    made = sorted(file for file in tmp_path.iterdir())
    assert len(made) == 2 * len(SPLITS)
    for file in made:
        assert file.read_bytes() == (ASSETS / "clients" / file.name).read_bytes()
