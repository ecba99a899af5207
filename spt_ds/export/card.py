"""The model card of an exported run, made of the files of the run.

Texts of others are escaped and stand in indented blocks, where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

import spt_ds
from spt_ds.config.schema import Config
from spt_ds.display import printable, shortened
from spt_ds.errors import DataError
from spt_ds.evaluate.columns import METRIC_OF
from spt_ds.evaluate.scores_json import Scores, load_scores
from spt_ds.evaluate.text_metrics import cleaned
from spt_ds.export.run_files import Trained
from spt_ds.json_input import read_json
from spt_ds.run.predictions import PredictionInDialogue, generated_with, read_rows

EXAMPLES = 3
_PUBLIC = re.compile(
    r"(embedded|hub):[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]*)*", re.ASCII
)


@dataclass(frozen=True)
class Card:
    """What a model card cannot know of itself."""

    license: str = "unknown"
    """Licence of the prompts, by its id at the hub."""
    examples: int | None = None
    """Dialogues of the test data to show; None: EXAMPLES where that data is public, else none."""


@dataclass(frozen=True)
class Evaluation:
    """The replies of the checkpoint that is exported, and their scores."""

    rows: tuple[PredictionInDialogue, ...]
    data: str | None  # the test data, where others have it too
    scores: Scores | None


def is_public(given: Any) -> bool:
    """Whether others have a source of data too: what is shipped, or a data set of the hub.

    `given` is a source as a configuration holds it, or a list of several.
    """
    if isinstance(given, str):
        name = given.split(":")[1] if ":" in given else ""
        # `hub:` also reads a folder that is here.
        return bool(_PUBLIC.fullmatch(given)) and not os.path.exists(name)
    return bool(given) and all(is_public(source["path"]) for source in given)


def evaluation(run: Trained) -> Evaluation | None:
    """Read `RUN/generate`; None where it holds no replies of this checkpoint."""
    folder = run.folder.replies
    if not (folder.predictions.is_file() and folder.record.is_file()):
        return None
    file = read_rows(folder.predictions, PredictionInDialogue)
    config = generated_with(folder.path, file.sha256)
    try:
        if not config or read_json(folder.record)["checkpoint"] != run.name:
            return None
        test = config["data"]["test"]
        public = is_public(test)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder.record}: cannot be read ({error}); `spt-ds generate` writes it"
        ) from error
    scores = load_scores(folder.scores) if folder.scores.is_file() else None
    if scores is not None and scores.settings.predictions_sha256 != file.sha256:
        scores = None
    return Evaluation(file.rows, _sources(test) if public else None, scores)


def card_text(run: Trained, config: Config, judged: Evaluation | None, card: Card) -> str:
    """Return the model card; `config` is the one that is exported."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, card), sort_keys=False)}---\n",
        f"# {config.name}\n\n{_opening(config)}",
        f"## Use\n\n{_use()}",
        f"## Training\n\n{_table(_training(run, config))}",
    ]
    if judged is not None:
        parts.append(f"## Evaluation\n\n{_judged(judged)}")
        public = judged.data is not None
        wanted = (EXAMPLES if public else 0) if card.examples is None else card.examples
        if shown := _examples(judged.rows, wanted):
            parts.append(f"## Examples\n\nAt even distances in the test data.\n\n{shown}")
    parts.append(
        f"## Licence\n\nPrompts and retriever: {printable(card.license)}. The base has a licence of"
        " its own."
    )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _front_matter(config: Config, card: Card) -> dict[str, Any]:
    tags = ["spt_ds", "soft-prompts", "prompt-tuning"]
    matter: dict[str, Any] = {"library_name": "spt_ds", "license": card.license, "tags": tags}
    if config.model.base != "embedded":
        matter["base_model"] = config.model.base
    words = _sources(config.data.train).split(" + ")
    if sets := [word.split(":")[1] for word in words if word.startswith("hub:")]:
        matter["datasets"] = sets
    return matter


def _sources(given: Any) -> str:
    if isinstance(given, str):
        return given
    paths = (source["path"] if isinstance(source, dict) else source.path for source in given)
    return " + ".join(paths)


def _opening(config: Config) -> str:
    kind, prompts = config.method.type, config.prompts
    base = config.model.base
    if kind != "spt":
        return f"Trained by spt_ds over the base `{base}` with `method.type: {kind}`."
    return (
        f"{prompts.count} soft prompt(s) of {prompts.tokens} virtual tokens over the frozen base"
        f" `{base}`, and a retriever that chooses one for each dialogue (Selective Prompt Tuning,"
        " arXiv 2406.18187). The base itself is not part of this folder."
    )


def _use() -> str:
    return f"""    import spt_ds

    bot = spt_ds.load("ORG/NAME")
    print(bot.reply(["i like to ski."], ["hi, what do you do?"]).text)

`ORG/NAME` is this folder at the hub, or its path. `spt-ds chat` takes both, other commands take the
path. It was written by spt_ds {spt_ds.__version__} and holds safetensors, JSON and YAML alone."""


def _training(run: Trained, config: Config) -> list[tuple[str, str]]:
    data, prompts = config.data, config.prompts
    revision = f" at {config.model.revision}" if config.model.revision else ""
    template = data.template if data.template in ("spt", "chat") else "a Jinja file, in config.yaml"
    numbers = sum(tensor.numel() for tensor in run.tensors.values())
    rows = [
        ("base", f"{config.model.base}{revision}, {config.model.base_bits} bits"),
        ("training data", _sources(data.train)),
        ("template", template),
        ("step", str(run.step)),
        ("trained parameters", f"{numbers:,}"),
        ("objective", config.losses.objective),
    ]
    if config.method.type == "spt":
        rows.append(("place of the prompt", prompts.position))
    if run.best_nll is not None and run.best_nll < float("inf"):
        rows.append(("validation loss, selected prompt", f"{run.best_nll:.4f} nats a token"))
    return rows


def _judged(judged: Evaluation) -> str:
    lines = [f"{len(judged.rows)} replies on {judged.data or 'test data that is not shared'}."]
    if judged.scores is not None:
        scores = judged.scores
        rows = []
        for key, value in scores.values.items():
            if (metric := METRIC_OF.get(key)) is not None:
                between = scores.intervals.get(key)
                interval = f"{between[0]:.2f} to {between[1]:.2f}" if between else ""
                rows.append((metric.label, f"{value:.2f}", interval, metric.meaning))
        lines.append(_table(rows, ("score", "value", "95 % interval", "what it is")))
    used = Counter(row.prompt for row in judged.rows if row.prompt is not None)
    if used:
        rows_of_use = [(str(prompt), str(used[prompt])) for prompt in sorted(used)]
        lines.append(_table(rows_of_use, ("prompt", "replies")))
    return "\n\n".join(lines)


def _examples(rows: tuple[PredictionInDialogue, ...], wanted: int) -> str:
    count = min(wanted, len(rows))
    blocks = []
    for number in range(count):
        row = rows[(2 * number + 1) * len(rows) // (2 * count)]
        said = {
            "persona": " ".join(row.persona),
            "partner": row.history[-1] if row.history else "",
            "reply": cleaned(row.raw, row.clean).strip(),
            "prompt": "all" if row.prompt is None else str(row.prompt),
        }
        texts = (f"    {name:<8} {shortened(printable(text), 600)}" for name, text in said.items())
        blocks.append("\n".join(texts))
    return "\n\n".join(blocks)


def _table(rows: list[Any], head: tuple[str, ...] = ("what", "value")) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(word) for word in line)} |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
