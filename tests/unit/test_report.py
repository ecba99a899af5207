"""`spt-ds report`: one page that stands alone, says what is missing, and holds texts of a run as
texts only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_ds.errors import ConfigError, DataError, SptError
from spt_ds.evaluate.command import main as evaluate
from spt_ds.report import plots
from spt_ds.report.command import main
from spt_ds.report.markup import VOID, Markup, join, table, tag
from spt_ds.report.plots import Heat, Line
from spt_ds.report.runs import extremes, read_lines, read_run, read_runs
from spt_ds.report.sections import prompts
from spt_ds.report.sections.prompts import bank_scores, prompt_use
from spt_ds.report.sections.replies import examples
from spt_ds.report.sections.scores import text_scores
from spt_ds.report.sections.setup import configuration
from spt_ds.report.sections.training import losses, throughput
from spt_ds.report.sections.verdict import verdict
from tests.helpers.report_runs import MALICE, make_run, prediction, write_lines

OPTION = re.compile(r'<th scope="row">([^<]+)</th><td[^>]*>([^<]+)</td><td[^>]*>([^<]+)</td>')


class Page(HTMLParser):
    """Reads a page strictly: every start tag has its end tag, ids are unique."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice on {name}"
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, key: str) -> list[str]:
        return [attributes[key] or "" for _, attributes in self.elements if key in attributes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`full` has everything, `other` another bank size, `bare` only its configuration."""
    root = tmp_path_factory.mktemp("runs")
    full = make_run(root / "full")
    assert evaluate([str(full)]) == 0
    other = make_run(root / "other", config="name: other\nprompts: {count: 3}\n", replies=False)
    bare = root / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("name: bare\n")
    return {"full": full, "other": other, "bare": bare}


@pytest.fixture(scope="module")
def report(runs: dict[str, Path]) -> Path:
    path = runs["full"].parent / "report.html"
    assert main([*map(str, runs.values()), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_page_is_well_formed_and_its_anchors_lead_somewhere(page: Page) -> None:
    ids = Counter(page.values("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    links = {
        value
        for name, attributes in page.elements
        if name in {"a", "use"}
        if (value := attributes["href"])
    }
    assert len(links) > 9
    assert {link.removeprefix("#") for link in links} <= ids.keys()
    clips = {re.findall(r"url\(#([^)]+)\)", value)[0] for value in page.values("clip-path")}
    assert clips
    assert clips <= ids.keys()
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_page_refers_to_nothing_outside(page: Page, report: Path) -> None:
    assert not {"script", "link", "iframe", "img", "object", "base"} & {
        name for name, _ in page.elements
    }
    for key in ("src", "href", "xlink:href", "srcset", "action", "data"):
        assert [
            value
            for value in page.values(key)
            if not value.startswith(("#", "data:image/png;base64,"))
        ] == []
    text = report.read_text(encoding="utf-8")
    assert "@import" not in text
    assert set(re.findall(r"url\(([^#)][^)]*)\)", text)) == set()
    without_texts = text.replace("http://evil.example", "")
    assert "://" not in without_texts
    assert [
        key for _, attributes in page.elements for key in attributes if key.startswith("on")
    ] == []
    assert any("default-src 'none'" in value for value in page.values("content"))


def test_texts_of_a_run_stay_texts(page: Page) -> None:
    assert page.text().count(MALICE) >= 6  # personas, histories, reply, host
    assert '</pre><script>"}' in page.text()
    assert "odd<key>" in page.text()


def test_every_plot_is_described(page: Page) -> None:
    plots_found = [attributes for name, attributes in page.elements if name == "svg"]
    captions = [name for name, _ in page.elements if name == "figcaption"]
    heats = [plot for plot in plots_found if plot["class"] == "narrow"]  # drawn twice
    assert len(heats) == 3 + 2
    assert (
        len(plots_found) - len(heats) == len(captions) == 6 + 1 + 3 + 2 + 2 * 2
    )  # quantities, pace, prompt use, scores, two prompts of two runs
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 30 for plot in plots_found)
    told = " ".join(page.values("aria-label"))
    assert "Total loss over steps. full, training: 8.9 at step 1, 6 at step 30" in told
    assert "full, validation: 5 at step 0, 4.25 at step 20" in told
    assert "Column all: prompt 0 50 %, prompt 1 50 %, prompt 2 0 %." in told


def test_plots_follow_the_colours_of_the_page(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert plots.INK not in text
    assert plots.LINE not in text
    assert text.count("fill: var(--ink)") > 50
    assert "stroke: var(--line)" in text
    assert "prefers-color-scheme: dark" in text


def test_what_is_missing_is_said(page: Page, runs: dict[str, Path]) -> None:
    text = page.text()
    assert "Missing in full" not in text
    assert (
        f"predictions.jsonl is not there: write it with `spt-ds generate {runs['other']}`" in text
    )
    assert "metrics.jsonl is not there" in text
    assert text.count("No replies yet.") == 2


def test_a_run_with_nothing_but_its_configuration(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "bare.html"
    assert main([str(runs["bare"]), "--out", str(out)]) == 0
    text = Page(out.read_text(encoding="utf-8")).text()
    for said in (
        "No run has scores",
        "has logged a step",
        "has logged two steps",
        "has recorded its environment",
    ):
        assert said in text
    assert "Options that differ from the defaults." in text


def test_scores_have_their_intervals(page: Page, runs: dict[str, Path]) -> None:
    found = json.loads((runs["full"] / "generate" / "scores.json").read_text())
    low, high = found["intervals"]["f1_spt"]
    assert f"{found['values']['f1_spt']:.2f} [{low:.2f}, {high:.2f}]" in page.text()
    assert "BLEU nrefs:1" in page.text()


def test_skipped_metrics_are_marked_with_their_reason(
    runs: dict[str, Path],
) -> None:
    shown = Page(text_scores(read_runs([runs["full"]])))
    assert (
        "PPL/token perplexity of the reference per token; lower is better skipped [" in shown.text()
    )
    assert re.search(r"\[\d\] perplexity was skipped: the file has no 'nll_sum'", shown.text())
    marks = [value for value in shown.values("href") if value.startswith("#skipped-")]
    assert {mark.removeprefix("#") for mark in marks} == set(shown.values("id"))


def with_base(folder: Path, base: str, **options: Any) -> Path:
    run = make_run(folder, config=f"model: {{base: {base}}}\n", **options)
    assert evaluate([str(run)]) == 0
    return run


def test_runs_over_different_bases_are_kept_apart(tmp_path: Path) -> None:
    """Losses and perplexities of two bases mean two things: no plot and no table has both."""
    found = read_runs([with_base(tmp_path / n, f"base-{n[0]}") for n in ("a1", "b1", "a2")])
    for section in (text_scores(found), losses(found)):
        first = section.partition("<h3>Base: base-b</h3>")[0]
        assert "<h3>Base: base-a</h3>" in first
        assert "a1" in first
        assert "a2" in first
        assert "b1" not in first
    told = Page(verdict(found)).text()
    assert "a2 against a1" in told
    assert "b1 against" not in told
    assert "Runs over different bases are not compared with each other." in told
    Page(losses(found))  # ids are unique
    assert "Base:" not in losses(found[:1])


def test_scores_of_other_predictions_are_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "stale"
    shutil.copytree(runs["full"], folder)
    assert read_run(folder, "stale").scores is not None
    path = folder / "generate" / "predictions.jsonl"
    path.write_text(path.read_text().replace("i like cats", "i like birds"))
    run = read_run(folder, "stale")
    assert run.scores is None
    assert [note for note in run.missing if "scores.json belongs to other predictions" in note]


def test_runs_that_answered_different_examples_are_told_apart(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "different")
    path = folder / "generate" / "predictions.jsonl"
    path.write_text(path.read_text().replace("i like my two dogs", "we all like cats"))
    assert evaluate([str(folder)]) == 0
    said = "answered different examples"
    assert said in text_scores(read_runs([runs["full"], folder]))
    assert said not in text_scores(read_runs([runs["full"]]))


def test_the_verdict_says_in_words_how_a_run_went(page: Page, runs: dict[str, Path]) -> None:
    headings = [part for part in page.values("id") if part.endswith("-heading")]
    assert headings[0] == "verdict-heading"
    told = Page(verdict(read_runs([runs["full"]]))).text()
    assert "full came to its end after 30 steps." in told
    assert "fell from 5.000 to 4.250 nats per token and was lowest at step 20." in told
    assert re.search(r"Its 6 replies have F1 \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\), BLEU ", told)
    assert "2 of 3 prompts replied, prompt 0 most often (50 %)." in told
    assert "hardly tells" not in told
    assert "against" not in told
    assert told.startswith("Validation nll 4.250 5.000 at first F1 ")
    assert "Prompts that replied 2 of 3 for 6 examples" in told
    bare = Page(verdict(read_runs([runs["bare"]]))).text()
    assert bare == "bare has not begun. It has no replies yet."


def test_a_verdict_names_what_differs_and_what_does_not(tmp_path: Path) -> None:
    """Twelve dialogues of one turn: the second run answers better in nearly all of them."""
    folders: list[Path] = []
    for name, good in (("first", 2), ("second", 11)):
        folder = make_run(tmp_path / name, replies=False)
        (folder / "generate").mkdir()
        rows = [
            {
                **prediction(index, "i like my two dogs" if index < good else "well , i do", 0),
                "dialogue_id": str(index),
                "id": str(index),
                "scores": [0.3135, 0.3136],
                "nll_sum": 5.0 + index + 2 * len(folders),
                "nll_tokens": 5,
            }
            for index in range(12)
        ]
        write_lines(folder / "generate" / "predictions.jsonl", rows)
        folders.append(folder)
    told = Page(verdict(read_runs(folders))).text()
    sentence = re.search(r"second against first ?, paired over 12 dialogues: (.*?)\. One", told)
    assert sentence is not None
    better, worse, unsure = sentence[1].split("; ")
    assert better.startswith("better in F1 by 58.33 (")
    assert "BLEU by " in better
    assert worse.startswith("worse in PPL/token by ")
    assert unsure.startswith("no sure difference in ")
    assert "One interval in twenty misses the truth by chance" in told
    assert "Their scores are 0.0001 apart on average: the retriever hardly tells them" in told


def test_a_verdict_without_a_comparison_says_why(runs: dict[str, Path], tmp_path: Path) -> None:
    told = Page(verdict(read_runs([runs["full"], runs["other"]]))).text()
    assert "other against full : not compared, because other has no replies." in told
    assert "by chance" not in told  # nothing that could be
    folder = make_run(tmp_path / "different")
    path = folder / "generate" / "predictions.jsonl"
    path.write_text(path.read_text().replace("i like my two dogs", "we all like cats"))
    told = Page(verdict(read_runs([runs["full"], folder]))).text()
    assert "not compared, because the two answered different examples." in told


def test_pace_leaves_out_validation_and_warm_up(runs: dict[str, Path]) -> None:
    run = read_run(runs["full"], "full")
    assert run.paces() == [
        (10, pytest.approx(2.0)),
        (20, pytest.approx(2.0)),
        (30, pytest.approx(2.0)),
    ]
    only = [line for line in run.lines if line["step"] < 10]
    assert only[1]["time"] - only[0]["time"] == 60
    batch = run.options["train.global_batch"]
    shown = throughput([run]).replace("\N{NO-BREAK SPACE}", " ")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", shown)
    assert cells == ["2", str(2 * batch), "3", "1 min 22 s"]


def test_differences_between_runs(runs: dict[str, Path]) -> None:
    pair = configuration(read_runs([runs["full"], runs["other"]]))
    first = pair.partition("<details>")[0]
    assert OPTION.findall(first) == [
        ("name", "tiny", "other"),
        ("prompts.count", "4", "3"),
    ]
    alone = configuration(read_runs([runs["other"]])).partition("<details>")[0]
    assert ("prompts.count", "4", "3") in OPTION.findall(alone)


def test_best_and_worst(runs: dict[str, Path]) -> None:
    replies = read_run(runs["full"], "full").replies
    best, worst = extremes(replies, 2)
    assert [reply.row.index for reply in best] == [0, 5]
    assert [reply.text for reply in worst] == ["", "two"]
    for most in (1, 3, 9):
        best, worst = extremes(replies[:5], most)
        assert not {reply.row.index for reply in best} & {reply.row.index for reply in worst}
        assert len(best) == min(most, 3)
        assert len(worst) == min(most, 2)
    assert [len(part) for part in extremes(replies[:1], 4)] == [1, 0]


def test_long_turns_are_folded(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", replies=False)
    (folder / "generate").mkdir()
    row = {**prediction(0, "yes " * 200, 0), "history": ["short", "word " * 300]}
    write_lines(folder / "generate" / "predictions.jsonl", [row])
    shown = examples(read_runs([folder]))
    assert shown.count('<details class="long">') == 2  # the turn and the reply
    assert "1,500 characters</summary>word word" in shown
    assert '<span class="who">self: </span><div dir="auto">short</div>' in shown


def test_cards_tell_who_spoke(page: Page) -> None:
    assert f"self: hello {MALICE}" in page.text()
    assert "partner: hi" in page.text()
    assert "As decoded, before it was cut two Q: more" in page.text()


def test_replies_of_no_single_prompt(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fused", replies=False)
    (folder / "generate").mkdir()
    write_lines(
        folder / "generate" / "predictions.jsonl",
        [prediction(0, "hello", None), prediction(1, "you", None)],
    )
    found = read_runs([folder])
    assert "no use per dialogue turn" in prompt_use(found)
    assert "No replies with scores" in bank_scores(found)
    assert "prompt" not in "".join(re.findall(r"<h4>(.*?)</h4>", examples(found)))


def test_runs_are_named_by_their_folder_and_more_where_that_repeats(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    twin = make_run(tmp_path / "full")
    found = read_runs([runs["full"], twin, runs["other"], runs["other"] / ".." / "other"])
    labels = [f"{folder.parent.name}/full" for folder in (runs["full"], twin)]
    assert [run.label for run in found] == [*labels, "other"]
    assert [run.number for run in found] == [0, 1, 2]


def test_shares_of_prompts_over_time(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Heat] = []
    monkeypatch.setattr(plots, "heat", lambda name, alt, one: seen.append(one) or Markup(""))  # type: ignore[func-returns-value]
    monkeypatch.setattr(prompts, "MOST_BINS", 2)
    prompt_use([read_run(runs["other"], "other")])
    counts = np.asarray(
        [[1, 1, 0], [3, 1, 0], [6, 1, 0], [2, 1, 0]]
    )  # step % 7 of steps 1, 10, 20, 30
    pairs = np.stack([counts[:2].sum(axis=0), counts[2:].sum(axis=0)], axis=1)
    assert np.allclose(seen[0].values, 100 * pairs / pairs.sum(axis=0))
    assert seen[0].columns == ["10", "30"]


def test_mean_scores_by_speaker(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Heat] = []
    monkeypatch.setattr(plots, "heat", lambda name, alt, one: seen.append(one) or Markup(""))  # type: ignore[func-returns-value]
    bank_scores([read_run(runs["full"], "full")])
    assert list(seen[0].marked) == [0, 1, 0, 1, 0, 1]
    assert seen[0].values.shape == (3, 6)
    assert seen[1].columns == ["0", "1"]
    assert np.allclose(seen[1].values, np.asarray([[0.2, 0.2], [0.3, 0.3], [0.1, 0.1]]))


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([0.31351, 0.31379], (0.308, 0.32)),  # nearly the same, and in colours too
        ([0.2, 0.4437], (0.2, 0.45)),
        ([-3.0, 17.0], (-5.0, 20.0)),
        ([0.0, 100.0], (0.0, 100.0)),
        ([1234.0, np.nan, 5678.0], (1000.0, 6000.0)),
    ],
)
def test_scales_of_colours_end_in_round_numbers(
    values: list[float], limits: tuple[float, float]
) -> None:
    assert plots.round_limits(np.asarray(values)) == pytest.approx(limits)


def test_columns_are_taken_together_in_round_numbers() -> None:
    assert [plots.stride(count, 40) for count in (1, 40, 41, 81, 201, 7801)] == [
        1,
        1,
        2,
        5,
        10,
        200,
    ]


def test_long_curves_are_averaged_and_stay_small() -> None:
    steps = 50 * plots.MOST_POINTS
    points = [(float(step), step % 2 * 2.0) for step in range(steps)]
    x, y = plots.thinned(points)
    assert len(x) == plots.MOST_POINTS
    assert np.allclose(y, 1.0)
    assert x.mean() == pytest.approx((steps - 1) / 2)
    assert len(plots.curves("long", "alt", [Line(points, plots.colour(0))])) < 40_000
    few = plots.thinned(points[:5])
    assert list(few[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (64, 3), (64, 60)])
def test_heat_maps_of_any_size(shape: tuple[int, int]) -> None:
    values = np.arange(shape[0] * shape[1], dtype=np.float64).reshape(shape)
    columns = [f"column{place}" for place in range(shape[1])]
    both = plots.heat("any", "alt", Heat(values, columns, "across", "scale", ".0f"))
    for size, one in zip((plots.WIDE, plots.NARROW), both.split("<svg")[1:], strict=True):
        labels = re.findall(r"column(\d+)", Page(Markup("<svg" + one)).text())
        assert f'class="{size.kind}"' in one
        assert 1 <= len(labels) <= size.labels + 1
        assert labels[-1] == str(shape[1] - 1)


def test_only_markup_is_not_escaped() -> None:
    assert (
        tag("p", "<b>", Markup("<i></i>"), class_='"x"')
        == '<p class="&quot;x&quot;">&lt;b&gt;<i></i></p>'
    )
    assert join(["a&b", Markup("&amp;")]) == "a&amp;b&amp;"
    assert '<td data-label="b">&lt;x&gt;</td>' in table("c", ["a", "b"], [["r", "<x>"]])
    assert tag("p", "a\x1b[2J\x00\ud800\n") == "<p>a\u241b[2J\u2400\ufffd\n</p>"


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("config.yaml", None, DataError, "holds no config.yaml"),
        ("config.yaml", "promts: {count: 3}\n", ConfigError, "did you mean 'prompts'"),
        (
            "metrics.jsonl",
            '{"step": 1, "kind": "train", "time": 1.0}\nrubbish\n',
            DataError,
            "metrics.jsonl:2",
        ),
        (
            "metrics.jsonl",
            '{"kind": "train", "time": 1.0}\n',
            DataError,
            "expected an object with 'step'",
        ),
        ("DONE.json", "[1]", DataError, "got a list"),
        ("environment.json", "{", DataError, "environment.json: not JSON"),
        (
            "generate/predictions.jsonl",
            "{}\n",
            DataError,
            "predictions.jsonl:1: field 'index' is missing",
        ),
        ("generate/scores.json", "{}", DataError, "spt-ds evaluate"),
    ],
)
def test_damaged_runs_are_refused(
    tmp_path: Path, name: str, content: str | None, error: type[SptError], told: str
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(error, match=re.escape(told)):
        read_run(folder, "run")


@pytest.mark.parametrize(
    ("name", "value"), [("turn", -1), ("turn", "two"), ("persona", "a"), ("history", [1])]
)
def test_fields_around_a_reply_are_checked(tmp_path: Path, name: str, value: object) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(
        folder / "generate" / "predictions.jsonl", [{**prediction(0, "hello", 0), name: value}]
    )
    with pytest.raises(DataError, match=f"predictions.jsonl:1: field '{name}'"):
        read_run(folder, "run")


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "time": 1.0}\n{"step": 2, "ki')
    assert [line["step"] for line in read_lines(path)] == [1]


def test_user_errors_are_one_line_and_leave_no_page(
    tmp_path: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main([str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert (
        capsys.readouterr().err
        == f"spt-ds report: {tmp_path / 'nowhere'}: no such folder; give a run folder, as `spt-ds"
        " train` writes one\n"
    )
    assert not out.exists()
    assert main([str(runs["bare"]), "--out", str(tmp_path / "none" / "x.html")]) == 2
    assert "give another file with --out" in capsys.readouterr().err


def test_needs_no_torch_and_says_how_to_get_matplotlib(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from spt_ds.cli import main\n"
        f"code = main(['report', {str(runs['bare'])!r}, '--out', {str(tmp_path / 'x.html')!r}])\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
        "sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("spt-ds report: plots are drawn by matplotlib")
    assert "pip install 'spt-ds[report]'" in found.stderr
    assert not (tmp_path / "x.html").exists()


def test_options_set_for_the_replies_alone_are_shown(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run, mode in zip(runs, ("select", "random"), strict=True):
        digest = hashlib.sha256((run / "generate" / "predictions.jsonl").read_bytes()).hexdigest()
        record = {
            "identity": "x",
            "predictions_sha256": digest,
            "config": {"name": "tiny", "generate": {"mode": mode}},
        }
        (run / "generate" / "generate.json").write_text(json.dumps(record))
    shown = Page(configuration(read_runs(runs))).text()
    assert "The runs were trained with the same configuration." in shown
    assert "Options set for the replies alone. key a b generate.mode select random" in shown
    assert "replies alone" not in Page(configuration([read_run(runs[0], "a")])).text()
    (runs[1] / "generate" / "generate.json").write_text(
        json.dumps({**record, "config": {"generate": {"mode": 3}}})
    )
    with pytest.raises(DataError, match=r"generate\.json"):
        read_run(runs[1], "b")
