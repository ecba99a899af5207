"""Run folders as `spt-ds compare` needs them: configuration, scores, and what the scores are of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spt_ds.config.legacy import upgrade
from spt_ds.config.load import flatten
from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.evaluate import corpus_metrics, scores_json
from spt_ds.evaluate.corpus_metrics import CorpusMetrics
from spt_ds.evaluate.scores_json import Scores
from spt_ds.run import predictions
from spt_ds.run.folder import ReplyFolder, RunFolder
from spt_ds.run.predictions import read_predictions
from spt_ds.yaml_input import load_yaml


@dataclass(frozen=True)
class ScoredRun:
    """A run folder: recipe name and seed from its configuration, and its scores."""

    folder: Path
    recipe: str
    seed: int | None
    options: dict[str, Any]
    """The configuration by key path, that of generation where it is known."""
    scores: Scores
    metrics: CorpusMetrics | None
    """What the scores are of, dialogue by dialogue; None where the predictions are not there."""


def read_run(folder: Path) -> ScoredRun:
    """Read a run folder.

    Its scores.json counts when it belongs to the predictions beside it; else they are scored.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such run folder; give folders that hold predictions.jsonl or scores.json"
        )
    config = RunFolder(folder).config
    options = _read_options(config)
    recipe, seed = options.get("name", folder.resolve().name), options.get("train.seed")
    if not isinstance(recipe, str):
        raise DataError(f"{config}: name is {shown(recipe)}, expected a string")
    if seed is not None and not isinstance(seed, int):
        raise DataError(f"{config}: train.seed is {shown(seed)}, expected a whole number")
    answers = ReplyFolder.of(folder)
    scores, metrics = _read_scores(answers)
    options |= flatten(predictions.generated_with(answers.path, scores.settings.predictions_sha256))
    return ScoredRun(folder, recipe, seed, options, scores, metrics)


def _read_options(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{path}:{line}: not YAML ({error.problem})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({shown(error)})") from error
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: got a {type(tree).__name__}, expected keys such as 'name' and 'train'"
        )
    upgrade(tree, overwrite=False)
    return flatten(tree)


def _read_scores(folder: ReplyFolder) -> tuple[Scores, CorpusMetrics | None]:
    held = scores_json.load_scores(folder.scores) if folder.scores.exists() else None
    if held is not None and not folder.predictions.exists():
        return held, None
    file = read_predictions(folder.predictions)
    if held is not None and held.settings.predictions_sha256 == file.sha256:
        # BERTScore would take minutes again: its value is known, and it is not tested.
        vocabulary = held.settings.ead_vocabulary
        return held, corpus_metrics.corpus_metrics(file, vocabulary, bert_score=False)
    metrics = corpus_metrics.corpus_metrics(file)
    return scores_json.scores_of(metrics), metrics
