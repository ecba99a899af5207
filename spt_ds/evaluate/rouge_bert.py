"""ROUGE and BERTScore, whose libraries and weights need not be there.

Each library is imported only when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from spt_ds.evaluate.text_metrics import Floats

BERT_MODEL = "microsoft/deberta-xlarge-mnli"
BERT_LAYERS = 40  # the layer that BERTScore's authors chose for this model
BERT_MAX_TOKENS = 512
BERT_FILES = (
    ("config.json",),
    ("vocab.json",),
    ("merges.txt",),
    ("model.safetensors", "pytorch_model.bin"),
)


def rouge_missing() -> str | None:
    """Say why ROUGE cannot be computed and how to mend it, or None."""
    if find_spec("rouge_score") is None:
        return (
            "package rouge-score is not installed; install it with: pip install 'spt-ds[evaluate]'"
        )
    return None


def rouge_rows(replies: Sequence[str], references: Sequence[str]) -> Floats:
    """Return `[N, 3]`: F-measures (0 to 1) of ROUGE-1, -2 and -L.

    They are those of Google's rouge-score without stemmer.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(
        kinds, use_stemmer=False
    )
    pairs = zip(references, replies, strict=True)
    scores = (scorer.score(reference, reply) for reference, reply in pairs)
    rows = [[score[kind].fmeasure for kind in kinds] for score in scores]
    return np.asarray(rows, dtype=np.float64)


def bert_missing() -> str | None:
    """Say why BERTScore cannot be computed and how to mend it, or None.

    This downloads nothing and imports no torch.
    """
    if find_spec("bert_score") is None:
        return "package bert-score is not installed; install it with: pip install bert-score"
    if _weights_folder() is None:
        return (
            f"the weights of {BERT_MODEL} are not in the local hub cache; fetch them with: hf"
            f" download {BERT_MODEL}"
        )
    return None


def bert_rows(replies: Sequence[str], references: Sequence[str]) -> Floats:
    """Return `[N, 3]`: BERTScore F1, precision and recall (0 to 1), no idf weights, no rescaling.

    A reply without a word scores 0, as in bert-score. Under transformers 5 bert-score itself can no
    longer encode one, so it gets the other replies alone.
    """
    scorer = importlib.import_module("bert_score").BERTScorer(
        model_type=str(_weights_folder()), num_layers=BERT_LAYERS
    )
    # The model's tokenizer files name no limit, and bert-score would hand the tokenizer 10^30.
    scorer._tokenizer.model_max_length = BERT_MAX_TOKENS
    rows = np.zeros((len(replies), 3))
    spoken = [index for index, reply in enumerate(replies) if reply.strip()]
    if spoken:
        triple = scorer.score(
            [replies[index] for index in spoken], [references[index] for index in spoken]
        )
        precision, recall, f1 = (part.numpy() for part in triple)
        rows[spoken] = np.stack([f1, precision, recall], axis=1)
    return rows


def _weights_folder() -> Path | None:
    """The cached snapshot of the model, if it is whole."""
    cached = importlib.import_module("huggingface_hub").try_to_load_from_cache
    for names in BERT_FILES:
        paths = [path for name in names if isinstance(path := cached(BERT_MODEL, name), str)]
        if not paths:
            return None
    return Path(paths[0]).parent
