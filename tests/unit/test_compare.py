"""`spt-ds compare`: grouping by recipe, gains over the baseline, and runs that must not be
compared.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from spt_ds.errors import DataError
from spt_ds.evaluate import command, scores_json
from spt_ds.evaluate.compare_command import main
from spt_ds.evaluate.comparison import Comparison, Group, compare
from spt_ds.evaluate.scores_json import evaluate
from spt_ds.evaluate.text_metrics import clean, f1_spt
from spt_ds.run.predictions import read_predictions

REFERENCES = ["i like my dogs .", "me too , a lot", "hello there friend", "i work as a nurse ."]


def run(
    folder: Path,
    replies: list[str],
    *,
    name: str | None = None,
    seed: int = 0,
    lr: float = 1e-3,
    **extra: Any,
) -> Path:
    """A run folder with predictions and, if it has a name, a configuration."""
    folder.mkdir()
    rows = [
        {
            "index": place,
            "id": str(place),
            "dialogue_id": str(place),
            "reference": reference,
            "raw": reply,
            **extra,
        }
        for place, (reply, reference) in enumerate(zip(replies, REFERENCES, strict=True))
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name is not None:
        (folder / "config.yaml").write_text(
            f"name: {name}\ntrain: {{seed: {seed}}}\noptim: {{lr: {lr}}}\n"
        )
    return folder


def f1(folder: Path) -> float:
    return evaluate(folder).values["f1_spt"]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return {
        "base": run(tmp_path / "base", ["i like dogs"] * 4),
        "spt0": run(
            tmp_path / "spt0",
            ["i like my dogs", "me too", "hello", "a nurse ."],
            name="spt",
            seed=0,
        ),
        "spt1": run(
            tmp_path / "spt1", ["my dogs", "me", "hello there", "a nurse"], name="spt", seed=1
        ),
    }


def test_seeds_of_a_recipe_are_averaged_and_set_against_the_baseline(runs: dict[str, Path]) -> None:
    found = compare([runs["spt0"], runs["spt1"], runs["base"]], runs["base"], average_seeds=True)
    assert [group.name for group in found.groups] == ["base", "spt"]
    assert [len(group.runs) for group in found.groups] == [1, 2]
    one, other, base = f1(runs["spt0"]), f1(runs["spt1"]), f1(runs["base"])
    spt = found.groups[1]
    assert spt.mean["f1_spt"] == pytest.approx((one + other) / 2)
    assert spt.std["f1_spt"] == pytest.approx(abs(one - other) / 2**0.5)
    assert found.baseline.std == {}
    gain = (one + other) / 2 - base
    assert found.gains(spt)["f1_spt"] == pytest.approx((gain, 100 * gain / base))
    assert set(found.gains(found.baseline).values()) <= {(0.0, 0.0), (0.0, None)}
    dist = [found.gains(spt)[key][1] for key in ("dist1", "dist2")]
    assert found.diversity_gain(spt) == pytest.approx(
        sum(part for part in dist if part is not None) / 2
    )


def generated(folder: Path, **options: Any) -> Path:
    """As `spt-ds generate` tells it beside the predictions."""
    digest = hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    record = {
        "identity": "x",
        "predictions_sha256": digest,
        "checkpoint": "step-1",
        "config": {"generate": options},
    }
    (folder / "generate.json").write_text(json.dumps(record))
    return folder


def test_replies_generated_with_other_options_are_told_apart(runs: dict[str, Path]) -> None:
    """Options of generation are set on its command line: training's configuration cannot tell."""
    one, other = generated(runs["spt0"], mode="select"), generated(runs["spt1"], mode="random")
    assert (
        compare([one, other], runs["base"], average_seeds=True).notes[0]
        == f"spt: {other} differs from {one} in generate.mode"
    )
    (other / "predictions.jsonl").write_bytes(
        (one / "predictions.jsonl").read_bytes()
    )  # the record is of other ones
    generated(one, mode="select")
    assert "differs" in compare([one, other], runs["base"], average_seeds=True).notes[0]
    (one / "generate.json").unlink()
    notes = compare([one, other], runs["base"], average_seeds=True).notes
    assert not any("differs" in note for note in notes)


