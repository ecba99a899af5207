"""A tiny base on disk, a few dialogues, and what one rank measures of a training run; shared by the
tests of ranks.

Everything goes the real way: a folder with config and safetensors, a tokenizer, JSONL dialogues,
`open_session`, the loader's windows. Results travel between processes as numpy arrays and plain
numbers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.data.loader import TrainLoader, eval_batches
from spt_ds.data.sampler import MicroSize
from spt_ds.engine.engine import Engine
from spt_ds.engine.session import Session, open_session, open_split, read_base
from spt_ds.engine.trainer import Trainer, open_trainer, train_run
from spt_ds.placement.agree import agree_on_placement
from spt_ds.run.folder import RunFolder
from tests.helpers.tiny import tiny_lm
from tests.helpers.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(Path(__file__).with_name("scene.yaml"))
EXAMPLES = 10  # replies in the training file that `write_dialogues` writes by default
NO_LOSS = ("grad_norm", "lr", "prompt_usage")  # in the metrics of a step
RESIDENT = (
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@dataclass(frozen=True)
class Scene:
    """A folder with bases, data and DeepSpeed files."""

    folder: Path

    def overrides(self, arch: str, *more: str) -> list[str]:
        """Options of a tiny run on the base `arch`, beside those of scene.yaml; a later option
        wins.
        """
        return [
            f"model.base={self.folder / arch}",
            f"data.train={self.folder / 'train.jsonl'}",
            f"data.valid={self.folder / 'valid.jsonl'}",
            f"data.cache_dir={self.folder / 'cache'}",
            *more,
        ]

    def ds(self, name: str) -> str:
        """The shipped DeepSpeed file, but that nothing of a tiny base stays resident: else nothing
        would be sharded.
        """
        tree = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        zero = tree["zero_optimization"]
        zero |= {key: 0 for key in RESIDENT if key in zero}
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(tree))
        return str(path)


@dataclass(frozen=True)
class Setup:
    """One way to run the same training: DeepSpeed file (None: a copy per rank) and options."""

    ds: str | None
    overrides: Sequence[str]
    steps: int = 2


@dataclass
class Outcome:
    """What one rank saw. Gradients are those of the whole step, before clipping."""

    losses: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, np.ndarray]] = field(default_factory=list)
    trained: dict[str, np.ndarray] = field(default_factory=dict)
    valid: dict[str, float] = field(default_factory=dict)
    examples: list[tuple[int, float]] = field(default_factory=list)  # of evaluation: (row, weight)
    digests: list[str] = field(
        default_factory=list
    )  # of this rank's share of the base: before, after
    base_differs: list[str] = field(
        default_factory=list
    )  # parameters that are not what the file holds
    local_bytes: int = 0


def make_scene(folder: Path, train: int = EXAMPLES, valid: int = 7) -> Scene:
    """Write OPT and Llama bases, data and tokenizer into `folder`."""
    for arch in ("opt", "llama"):
        lm = tiny_lm(arch, torch.float32, vocab_size=260, max_position_embeddings=160)
        lm.save_pretrained(folder / arch)
        byte_tokenizer().save_pretrained(folder / arch)
    write_dialogues(folder / "train.jsonl", train, seed=1)
    write_dialogues(folder / "valid.jsonl", valid, seed=2)
    return Scene(folder)


def write_dialogues(path: Path, replies: int, seed: int) -> None:
    """Write one dialogue of one reply per line, of words of unlike length."""
    draw = random.Random(seed)
    words = ["tea", "dogs", "a", "music", "i", "like", "run", "no", "blue", "sea"]

    def say(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    rows = [
        {
            "id": f"d{n}",
            "persona": [say(1, 3)],
            "turns": [say(1, 5), say(1, 4)],
            "first_speaker": "partner",
        }
        for n in range(replies)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def open_engine(world: dist.World, setup: Setup) -> tuple[Config, Session, Engine]:
    config = load_config(CONFIG, list(setup.overrides))
    session = placed_session(config, setup.ds, world)
    return config, session, Engine(session)


def placed_session(config: Config, ds: str | None, world: dist.World) -> Session:
    """The session of a run, placed as `spt-ds train` places it."""
    base = read_base(config.model)
    return open_session(config, base, agree_on_placement(config, base.shape, ds, world), world)


def train_scene(
    world: dist.World, options: Sequence[str], run_dir: Path, ds: str | None = None
) -> int:
    """Train as `spt-ds train` does; return the exit code."""
    return train_run(load_config(CONFIG, options), RunFolder(run_dir), ds, world)


def scene_trainer(
    world: dist.World, options: Sequence[str], run_dir: Path
) -> AbstractContextManager[Trainer]:
    """The trainer of such a run before its first step, for tests that reach into it."""
    return open_trainer(load_config(CONFIG, options), RunFolder(run_dir), None, world)


def windows(config: Config, session: Session, world: dist.World) -> TrainLoader:
    return TrainLoader(
        open_split(session, "train"),
        global_batch=config.train.global_batch,
        micro=MicroSize.of(config),
        world=world.size,
        rank=world.rank,
        seed=config.train.seed,
        bleu_threshold=config.losses.bleu_threshold if config.losses.contrastive else None,
        workers=0,
    )


def measure(world: dist.World, setups: Sequence[Setup]) -> list[Outcome]:
    """Train each setup for its steps; one process does them one after the other."""
    return [_measure(world, setup) for setup in setups]


def _measure(world: dist.World, setup: Setup) -> Outcome:
    out = Outcome()
    config, session, engine = open_engine(world, setup)
    out.digests.append(shard_digest(session.backbone))
    out.local_bytes = sum(
        _owned(p).numel() * _owned(p).element_size() for p in session.backbone.parameters()
    )
    stream = windows(config, session, world).windows(0)
    for step in range(setup.steps):
        found = engine.train_window(next(stream), step, setup.steps, (0.0, 0.0)).metrics()
        out.losses.append({key: found[key] for key in found if key not in NO_LOSS})
        out.gradients.append(
            {name: _array(p.grad) for name, p in engine.trainables.named_parameters()}
        )
    out.trained = {name: _array(p) for name, p in engine.trainables.named_parameters()}
    batches = list(
        eval_batches(open_split(session, "valid"), MicroSize.of(config), world.size, world.rank)
    )
    out.examples = [
        row for batch in batches for row in zip(batch.indices, batch.weights, strict=True)
    ]
    out.valid = engine.evaluate(batches)
    out.digests.append(shard_digest(session.backbone))
    out.base_differs = differs_from_file(session.backbone, Path(config.model.base))
    return out


def shard_digest(root: torch.nn.Module) -> str:
    """sha256 over this rank's bytes of the frozen base."""
    total = hashlib.sha256()
    for name, parameter in root.named_parameters():
        total.update(name.encode())
        total.update(
            _owned(parameter).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def differs_from_file(root: torch.nn.Module, folder: Path) -> list[str]:
    """Names of parameters that are not, bit for bit, the file's rounded to the base's dtype."""
    import deepspeed

    saved = load_file(str(folder / "model.safetensors"))
    wrong, seen = [], 0
    for name, parameter in root.named_parameters():
        sharded = hasattr(parameter, "ds_tensor")
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded), torch.no_grad():
            expected = saved.get(name.removeprefix("lm."))
            seen += expected is not None
            if expected is not None and not torch.equal(
                parameter.cpu(), expected.to(parameter.dtype)
            ):
                wrong.append(name)
    assert seen >= len(saved), f"{seen} of {len(saved)} tensors of the file were found"
    return wrong


def _owned(parameter: torch.Tensor) -> torch.Tensor:
    owned: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return owned


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    assert tensor.dtype == torch.float32
    return tensor.detach().cpu().numpy().copy()


def gap(ours: Any, theirs: Any) -> float:
    """Norm of the difference relative to the norm of `theirs`, or by itself where that is 0."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
