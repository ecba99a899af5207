"""The columns of every table of scores: key in `scores.json`, heading, meaning in a few words."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One column. docs/metrics.md holds its definition and source."""

    key: str
    label: str
    meaning: str
    most: float = 100.0
    """The largest value that there can be."""
    less_is_better: bool = False


_PERPLEXITY = "perplexity of the reference per"
METRICS = (
    Metric("f1_spt", "F1", "word overlap with the reference, %, words unchanged"),
    Metric("bleu", "BLEU", "corpus BLEU of sacrebleu"),
    Metric("rouge1", "R-1", "ROUGE-1 F-measure, %"),
    Metric("rouge2", "R-2", "ROUGE-2 F-measure, %"),
    Metric("rougeL", "R-L", "ROUGE-L F-measure, %"),
    Metric("bert_f1", "BERT-F1", "BERTScore F1, %"),
    Metric("bert_p", "BERT-P", "BERTScore precision, %"),
    Metric("bert_r", "BERT-R", "BERTScore recall, %"),
    Metric("dist1", "DIST-1", "distinct over total words of all replies, %"),
    Metric("dist2", "DIST-2", "distinct over total bigrams of all replies, %"),
    Metric("f1_parlai", "F1-ParlAI", "word overlap after ParlAI's normalisation, %"),
    Metric("dist3", "DIST-3", "distinct over total trigrams of all replies, %"),
    Metric("ead1", "EAD-1", "distinct over expected distinct words, %", math.inf),
    Metric("ead2", "EAD-2", "distinct over expected distinct bigrams, %", math.inf),
    Metric("ppl_token", "PPL/token", f"{_PERPLEXITY} token; lower is better", math.inf, True),
    Metric("ppl_word", "PPL/word", f"{_PERPLEXITY} word; lower is better", math.inf, True),
    Metric("reply_words", "words", "mean words per reply", math.inf),
    Metric("empty_replies", "empty %", "replies without a word, %"),
    Metric("accuracy", "accuracy", "replies that are the right one of the choices, %"),
    Metric("f1_macro", "F1 macro", "mean over the labels of the F1 of each, %"),
    Metric("mae", "MAE", "mean absolute error of numbers; lower is better", math.inf, True),
    Metric("rmse", "RMSE", "root of the mean squared error; lower is better", math.inf, True),
    Metric("prompt_entropy", "prompt H", "normalised entropy of the prompts' use, 0 to 1", 1.0),
)
# What is skipped together where a library, weights or a field are missing.
FAMILIES = {
    "ROUGE": ("rouge1", "rouge2", "rougeL"),
    "BERTScore": ("bert_f1", "bert_p", "bert_r"),
    "perplexity": ("ppl_token", "ppl_word"),
    "labels": ("accuracy",),
    "F1 macro": ("f1_macro",),
    "MAE and RMSE": ("mae", "rmse"),
    "prompt use": ("prompt_entropy",),
}
FAMILY_OF = {key: family for family, keys in FAMILIES.items() for key in keys}
METRIC_OF = {metric.key: metric for metric in METRICS}
PAPER_COLUMNS = tuple(metric.key for metric in METRICS[:10])
# Of a table with a system in each row.
WIDE_COLUMNS = (*PAPER_COLUMNS, "ead1", "ead2", "ppl_token", "accuracy", "f1_macro", "mae", "rmse")
