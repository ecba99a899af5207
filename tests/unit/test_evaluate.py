"""`spt-ds evaluate`: scores of a file, its written tables, and what may be missing."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from spt_ds import cli
from spt_ds.errors import DataError
from spt_ds.evaluate import command, rouge_bert, significance, text_metrics
from spt_ds.evaluate.columns import METRIC_OF, METRICS, PAPER_COLUMNS
from spt_ds.evaluate.corpus_metrics import corpus_metrics
from spt_ds.evaluate.scores_json import evaluate, load_scores
from spt_ds.evaluate.tables import Table
from spt_ds.run.predictions import read_predictions
from tests.helpers.predictions import TALK, changed, lines, set_field, write


def test_scores_of_a_file_are_those_of_its_cleaned_replies(tmp_path: Path) -> None:
    found = evaluate(write(tmp_path / "predictions.jsonl", lines()))
    replies, references = (
        [text_metrics.clean(raw) for _, raw, _, _ in TALK],
        [reference for _, _, reference, _ in TALK],
    )
    pairs = list(zip(replies, references, strict=True))
    assert found.values["f1_spt"] == pytest.approx(
        100 * np.mean([text_metrics.f1_spt(*pair) for pair in pairs])
    )
    assert found.values["dist2"] == pytest.approx(text_metrics.dist(replies, 2))
    assert found.values["ead1"] == pytest.approx(text_metrics.ead(replies, 1, 50265))
    assert found.values["reply_words"] == pytest.approx((4 + 2 + 0 + 5 + 4) / 5)
    assert found.values["empty_replies"] == pytest.approx(20.0)
    rouge = rouge_bert.rouge_rows(replies, references).mean(axis=0) * 100
    assert [found.values[key] for key in ("rouge1", "rouge2", "rougeL")] == pytest.approx(
        rouge.tolist()
    )
    assert found.prompt_counts == [1, 3, 0, 1]
    expected_entropy = -(0.6 * np.log(0.6) + 2 * 0.2 * np.log(0.2)) / np.log(4)
    assert found.values["prompt_entropy"] == pytest.approx(expected_entropy)
    assert found.lengths["new_tokens"] == {"mean": 6.0, "min": 4.0, "median": 6.0, "max": 8.0}
    assert (found.settings.examples, found.settings.dialogues) == (5, 3)
    order = [metric.key for metric in METRICS]
    assert [order.index(key) for key in found.values] == sorted(
        order.index(key) for key in found.values
    )


def test_paper_columns_stand_in_the_papers_order() -> None:
    labels = {metric.key: metric.label for metric in METRICS}
    expected = [
        "F1",
        "BLEU",
        "R-1",
        "R-2",
        "R-L",
        "BERT-F1",
        "BERT-P",
        "BERT-R",
        "DIST-1",
        "DIST-2",
    ]
    assert [labels[key] for key in PAPER_COLUMNS] == expected


def test_perplexity_per_token_and_per_word_by_hand(tmp_path: Path) -> None:
    rows = lines()
    for row, nll, tokens in zip(rows, (2.0, 4.0, 6.0, 8.0, 10.0), (3, 3, 4, 5, 5), strict=True):
        row.update(nll_sum=nll, nll_tokens=tokens)
    found = evaluate(write(tmp_path / "predictions.jsonl", rows))
    words = sum(len(reference.split()) for _, _, reference, _ in TALK)
    assert found.values["ppl_token"] == pytest.approx(np.exp(30 / 20))
    assert found.values["ppl_word"] == pytest.approx(np.exp(30 / words))
    assert "perplexity" not in found.skipped


def test_a_file_without_prompt_or_nll_says_what_it_lacks(tmp_path: Path) -> None:
    rows = lines()
    for row in rows:
        row.update(prompt=None, scores=[])
    found = evaluate(write(tmp_path / "predictions.jsonl", rows))
    assert "--ppl" in found.skipped["perplexity"]
    assert "names no prompt" in found.skipped["prompt use"]
    assert found.prompt_counts == []
    assert not {"ppl_token", "prompt_entropy"} & found.values.keys()


def test_intervals_hold_the_value_and_stay_within_the_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", lines())
    scores = evaluate(path)
    assert scores == evaluate(path)  # nothing is drawn at random
    assert scores.intervals.keys() == scores.values.keys()
    for key, (low, high) in scores.intervals.items():
        assert low <= scores.values[key] <= high <= METRIC_OF[key].most
    assert scores.intervals["empty_replies"][1] > 90.0  # three dialogues tell little
    assert scores.settings.interval_method == significance.METHOD


def test_one_dialogue_has_no_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "predictions.jsonl", lines()[:2])
    assert evaluate(path).intervals == {}
    assert command.main([str(path)]) == 0
    assert "intervals skipped: all examples are of one dialogue" in capsys.readouterr().out
    assert command.main([str(path), "--against", str(path)]) == 2
    assert "a comparison needs two or more" in capsys.readouterr().err


def test_a_missing_file_names_what_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    expected = (
        f"{tmp_path}/predictions.jsonl: no such predictions file; `spt-ds generate` writes one"
    )
    assert capsys.readouterr().err == f"spt-ds evaluate: {expected}\n"


def test_command_writes_json_csv_markdown_and_latex(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run" / "predictions.jsonl", lines())
    other = write(tmp_path / "other.jsonl", changed(set_field(1, "raw", "me too , a lot")))
    assert (
        command.main(
            [
                str(path),
                "--out",
                str(tmp_path / "out"),
                "--against",
                str(other),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "scores.json").read_text())
    f1 = data["values"]["f1_spt"]
    assert data["against"]["metrics"]["f1_spt"]["difference"] == pytest.approx(
        100 * (2 * 2 / 7 - 1) / 5
    )
    assert load_scores(tmp_path / "out" / "scores.json") == evaluate(path)
    table = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert (table[0]["metric"], float(table[0]["value"])) == ("F1", f1)
    head, _, values, _, difference, p = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert head.startswith("| system | F1 | BLEU | R-1 | R-2 | R-L | DIST-1 | DIST-2 |"), (
        "the paper's order"
    )
    assert values.startswith(f"| run | {f1:.2f} | {data['values']['bleu']:.2f} | ")
    assert difference.startswith(
        f"| difference | {data['against']['metrics']['f1_spt']['difference']:+.2f} | "
    )
    assert p.startswith(f"| p | {data['against']['metrics']['f1_spt']['p']:.4f} | ")
    assert (
        rf"run & {f1:.2f} & {data['values']['bleu']:.2f} & "
        in (tmp_path / "out" / "scores.tex").read_text()
    )
    assert f"{f1:.2f}" in shown.splitlines()[2]
    assert "prompts chosen: 0:1 1:3 2:0 3:1" in shown
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"scores.{end}" for end in ("json", "csv", "md", "tex")
    }
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]
    assert command.main([str(path.parent)]) == 0
    assert load_scores(path.parent / "scores.json") == evaluate(path)


def test_against_is_antisymmetric_and_even_with_itself(tmp_path: Path) -> None:
    ours = corpus_metrics(read_predictions(write(tmp_path / "a.jsonl", lines())))
    theirs = corpus_metrics(
        read_predictions(write(tmp_path / "b.jsonl", changed(set_field(1, "raw", "i like dogs ."))))
    )
    there, back = ours.against(theirs), theirs.against(ours)
    for key in ("f1_spt", "bleu", "dist1", "ead2"):
        assert there[key].difference == pytest.approx(
            ours.statistics[key].value() - theirs.statistics[key].value()
        )
        assert there[key].difference == pytest.approx(-back[key].difference)
        assert there[key].p == back[key].p
    itself = ours.against(ours)
    assert {(pair.difference, pair.p) for pair in itself.values()} == {(0.0, 1.0)}


def test_systems_with_banks_of_two_sizes_can_be_compared(tmp_path: Path) -> None:
    rows = lines()
    for row in rows:
        row.update(prompt=0, scores=[0.5])
    one = corpus_metrics(read_predictions(write(tmp_path / "a.jsonl", rows)))
    four = corpus_metrics(read_predictions(write(tmp_path / "b.jsonl", lines())))
    found = four.against(one)
    assert found.keys() == four.statistics.keys() - {"prompt_entropy"}


def test_perplexities_over_other_tokens_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tokens in (("a.jsonl", 3), ("b.jsonl", 4)):
        rows = [{**row, "nll_sum": 6.0 + row["index"], "nll_tokens": tokens} for row in lines()]
        write(tmp_path / name, rows)
    arguments = [str(tmp_path / "a.jsonl"), "--against", str(tmp_path / "b.jsonl")]
    assert command.main(arguments) == 0
    assert "PPL/token is not compared: the other file has other tokens" in capsys.readouterr().out
    compared = json.loads((tmp_path / "scores.json").read_text())["against"]["metrics"]
    assert "ppl_word" in compared
    assert "ppl_token" not in compared


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ead-vocabulary", "1"],
        ["--ead-vocabulary", "x"],
        ["--against"],
    ],
)
def test_wrong_arguments_end_with_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["p.jsonl", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_users_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "predictions.jsonl", lines())
    assert command.main([str(path), "--out", str(path)]) == 2
    assert "give another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file: Invalid JSON"),
        ("{}", "values: Field required"),
        ('{"values": {"bleu": "x"}}', "values.bleu:"),
    ],
)
def test_a_broken_scores_file_names_the_key(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(DataError) as caught:
        load_scores(tmp_path / "scores.json")
    assert str(caught.value).startswith(f"{tmp_path}/scores.json: {message}")


def test_missing_libraries_are_said_with_the_way_to_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rouge_bert, "find_spec", lambda name: None)
    assert command.main([str(write(tmp_path / "predictions.jsonl", lines()))]) == 0
    shown = capsys.readouterr().out
    assert (
        "ROUGE skipped: package rouge-score is not installed; install it with: pip install"
        " 'spt-ds[evaluate]'" in shown
    )
    assert (
        "BERTScore skipped: package bert-score is not installed; install it with: pip install"
        " bert-score" in shown
    )
    assert "R-1" not in shown


class FakeTensor:
    def __init__(self, values: list[float]) -> None:
        self.values = values

    def numpy(self) -> np.ndarray[Any, Any]:
        return np.asarray(self.values)


class FakeScorer:
    """Has the calls of bert_score.BERTScorer that are used, and refuses what the real one cannot
    do.
    """

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        self._tokenizer = types.SimpleNamespace(model_max_length=10**30)

    def score(
        self, candidates: list[str], references: list[str]
    ) -> tuple[FakeTensor, FakeTensor, FakeTensor]:
        assert self._tokenizer.model_max_length == 512
        assert all(candidate.strip() for candidate in candidates)
        sizes = [float(len(candidate)) for candidate in candidates]
        return (
            FakeTensor(sizes),
            FakeTensor([2 * size for size in sizes]),
            FakeTensor([3 * size for size in sizes]),
        )


def _hub(folder: Path, files: set[str]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        try_to_load_from_cache=lambda repo, name: str(folder / name) if name in files else None
    )


def test_bert_score_is_called_as_the_paper_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"config.json", "vocab.json", "merges.txt", "pytorch_model.bin"}
    modules = {
        "huggingface_hub": _hub(tmp_path, whole),
        "bert_score": types.SimpleNamespace(BERTScorer=FakeScorer),
    }
    monkeypatch.setattr(rouge_bert, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])
    assert rouge_bert.bert_missing() is None
    # Columns F1, precision, recall; a reply without a word scores 0 and is not handed over.
    assert rouge_bert.bert_rows(["ab", " ", "c"], ["x", "y", "z"]).tolist() == [
        [6, 2, 4],
        [0, 0, 0],
        [3, 1, 2],
    ]
    assert FakeScorer.made == [{"model_type": str(tmp_path), "num_layers": 40}]
    modules["huggingface_hub"] = _hub(tmp_path, whole - {"pytorch_model.bin"})
    assert "hf download microsoft/deberta-xlarge-mnli" in str(rouge_bert.bert_missing())


def test_hub_cache_lookup_has_the_form_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        importlib.import_module("huggingface_hub").try_to_load_from_cache(
            "no/such-model", "config.json"
        )
        is None
    )


def test_table_forms_escape_and_align() -> None:
    table = Table(["a|b", "x_%"], [["é|", 1.2345], ["long name", None], ["c", "1 ± 2"]])
    assert table.text().splitlines() == [
        "a|b          x_%",
        "----------------",
        "é|          1.23",
        "long name",
        "c          1 ± 2",
    ]
    assert table.markdown().splitlines()[:3] == [
        "| a\\|b | x_% |",
        "| --- | ---: |",
        "| é\\| | 1.23 |",
    ]
    assert table.csv() == "a|b,x_%\né|,1.2345\nlong name,\nc,1 ± 2\n"
    assert table.latex().splitlines()[2:6] == [
        r"a|b & x\_\% \\",
        r"\midrule",
        r"é| & 1.23 \\",
        r"long name &  \\",
    ]
    assert r"1 $\pm$ 2" in table.latex()


def test_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    commands = [
        line.partition("#")[0].split()[1:]
        for line in guide.splitlines()
        if line.startswith("spt-ds ")
    ]
    assert [words[0] for words in commands] == ["evaluate"] * 2 + ["compare"] * 2
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "pt", "spt-seed0", "spt-seed1"):
        write(tmp_path / "runs" / name / "generate" / "predictions.jsonl", lines())
    assert [cli.main(arguments) for arguments in commands] == [0, 0, 0, 0]
    assert (tmp_path / "runs" / "demo" / "generate" / "scores.json").is_file()
    assert (tmp_path / "tables" / "compare.tex").is_file()


def test_the_guide_defines_every_score() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [metric.key for metric in METRICS if f"`{metric.key}`" not in guide] == []


@pytest.mark.parametrize("module", ["command", "compare_command"])
def test_the_command_starts_without_torch_and_the_heavy_libraries(module: str) -> None:
    code = (
        f"import sys, spt_ds.evaluate.{module}\nprint([name for name in ('torch', 'transformers',"
        " 'scipy', 'nltk', 'sacrebleu') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_scoring_a_file_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", lines())
    code = (
        f"import sys\nfrom spt_ds.cli import main\nassert main(['evaluate', {str(path)!r},"
        "]) == 0\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False"
