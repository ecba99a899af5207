"""Every option is read by the code that it is about: real runs, with each read of an option noted.

A read counts when code of the package outside `config/` makes it: checks of the schema, dumps and
comparisons of whole configurations, and tests do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import spt_ds
from spt_ds import dist
from spt_ds.config.load import key_paths
from spt_ds.config.schema import Config
from spt_ds.config.section import Section
from spt_ds.errors import CheckpointError
from spt_ds.generate import main as generate
from spt_ds.run import checkpoint
from spt_ds.train import main as train
from tests.distributed.scenes import CONFIG, make_scene, write_dialogues
from tests.helpers.ranks import run_ranks

PACKAGE = Path(spt_ds.__file__).parent
# Together they take every branch in which an option is read; options of one run follow its name.
RUNS: dict[str, Sequence[str]] = {
    "spt": (
        "train.eval_every_steps=1",
        "checkpoint.every_steps=1",
        "checkpoint.on_save_error=continue",
        "optim.prompts_lr=0.02",
        "data.persona_dropout.sentences=0.3",
        "data.persona_dropout.whole=0.1",
    ),
    "selective": ("losses.train_top_m=1", "prompts.position=before_reply", "generate.num_beams=2"),
    "mixture": (
        "losses.objective=mixture",
        "losses.selection=0",
        "losses.fusion=0",
        "losses.contrastive=0",
        "retriever.keys=learned",
        "prompts.warm_start_steps=1",
        "data.valid=split:0.3",
    ),
    "reference": ("reference.padded_pool=true", "prompts.init=text", 'prompts.init_texts=["tea"]'),
    "quantised": ("model.base_bits=4", "model.quant.double_quant=true"),
    "lora": (
        "method.type=lora",
        "prompts.count=1",
        "prompts.tokens=0",
        "losses.selection=0",
        "losses.fusion=0",
        "losses.contrastive=0",
    ),
}
REPLIES = (
    "generate.max_new_tokens=3",
    "generate.min_new_tokens=1",
    "generate.no_repeat_ngram_size=2",
    "generate.repetition_penalty=1.2",
)
SAMPLED = ("generate.do_sample=true", "generate.temperature=0.7", "generate.top_p=0.9")


def options_by_section(model: type[Section], prefix: str = "") -> Iterator[tuple[type, str]]:
    """Each class of the schema with its path, which is one: no class is used twice."""
    yield model, prefix
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from options_by_section(field.annotation, f"{prefix}{name}.")


def read_options(world: dist.World, folder: Path) -> list[str]:
    """Train and generate each run; return the options that were read."""
    prefixes = dict(options_by_section(Config))
    read: set[str] = set()
    plain = Section.__getattribute__

    def noting(self: Section, name: str) -> Any:
        if type(self) in prefixes and name in type(self).model_fields:
            reader = Path(sys._getframe(1).f_code.co_filename)
            if reader.is_relative_to(PACKAGE) and reader.parent != PACKAGE / "config":
                read.add(prefixes[type(self)] + name)
        return plain(self, name)

    scene = make_scene(folder, train=4, valid=2)
    write_dialogues(folder / "test.jsonl", 2, seed=3)
    shared = scene.overrides("llama", f"data.test={folder / 'test.jsonl'}", "train.epochs=3")
    os.chdir(folder)
    save, Section.__getattribute__ = checkpoint.save, noting  # type: ignore[method-assign, assignment]
    try:
        for name, own in RUNS.items():
            more = SAMPLED if name == "spt" else ()
            options = (*shared, *REPLIES, *more, *own, f"name={name}")
            checkpoint.save = full_disk_at_first(save) if name == "spt" else save
            words = [word for option in options for word in ("--set", option)]
            assert train(["--config", CONFIG, *words]) == 0
            assert generate([f"runs/{name}"]) == 0
    finally:
        checkpoint.save, Section.__getattribute__ = save, plain  # type: ignore[method-assign]
    return sorted(read)


def full_disk_at_first(save: Callable[..., Path]) -> Callable[..., Path]:
    """The function, but that its first call fails: what then happens is an option."""
    calls: list[int] = []

    def saved(*args: Any) -> Path:
        calls.append(1)
        if len(calls) == 1:
            raise CheckpointError("no space left")
        return save(*args)

    return saved


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    (found,) = run_ranks(1, read_options, tmp_path_factory.mktemp("options"), timeout_s=280)
    return set(found)


@pytest.mark.parametrize("path", list(key_paths(Config)))
def test_every_option_is_read(path: str, read: set[str]) -> None:
    assert path in read


def test_each_class_of_the_schema_has_one_place() -> None:
    classes = [model for model, _ in options_by_section(Config)]
    assert len(classes) == len(set(classes))
