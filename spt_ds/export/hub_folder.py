"""A run as one folder that stands for itself: a run folder of one checkpoint, and a model card.

What goes in is an allow-list. No file of the run is copied: paths, host names and whatever else a
run folder knows of its machine stay where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.export.card import Card, card_text, evaluation, is_public
from spt_ds.export.run_files import Trained, shared_base, write_new, write_run

NOT_SHARED = "not-shared"  # in config.yaml, in place of the path of a file
README = "README.md"
# Sections that say how the trainer's machines were used, and nothing of the prompts.
_OF_THE_MACHINE = ("engine", "checkpoint", "log")


def export_hub(run: Trained, out: Path, base: str | None, card: Card) -> None:
    """Write the folder `out`.

    `base` is the base's id at the hub, needed where the run names a folder. Raises ConfigError
    where it is needed and missing.
    """
    config = public_config(run.config, base)
    judged = evaluation(run)
    readme = card_text(run, config, judged, card)

    def fill(part: Path) -> None:
        write_run(part, config, run.tensors, run.step, run.best_nll)
        (part / README).write_text(readme, encoding="utf-8")

    write_new(out, fill)


def public_config(config: Config, base: str | None) -> Config:
    """The configuration without what it knows of the machine; file names become `not-shared`.

    Raises ConfigError where the base is a folder and `base` does not say how others find it.
    """
    name = shared_base(config, base)
    if name is None:
        raise ConfigError(
            f"model.base: {config.model.base} is a folder of this machine; give the base's id at"
            " the hub with --base, so that others can find it"
        )
    tree: dict[str, Any] = config.model_dump(mode="json")
    for section in _OF_THE_MACHINE:
        del tree[section]
    model, data = tree["model"], tree["data"]
    model |= {"base": name, "attention": "auto", "activation_checkpointing": "auto"}
    model["compile"] = "auto"
    if base is not None and base != config.model.base:
        model["revision"] = None
    tree["init"], data["cache_dir"] = "", None
    for split in ("train", "valid", "test"):
        data[split] = _public_sources(data[split])
    return Config.model_validate(tree)


def _public_sources(given: Any) -> Any:
    if isinstance(given, str):
        return given if is_public(given) or given.startswith("split:") else NOT_SHARED
    return [
        {
            **source,
            "path": _public_sources(source["path"]),
            # A public data set cannot be read again without the names of its columns.
            "columns": source["columns"] if is_public(source["path"]) else None,
        }
        for source in given
    ]