def test_a_damaged_record_is_named(runs: dict[str, Path]) -> None:
    (runs["spt0"] / "generate.json").write_text("{")
    with pytest.raises(
        DataError, match=r"spt0/generate.json: cannot be read .*`spt-ds generate` writes it"
    ):
        compare([runs["spt0"]], runs["base"])


def test_the_papers_diversity_gain_follows_from_its_table() -> None:
    def group(name: str, dist1: float, dist2: float) -> Group:
        return Group(name, [], {"dist1": dist1, "dist2": dist2}, {})

    spt = group("spt", 5.69, 22.86)
    found = Comparison([group("pt", 2.80, 12.91), spt], [])
    assert found.diversity_gain(spt) == pytest.approx(90.1, abs=0.1)


def test_wide_table_has_tested_gains_below_each_row(runs: dict[str, Path]) -> None:
    found = compare([runs["base"], runs["spt0"], runs["spt1"]], average_seeds=True)
    table = found.wide()
    assert list(table.columns)[:8] == [
        "recipe",
        "runs",
        "F1",
        "BLEU",
        "R-1",
        "R-2",
        "R-L",
        "DIST-1",
    ]
    labels = ["base", "spt", "  gain", "  gain %", "  95 %", "  p"]
    assert [row[0] for row in table.rows] == labels
    spt = found.groups[1]
    assert table.rows[1][2] == f"{spt.mean['f1_spt']:.2f} ± {spt.std['f1_spt']:.2f}"
    gain, percent = found.gains(spt)["f1_spt"]
    test = found.tests["spt"]["f1_spt"]
    assert table.rows[2][2] == f"{gain:+.2f}"
    assert table.rows[3][2] == f"{percent:+.1f}"
    assert table.rows[4][2] == f"{test.low:+.2f} to {test.high:+.2f}"
    assert table.rows[5][2] == f"{test.p:.4f}"


