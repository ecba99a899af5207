"""`spt-ds evaluate`: reading predictions, scores from a file, written tables, and what may be
missing.
"""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from spt_ds import cli
from spt_ds.errors import DataError
from spt_ds.evaluate import command, optional, scores
from spt_ds.evaluate.evaluation import evaluate, load_scores
from spt_ds.evaluate.measures import measure
from spt_ds.evaluate.predictions import check_same_examples, read_predictions
from spt_ds.evaluate.report_tables import Table

TALK = [  # (dialogue, raw, reference, prompt)
    ("a", "i like dogs .\nQ: and you ?", "i like my dogs .", 0),
    ("a", "me too", "me too , a lot", 1),
    ("b", "", "hello there", 1),
    ("b", "i am a nurse .", "i work as a nurse .", 1),
    ("c", "i like dogs .", "cats are nice .", 3),
]


def lines() -> list[dict[str, Any]]:
    """A small valid file as objects."""
    return [
        {
            "index": place,
            "id": f"{dialogue}-{place}",
            "dialogue_id": dialogue,
            "turn": place,
            "persona": ["i like dogs ."],
            "history": ["hi"],
            "reference": reference,
            "raw": raw,
            "reply": scores.clean(raw),
            "prompt": prompt,
            "scores": [0.1, 0.2, 0.3, 0.4],
            "new_tokens": 4 + place,
            "context_tokens": 20,
        }
        for place, (dialogue, raw, reference, prompt) in enumerate(TALK)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def changed(edit: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    rows = lines()
    edit(rows)
    return rows


def test_scores_of_a_file_are_those_of_its_cleaned_replies(tmp_path: Path) -> None:
    found = evaluate(write(tmp_path / "predictions.jsonl", lines()))
    replies, references = (
        [scores.clean(raw) for _, raw, _, _ in TALK],
        [reference for _, _, reference, _ in TALK],
    )
    pairs = list(zip(replies, references, strict=True))
    assert found.values["f1_spt"] == pytest.approx(
        100 * np.mean([scores.f1_spt(*pair) for pair in pairs])
    )
    assert found.values["dist2"] == pytest.approx(scores.dist(replies, 2))
    assert found.values["ead1"] == pytest.approx(scores.ead(replies, 1, 50265))
    assert found.values["reply_words"] == pytest.approx((4 + 2 + 0 + 5 + 4) / 5)
    assert found.values["empty_replies"] == pytest.approx(20.0)
    rouge = optional.rouge_rows(replies, references).mean(axis=0) * 100
    assert [found.values[key] for key in ("rouge1", "rouge2", "rougeL")] == pytest.approx(
        rouge.tolist()
    )
    assert found.prompt_counts == [1, 3, 0, 1]
    expected_entropy = -(0.6 * np.log(0.6) + 2 * 0.2 * np.log(0.2)) / np.log(4)
    assert found.values["prompt_entropy"] == pytest.approx(expected_entropy)
    assert found.lengths["new_tokens"] == {"mean": 6.0, "min": 4.0, "median": 6.0, "max": 8.0}
    assert (found.settings.examples, found.settings.dialogues, found.intervals) == (5, 3, {})
    order = [metric.key for metric in scores.METRICS]
    assert [order.index(key) for key in found.values] == sorted(
        order.index(key) for key in found.values
    )


def test_paper_columns_stand_in_the_papers_order() -> None:
    labels = {metric.key: metric.label for metric in scores.METRICS}
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
    assert [labels[key] for key in scores.PAPER_COLUMNS] == expected


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


def test_intervals_are_seeded_and_hold_the_value(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", lines())
    first, again, other = (evaluate(path, resamples=200, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.intervals["f1_spt"] != other.intervals["f1_spt"]
    assert first.intervals.keys() == first.values.keys()
    for key in ("f1_spt", "dist1", "reply_words"):
        low, high = first.intervals[key]
        assert low < first.values[key] < high


def test_one_dialogue_has_no_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "predictions.jsonl", lines()[:2])
    assert evaluate(path, resamples=50).intervals == {}
    assert command.main([str(path)]) == 0
    assert "intervals skipped: all examples are of one dialogue" in capsys.readouterr().out
    assert command.main([str(path), "--against", str(path)]) == 2
    assert "a comparison needs two or more" in capsys.readouterr().err


def _set(place: int, name: str, value: object) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[place].__setitem__(name, value)


def _drop(place: int, name: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[place].__delitem__(name)


BAD_ROWS = [
    (
        _drop(1, "reference"),
        ":2: field 'reference' is missing; it is a string with at least one word",
    ),
    (
        lambda rows: rows[1].update(row=rows[1].pop("raw")),
        ":2: field 'raw' is missing; did you mean 'raw' by 'row'?",
    ),
    (
        _set(2, "reference", " "),
        ":3: field 'reference' is ' ', expected a string with at least one word",
    ),
    (_set(2, "raw", None), ":3: field 'raw' is None, expected a string"),
    (_set(0, "index", True), ":1: field 'index' is True, expected a whole number from 0 on"),
    (_set(3, "index", 1), ":4: index 1 again, first on line 2"),
    (_set(3, "index", 4), ":4: index 4, expected 3; an example is missing or out of order"),
    (_set(0, "prompt", 4), ":1: field 'prompt' is 4, but 'scores' is over 4 prompts (0 to 3)"),
    (
        _set(0, "scores", [0.1, "x"]),
        ":1: field 'scores' is [0.1, 'x'], expected a list of finite numbers",
    ),
    (
        _set(0, "scores", [0.1, float("nan")]),
        ":1: field 'scores' is [0.1, nan], expected a list of finite numbers",
    ),
    (_set(0, "scores", [10**400]), ":1: field 'scores' is [1000"),
    (_set(4, "scores", [1.0] * 5), ":5: field 'scores' has 5 numbers, 4 on line 1"),
    (_set(4, "prompt", None), ":5: field 'prompt' is on some lines and not on others"),
    (_set(0, "nll_sum", 3.0), ":1: fields 'nll_sum' and 'nll_tokens' come together"),
    (
        lambda rows: rows[0].update(nll_sum=-1.0, nll_tokens=3),
        ":1: field 'nll_sum' is -1.0, expected a finite number",
    ),
    (
        lambda rows: rows[0].update(nll_sum=1.0, nll_tokens=0),
        ":1: field 'nll_tokens' is 0, expected a whole number",
    ),
    (
        lambda rows: rows[0].update(nll_sum=1e6, nll_tokens=9),
        ":1: field 'nll_sum' is 1000000.0, more than 700 nats",
    ),
    (
        lambda rows: rows[1].update(nll_sum=1.0, nll_tokens=3),
        ":2: field 'nll_sum' is on some lines and not on others",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_bad_rows_are_named_by_line(
    edit: Callable[[list[dict[str, Any]]], None], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "predictions.jsonl", changed(edit))
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}{message}")


GOOD_LINE = json.dumps(lines()[0]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty; a predictions file holds one JSON object per line"),
        (GOOD_LINE + b'\n{"index": 1, "id', ":2: not JSON at column 14 (Unterminated string"),
        (GOOD_LINE + b"\n\n" + GOOD_LINE, ":2: not JSON at column 1"),
        (b"[1, 2]\n", ":1: got a list, expected a JSON object"),
        (GOOD_LINE + b'\n{"id": "\xff"}\n', ":2: not UTF-8 text (byte 8 of the line)"),
    ],
)
def test_bad_files_are_named_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_file_names_what_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    expected = (
        f"{tmp_path}/predictions.jsonl: no such predictions file; `spt-ds generate` writes one"
    )
    assert capsys.readouterr().err == f"spt-ds evaluate: {expected}\n"


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    rows = changed(_set(0, "raw", "one\u2028two\x85three"))
    assert (
        read_predictions(write(tmp_path / "p.jsonl", rows)).rows[0].raw == "one\u2028two\x85three"
    )
    with_returns = (tmp_path / "p.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "p.jsonl").write_bytes(with_returns)
    assert len(read_predictions(tmp_path / "p.jsonl").rows) == len(rows)


def test_data_digest_knows_examples_and_not_replies(tmp_path: Path) -> None:
    base = read_predictions(write(tmp_path / "a.jsonl", lines()))
    other_reply = read_predictions(write(tmp_path / "b.jsonl", changed(_set(0, "raw", "else"))))
    other_data = read_predictions(
        write(tmp_path / "c.jsonl", changed(_set(4, "reference", "else")))
    )
    assert base.data_sha256 == other_reply.data_sha256 != other_data.data_sha256
    assert base.sha256 != other_reply.sha256
    check_same_examples(base, other_reply)
    with pytest.raises(
        DataError,
        match=r"c\.jsonl:5: field 'reference' is 'else', but 'cats are nice \.' in .*a\.jsonl:5",
    ):
        check_same_examples(base, other_data)
    shorter = read_predictions(write(tmp_path / "d.jsonl", lines()[:4]))
    with pytest.raises(DataError, match=r"d\.jsonl: 4 examples, but 5 in"):
        check_same_examples(base, shorter)


def test_command_writes_json_csv_markdown_and_latex(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run" / "predictions.jsonl", lines())
    other = write(tmp_path / "other.jsonl", changed(_set(1, "raw", "me too , a lot")))
    assert (
        command.main(
            [
                str(path),
                "--out",
                str(tmp_path / "out"),
                "--against",
                str(other),
                "--bootstrap",
                "50",
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
    assert load_scores(tmp_path / "out" / "scores.json") == evaluate(path, resamples=50)
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
    assert command.main([str(path.parent), "--bootstrap", "0"]) == 0
    assert json.loads((path.parent / "scores.json").read_text())["intervals"] == {}


def test_against_is_antisymmetric_and_even_with_itself(tmp_path: Path) -> None:
    ours = measure(read_predictions(write(tmp_path / "a.jsonl", lines())))
    theirs = measure(
        read_predictions(write(tmp_path / "b.jsonl", changed(_set(1, "raw", "i like dogs ."))))
    )
    there, back = ours.against(theirs, 200, seed=0), theirs.against(ours, 200, seed=0)
    for key in ("f1_spt", "bleu", "dist1", "ead2"):
        assert there[key].difference == pytest.approx(
            ours.measures[key].value() - theirs.measures[key].value()
        )
        assert there[key].difference == pytest.approx(-back[key].difference)
        assert there[key].p == back[key].p
    itself = ours.against(ours, 200, seed=0)
    assert {(pair.difference, pair.p) for pair in itself.values()} == {(0.0, 1.0)}


def test_systems_with_banks_of_two_sizes_can_be_compared(tmp_path: Path) -> None:
    rows = lines()
    for row in rows:
        row.update(prompt=0, scores=[0.5])
    one = measure(read_predictions(write(tmp_path / "a.jsonl", rows)))
    four = measure(read_predictions(write(tmp_path / "b.jsonl", lines())))
    found = four.against(one, 20, seed=0)
    assert found.keys() == four.measures.keys() - {"prompt_entropy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bootstrap", "-1"],
        ["--bootstrap", "x"],
        ["--ead-vocabulary", "1"],
        ["--against", "x", "--bootstrap", "0"],
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
    assert command.main([str(path), "--bootstrap", "0", "--out", str(path)]) == 2
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
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    assert (
        command.main([str(write(tmp_path / "predictions.jsonl", lines())), "--bootstrap", "0"]) == 0
    )
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
    monkeypatch.setattr(optional, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])
    assert optional.bert_missing() is None
    # Columns F1, precision, recall; a reply without a word scores 0 and is not handed over.
    assert optional.bert_rows(["ab", " ", "c"], ["x", "y", "z"]).tolist() == [
        [6, 2, 4],
        [0, 0, 0],
        [3, 1, 2],
    ]
    assert FakeScorer.made == [{"model_type": str(tmp_path), "num_layers": 40}]
    modules["huggingface_hub"] = _hub(tmp_path, whole - {"pytorch_model.bin"})
    assert "hf download microsoft/deberta-xlarge-mnli" in str(optional.bert_missing())


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
    assert [arguments[0] for arguments in commands] == ["evaluate", "evaluate", "compare"]
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "pt", "spt-seed0", "spt-seed1"):
        write(tmp_path / "runs" / name / "generate" / "predictions.jsonl", lines())
    assert [cli.main(arguments) for arguments in commands] == [0, 0, 0]
    assert (tmp_path / "runs" / "demo" / "generate" / "scores.json").is_file()
    assert (tmp_path / "tables" / "compare.tex").is_file()


def test_the_guide_defines_every_score() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [metric.key for metric in scores.METRICS if f"`{metric.key}`" not in guide] == []


@pytest.mark.parametrize("module", ["command", "compare"])
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
        " '--bootstrap', '10']) == 0\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False"
