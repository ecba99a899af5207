"""Sizes of the base that its config.json tells, where that file is on this machine; no torch, no
network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from spt_ds.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class BaseSizes:
    """What the checks of a DeepSpeed file need to know of the base."""

    embed: int
    """D, size of an input embedding."""
    largest_parameter: int
    """Elements of the largest weight matrix: the embedding table, or one of the feed-forward
    layers.
    """

    def adam_mb(self, config: Config) -> float:
        """MB (10^6 bytes) of both Adam moments of the bank and the retriever, in fp32."""
        linears = 1 if config.retriever.projections == "shared" else 2
        bank = config.prompts.count * config.prompts.tokens * self.embed
        return 8e-6 * (bank + linears * self.embed * (self.embed + 1))


def base_sizes(model: ModelConfig) -> BaseSizes | None:
    """Read the base's config.json from its folder or the hub's local cache; None if it is in
    neither.
    """
    path = _config_json(model)
    if path is None:
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading the base will say what is wrong with it
    hidden, vocab = tree.get("hidden_size"), tree.get("vocab_size")
    if not (isinstance(hidden, int) and isinstance(vocab, int)):
        return None
    return _sizes(tree, hidden, vocab)


def _sizes(tree: dict[str, Any], hidden: int, vocab: int) -> BaseSizes:
    embed = tree.get("word_embed_proj_dim", hidden)  # OPT-350m embeds in fewer dimensions
    inner = tree.get("intermediate_size") or tree.get("ffn_dim") or 4 * hidden
    return BaseSizes(embed, max(vocab * embed, hidden * inner))


def _config_json(model: ModelConfig) -> Path | None:
    if model.base == "embedded":
        return Path(str(resources.files("spt_ds") / "assets" / "base" / "config.json"))
    if Path(model.base).is_dir():
        return Path(model.base) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None
