"""The embedding table of a base without its layers: all of a base that choosing a prompt needs."""

from __future__ import annotations

from safetensors import safe_open
from torch import Tensor, device, nn
from transformers import PretrainedConfig

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model.backbone import base_dtype
from spt_ds.model.base_files import base_path, stored_shapes, weight_files
from spt_ds.model.loading import check_weights, new_lm
from spt_ds.model.weight_names import aliases, model_names


class EmbeddingTable:
    """What `Spt.score` asks of a backbone."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [V, D]

    def embed(self, ids: Tensor) -> Tensor:
        """ids [n] -> rows of the table [n, D]."""
        return nn.functional.embedding(ids, self.weight)


def load_table(config: ModelConfig, base: PretrainedConfig) -> EmbeddingTable:
    """Read the table from the base's safetensors files; no other tensor is read.

    Raises ModelError for a base whose embeddings are more than rows of a table.
    """
    path = base_path(config.base)
    if config.random_init or config.allow_pickle:
        raise ModelError(
            "the table of a base can be read from safetensors files alone; unset"
            f" model.{'random_init' if config.random_init else 'allow_pickle'}"
        )
    check_weights(config, base)
    with device("meta"):
        empty = new_lm(base)
    module = empty.get_input_embeddings()
    if type(module) is not nn.Embedding:
        raise ModelError(
            f"model.base: embeddings of {type(empty).__name__} are made by"
            f" {type(module).__name__}, not looked up in a table; serve this run without --upstream"
        )
    # Tied to the head, the table may be stored under the head's name.
    table = next(n for n, p in empty.named_parameters() if p is module.weight)
    wanted = next(names for names in aliases(empty) if table in names)
    for file in weight_files(path, config.revision, pickled=False):
        stored = stored_shapes(path, [file])
        for key, (name, _) in model_names(empty, stored, path).items():
            if name in wanted:
                with safe_open(file, framework="pt") as handle:
                    return EmbeddingTable(handle.get_tensor(key).to(base_dtype(config.base_bits)))
    raise ModelError(f"model.base: {path} holds no {table}; its files are incomplete")