def test_each_run_is_a_row_and_the_first_is_the_baseline(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of one recipe, too: a reader who names two wants them compared."""
    found = compare([runs["spt1"], runs["spt0"], runs["base"]])
    assert [group.name for group in found.groups] == ["spt1", "spt0", "base"]
    assert found.wide().columns[0] == "run"
    assert main([str(runs["spt1"]), str(runs["spt0"])]) == 0
    shown = capsys.readouterr().out
    head, _, first, *_ = shown.splitlines()
    assert head.split() == ["metric", "spt1", "spt0", "gain", "gain", "%", "95", "%", "p"]
    assert first.split()[:3] == ["F1", f"{f1(runs['spt1']):.2f}", f"{f1(runs['spt0']):.2f}"]
    assert max(map(len, shown.splitlines()[:15])) < 80  # a terminal's width
    assert "gains are over spt1; 95 % intervals and p-values are paired over 4 dialogues" in shown
    assert main([str(runs["spt1"]), str(runs["spt0"]), "--baseline", str(runs["base"])]) == 0
    assert capsys.readouterr().out.split()[:3] == ["metric", "base", "spt1"]


def test_a_run_alone_has_nothing_to_be_compared_with(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs["base"]), str(runs["base"])]) == 2
    assert "base is the only run; name another one" in capsys.readouterr().err
    assert main([str(runs["spt0"]), str(runs["spt1"]), "--average-seeds"]) == 2
    assert "spt is the only recipe; name another one" in capsys.readouterr().err


def test_rows_of_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = []
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        folders.append(run(tmp_path / parent / "demo", REFERENCES, name="demo"))
    folders.append(run(tmp_path / "other", REFERENCES, name="demo"))
    names = [group.name for group in compare(folders).groups]
    assert names == ["one/demo", "two/demo", "other"]


def test_gains_are_tested_as_scipy_tests_them(runs: dict[str, Path]) -> None:
    """A dialogue has one turn here, so a gain in F1 is a mean of differences."""
    found = compare([runs["base"], runs["spt0"]])
    expected = stats.ttest_rel(f1_of_rows(runs["spt0"]), f1_of_rows(runs["base"]))
    bounds = expected.confidence_interval(0.95)
    pair = found.tests["spt0"]["f1_spt"]
    assert pair.difference == pytest.approx(found.gains(found.groups[1])["f1_spt"][0])
    assert pair.p == pytest.approx(expected.pvalue)
    assert (pair.low, pair.high) == pytest.approx((bounds.low, bounds.high))


def f1_of_rows(folder: Path) -> list[float]:
    rows = read_predictions(folder).rows
    return [100 * f1_spt(clean(row.raw), row.reference) for row in rows]


def test_seeds_that_are_averaged_are_tested_together(runs: dict[str, Path]) -> None:
    found = compare([runs["base"], runs["spt0"], runs["spt1"]], average_seeds=True)
    seeds = np.mean([f1_of_rows(runs["spt0"]), f1_of_rows(runs["spt1"])], axis=0)
    expected = stats.ttest_rel(seeds, f1_of_rows(runs["base"]))
    assert found.tests["spt"]["f1_spt"].p == pytest.approx(expected.pvalue)
    for key, pair in found.tests["spt"].items():
        assert pair.difference == pytest.approx(found.gains(found.groups[1])[key][0])


def test_a_gain_without_predictions_is_not_tested_and_says_so(runs: dict[str, Path]) -> None:
    assert command.main([str(runs["spt0"])]) == 0
    (runs["spt0"] / "predictions.jsonl").unlink()
    found = compare([runs["base"], runs["spt0"]])
    assert found.tests == {"spt0": {}}
    assert [row[0] for row in found.wide().rows] == ["base", "spt0", "  gain", "  gain %"]
    assert any("spt0: its gains are not tested" in note for note in found.notes)


def test_runs_over_other_bases_and_tokens_are_told(tmp_path: Path) -> None:
    one = run(tmp_path / "one", REFERENCES, nll_sum=4.0, nll_tokens=4)
    other = run(tmp_path / "other", REFERENCES, nll_sum=4.0, nll_tokens=5)
    for folder in (one, other):
        (folder / "config.yaml").write_text(f"model: {{base: base-{folder.name}}}\n")
    found = compare([one, other])
    notes = "\n".join(found.notes)
    assert "other: its base is 'base-other', that of one 'base-one'" in notes
    assert "PPL/token has no gain; compare PPL/word" in notes
    gains = found.gains(found.groups[1])
    assert "ppl_token" not in gains
    assert "ppl_token" not in found.tests["other"]
    assert {"ppl_word", "f1_spt"} <= gains.keys() & found.tests["other"].keys()


def test_a_gain_over_zero_has_no_percentage(tmp_path: Path) -> None:
    zero = run(tmp_path / "zero", ["x"] * 4)
    found = compare([run(tmp_path / "some", REFERENCES)], zero)
    assert found.gains(found.groups[1])["f1_spt"] == (100.0, None)
    place = list(found.wide().columns).index("F1")
    cells = [row[place] for row in found.wide().rows]
    assert cells == [0.0, 100.0, "+100.00", None, "+100.00 to +100.00", "< 0.0001"]
    assert found.diversity_gain(found.groups[1]) is None  # DIST-2 of single words is 0


def test_a_metric_counts_only_where_all_seeds_have_it(tmp_path: Path) -> None:
    with_nll = run(tmp_path / "a", REFERENCES, name="spt", seed=0, nll_sum=4.0, nll_tokens=4)
    without = run(tmp_path / "b", REFERENCES, name="spt", seed=1)
    base = run(tmp_path / "base", REFERENCES, nll_sum=8.0, nll_tokens=4)
    found = compare([with_nll, without], base, average_seeds=True)
    assert "ppl_token" in found.baseline.mean
    assert "ppl_token" not in found.groups[1].mean
    assert any(note.startswith("perplexity skipped in b: ") for note in found.notes)


def test_scores_count_only_with_their_predictions(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main([str(runs["base"])]) == 0
    expected = f1(runs["base"])
    with monkeypatch.context() as patch:
        patch.setattr(scores_json, "scores_of", lambda metrics: pytest.fail("scored again"))
        assert compare([], runs["base"]).baseline.mean["f1_spt"] == pytest.approx(expected)
        (runs["base"] / "predictions.jsonl").rename(runs["base"] / "moved")
        assert compare([], runs["base"]).baseline.mean["f1_spt"] == pytest.approx(expected)
    stale = (runs["base"] / "moved").read_text().replace("i like dogs", "me too")
    (runs["base"] / "predictions.jsonl").write_text(stale)
    assert (
        compare([], runs["base"]).baseline.mean["f1_spt"]
        == pytest.approx(f1(runs["base"]))
        != expected
    )


def test_predictions_may_lie_in_the_folder_of_generate(runs: dict[str, Path]) -> None:
    expected = compare([runs["spt0"]], runs["base"])
    (runs["spt0"] / "generate").mkdir()
    (runs["spt0"] / "predictions.jsonl").rename(runs["spt0"] / "generate" / "predictions.jsonl")
    found = compare([runs["spt0"]], runs["base"])
    assert found.groups[1].name == "spt0"
    assert found.wide() == expected.wide()
    # The folder itself goes before its folder `generate`.
    (runs["spt0"] / "predictions.jsonl").write_text(
        (runs["base"] / "predictions.jsonl").read_text()
    )
    assert f1(runs["spt0"]) == f1(runs["base"])


def test_a_run_named_twice_counts_once(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs["base"].parent)
    found = compare(["base", runs["base"], "./spt0"], runs["base"])
    assert [(group.name, len(group.runs)) for group in found.groups] == [("base", 1), ("spt0", 1)]


def test_repeated_seeds_and_differing_options_are_noted(tmp_path: Path) -> None:
    first = run(tmp_path / "a", REFERENCES, name="spt", seed=3)
    second = run(tmp_path / "b", REFERENCES, name="spt", seed=3, lr=5e-4)
    notes = compare([first, second], average_seeds=True).notes
    assert any("seeds [3, 3] repeat" in note for note in notes)
    assert any(note.endswith(f"{second} differs from {first} in optim.lr") for note in notes)
    third = run(tmp_path / "c", REFERENCES, name="spt", seed=4)
    notes = compare([first, third], average_seeds=True).notes
    assert not [note for note in notes if "skipped" not in note]


def test_runs_on_other_examples_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    path = runs["spt1"] / "predictions.jsonl"
    path.write_text(path.read_text().replace("hello there friend", "hello friend"))
    with pytest.raises(
        DataError,
        match=r"spt1: data_sha256 is .* in the baseline .*base; runs are compared on the same",
    ):
        compare([runs["spt0"], runs["spt1"]], runs["base"])


def test_runs_scored_otherwise_are_refused(runs: dict[str, Path]) -> None:
    assert command.main([str(runs["spt0"]), "--ead-vocabulary", "32000"]) == 0
    with pytest.raises(DataError, match="ead_vocabulary is 32000, but 50265 in the baseline"):
        compare([runs["spt0"]], runs["base"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1\ntrain: 2\n", "config.yaml:2: not YAML"),
        ("- a\n", "config.yaml: got a list, expected keys"),
        ("name: 3\n", "config.yaml: name is 3, expected a string"),
        ("train: {seed: x}\n", "config.yaml: train.seed is 'x', expected a whole number"),
    ],
)
def test_a_broken_configuration_is_named(text: str, message: str, runs: dict[str, Path]) -> None:
    (runs["base"] / "config.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        compare([], runs["base"])
    assert str(caught.value).startswith(f"{runs['base']}/{message}")


def test_missing_folders_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "no"), "--baseline", str(tmp_path / "no")]) == 2
    assert "no: no such run folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--baseline", str(tmp_path / "empty")]) == 2
    assert "no such predictions file" in capsys.readouterr().err


def test_command_prints_and_writes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(runs["spt0"]),
        str(runs["spt1"]),
        "--average-seeds",
        "--baseline",
        str(runs["base"]),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "spt: mean gain of DIST-1 and DIST-2 over base " in shown
    found = compare([runs["spt0"], runs["spt1"]], runs["base"], average_seeds=True)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    row = next(row for row in rows if (row["recipe"], row["metric"]) == ("spt", "f1_spt"))
    assert float(row["gain"]) == found.gains(found.groups[1])["f1_spt"][0]
    test = found.tests["spt"]["f1_spt"]
    assert (float(row["gain_low"]), float(row["p"])) == (test.low, test.p)
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert data["recipes"][1]["mean"] == found.groups[1].mean
    assert data["recipes"][1]["tests"]["f1_spt"] == {
        "low": test.low,
        "high": test.high,
        "p": test.p,
    }
    assert [run["seed"] for run in data["recipes"][1]["runs"]] == [0, 1]
    assert (tmp_path / "out" / "compare.md").read_text() == found.wide().markdown()
    assert r"$\pm$" in (tmp_path / "out" / "compare.tex").read_text()
