"""Reads a DeepSpeed JSON, checks every key against the YAML and the method, and says what DeepSpeed
is to do.

DeepSpeed wraps the frozen base alone. Everything else a DeepSpeed file can hold (batch, clipping,
optimizer, schedule, precision) is owned by the YAML: such a key may be "auto", absent, or equal to
the YAML's value. All problems come in one ConfigError. Neither torch nor DeepSpeed is imported, but
for the two checks of the machine at the end of the file.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from spt_ds.config.schema import Config
from spt_ds.engine.ds_schema import OTHER_NAMES, SECTIONS, Key
from spt_ds.engine.ds_sizes import BaseSizes, base_sizes
from spt_ds.errors import ConfigError

Placement = Literal["replicate", "zero3", "zero3_offload"]
Offload = Literal["none", "cpu", "nvme"]
DEFAULT_NVME_BUFFER = 100_000_000  # elements, as DeepSpeed has it


@dataclass(frozen=True)
class DsPlan:
    """What DeepSpeed is to do with the frozen base."""

    stage: int
    """0 to 3. Below 3 the base is replicated and no DeepSpeed engine is needed."""
    offload: Offload
    """Where the shards live at stage 3."""
    engine_config: dict[str, Any]
    """For HfDeepSpeedConfig and deepspeed.initialize: no "auto" and no key that is owned elsewhere.
    """
    notes: tuple[str, ...]
    """Consequences and warnings for the reader."""


def load_ds_config(path: str | None, config: Config, world_size: int) -> DsPlan:
    """Read and check the DeepSpeed JSON at `path` for `world_size` ranks.

    Without a file the plan follows `engine.placement`; `auto` is then the caller's to decide and
    means a copy per rank. Raises ConfigError with every problem found.
    """
    placement = config.engine.placement
    if path is None:
        return plan_for("replicate" if placement == "auto" else placement, config, world_size)
    plan = _Checker(path, config, world_size).plan(_read(path))
    implied = _placement(plan)
    if placement in ("auto", implied):
        return plan
    note = f"engine.placement is {placement}, but {path} is given and decides: {implied}"
    return DsPlan(plan.stage, plan.offload, plan.engine_config, (note, *plan.notes))


def plan_for(placement: Placement, config: Config, world_size: int) -> DsPlan:
    """Return the plan of a placement without a file, with DeepSpeed's own defaults."""
    zero: dict[str, Any] = {"stage": 0 if placement == "replicate" else 3}
    if placement == "zero3_offload":
        zero["offload_param"] = {"device": "cpu"}
    return _Checker(f"engine.placement {placement}", config, world_size).plan(
        {"zero_optimization": zero}
    )


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches of the busiest rank in one step: ceil(ceil(global_batch / ranks) /
    micro_batch).
    """
    share = -(-config.train.global_batch // world_size)
    return -(-share // config.train.micro_batch)


def remove_swap_files(plan: DsPlan) -> None:
    """Delete this process's swap files of NVMe offload, which DeepSpeed leaves behind; without it,
    do nothing.
    """
    if plan.offload == "nvme":
        shutil.rmtree(
            plan.engine_config["zero_optimization"]["offload_param"]["nvme_path"],
            ignore_errors=True,
        )


def _placement(plan: DsPlan) -> Placement:
    if plan.stage < 3:
        return "replicate"
    return "zero3" if plan.offload == "none" else "zero3_offload"


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the DeepSpeed file: {error.strerror}; ds_configs/ holds five"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON (column {error.colno}): {error.msg}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected an object of sections, got {type(tree).__name__}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"given twice in one object: {', '.join(map(repr, twice))}; keep one of them"
        )
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON and no setting takes it; give a number")


class _Checker:
    """One walk over one file: collects problems, notes and the keys that act."""

    def __init__(self, source: str, config: Config, world_size: int) -> None:
        self.source = source
        self.config = config
        self.world_size = world_size
        self.sizes: BaseSizes | None = base_sizes(config.model)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.inert: list[str] = []

    def plan(self, tree: dict[str, Any]) -> DsPlan:
        """Check `tree` and return its plan; raise ConfigError with all problems."""
        acting = self.walk("", tree)
        zero = acting.setdefault("zero_optimization", {})
        if self.problems:  # the checks across keys need well-formed values
            self.fail()
        stage, offload = (
            zero.setdefault("stage", 0),
            zero.get("offload_param", {}).get("device", "none"),
        )
        self.check_stage(stage, zero)
        if offload == "nvme":
            self.check_nvme(zero)
        self.check_quantised(zero)
        self.check_hpz(zero)
        if self.problems:
            self.fail()
        if offload != "nvme" and acting.pop("aio", None):
            self.notes.append(
                "aio has no effect without zero_optimization.offload_param.device nvme"
            )
        if self.inert:
            self.notes.append(
                "accepted without effect here (docs/reference/deepspeed.md says why):"
                f" {', '.join(self.inert)}"
            )
        # DeepSpeed wants a batch size and uses it for nothing here.
        acting["train_micro_batch_size_per_gpu"] = self.config.train.micro_batch
        if self.config.model.base_bits != 32:
            acting["bf16"] = {"enabled": True}
        return DsPlan(stage, offload, acting, tuple(self.notes))

    def fail(self) -> None:
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        raise ConfigError(
            f"{self.source}: {len(self.problems)} problem(s) in the DeepSpeed"
            f" configuration\n{lines}"
        )

    def walk(self, section: str, tree: dict[str, Any]) -> dict[str, Any]:
        """Check every key of one section, given by its dotted path; return those that act, without
        "auto".
        """
        acting: dict[str, Any] = {}
        for name, value in tree.items():
            path = f"{section}.{name}" if section else name
            key = SECTIONS[section].get(name)
            if key is None:
                self.problems.append(f"{path}: unknown key; {_suggest(section, name)}")
            elif not _fits(key, value):
                self.problems.append(f"{path}: expected {_expected(key)}, got {json.dumps(value)}")
            elif key.use == "refused":
                self.refuse(path, key, value)
            elif key.kind == "section":
                acting |= (
                    {name: self.walk(path, value)}
                    if key.use == "acts"
                    else self.only_check(path, value)
                )
            elif key.use == "yaml":
                self.compare(path, key, value)
            elif key.use == "inert":
                self.inert.append(path)
            elif value != "auto" or name in (
                "nvme_path",
                "zero_hpz_partition_size",
                "zero_quantized_weights",
            ):
                acting[name] = int(value) if key.kind == "int" and value != "auto" else value
        return acting

    def only_check(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        self.walk(path, value)
        return {}

    def refuse(self, path: str, key: Key, value: Any) -> None:
        """Let a refused key pass when it is switched off; name misspelt keys inside it all the
        same.
        """
        if isinstance(value, dict):
            if path in SECTIONS:
                before = len(self.inert)
                self.walk(path, value)
                del self.inert[before:]  # the section as a whole is spoken of
            if value.get("enabled") in (False, "auto") or value.get("device") == "none":
                return
        if value in (False, None, "auto"):
            return
        why = key.why
        if path == "zero_optimization.offload_optimizer":
            sized = self.sizes if self.config.method.type == "spt" else None
            states = f" ({sized.adam_mb(self.config):.1f} MB)" if sized else ""
            why += f": the trainables' Adam states{states} stay with them on each rank; remove it"
        self.problems.append(f"{path}: {why}")

    def compare(self, path: str, key: Key, value: Any) -> None:
        """Check a value that the YAML owns."""
        owned = {
            "train_batch_size": self.config.train.global_batch,
            "train_micro_batch_size_per_gpu": self.config.train.micro_batch,
            "gradient_accumulation_steps": accumulation_steps(self.config, self.world_size),
            "gradient_clipping": self.config.optim.clip_norm,
            "bf16.enabled": self.config.model.base_bits != 32,
        }[path]
        if value in ("auto", owned):
            return
        ranks = f" ({self.world_size} ranks)" if path == "gradient_accumulation_steps" else ""
        self.problems.append(
            f"{path}: got {json.dumps(value)}, but {key.why} of the YAML makes it"
            f" {json.dumps(owned)}{ranks}; "
            f'write "auto" or change the YAML'
        )

    def check_stage(self, stage: int, zero: dict[str, Any]) -> None:
        if stage not in (0, 1, 2, 3):
            self.problems.append(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage}")
            return
        offload = zero.get("offload_param", {})
        if stage == 3:
            if self.config.method.trains_base:
                self.problems.append(
                    "zero_optimization.stage: 3 shards the base, but method.type:"
                    f" {self.config.method.type} of the YAML trains weights in it and needs all of"
                    " it on each rank; use stage 0, 1 or 2, or no file"
                )
            if self.world_size == 1 and offload.get("device", "none") == "none":
                self.notes.append(
                    "stage 3 with one rank shards nothing; a copy per rank does the same, faster"
                )
            return
        if offload.get("device", "none") != "none":
            self.problems.append(
                f"zero_optimization.offload_param: stage {stage} ignores it; set"
                " zero_optimization.stage to 3, or remove it"
            )
        self.notes.append(
            f"stage {stage}: the base is replicated; the small trainables are so at every stage"
        )
        useless = sorted(name for name in zero if name not in ("stage", "offload_param"))
        self.inert += [f"zero_optimization.{name}" for name in useless]
        for name in [*useless, "offload_param"]:
            zero.pop(name, None)

    def check_nvme(self, zero: dict[str, Any]) -> None:
        """What DeepSpeed would only find minutes later, or never: disk, buffers, compiler,
        precision.
        """
        offload = zero["offload_param"]
        where = "zero_optimization.offload_param"
        folder = _nvme_folder(offload.get("nvme_path"))
        if folder is None:
            self.problems.append(
                f'{where}.nvme_path: missing; give a folder on a local disk, or "auto"'
            )
        elif not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            what = "not writable" if folder.is_dir() else "no such folder"
            self.problems.append(
                f"{where}.nvme_path: {folder} is {what}; create it on every host, or name another"
            )
        else:
            # DeepSpeed empties its folder at the start: a run that shared it with another would
            # destroy its weights.
            offload["nvme_path"] = str(folder / f"spt_ds_{socket.gethostname()}_{os.getpid()}")
            self.notes.append(
                f"the base is swapped to {offload['nvme_path']}; a killed run leaves this folder"
            )
        self.check_buffer(offload)
        if zero.setdefault("stage3_max_reuse_distance", 0) > 0:
            self.problems.append(
                f"zero_optimization.stage3_max_reuse_distance: {zero['stage3_max_reuse_distance']}"
                " keeps parameters gathered, and each holds a disk buffer, until DeepSpeed runs"
                ' out of them; set it to 0 or "auto"'
            )
        if not _async_io_builds():
            self.problems.append(
                f"{where}.device: nvme needs DeepSpeed's async_io, which does not build here:"
                " `apt-get install libaio-dev` (libaio-devel with dnf), and a C compiler"
            )

    def check_buffer(self, offload: dict[str, Any]) -> None:
        """A shard of one parameter has to fit one buffer; size it where the file leaves it open."""
        needed = -(-self.sizes.largest_parameter // self.world_size) if self.sizes else 0
        size = offload.setdefault("buffer_size", needed or DEFAULT_NVME_BUFFER)
        if size < needed:
            self.problems.append(
                f"zero_optimization.offload_param.buffer_size: {size} elements are too few: the"
                " largest parameter "
                f'takes {needed} on each of {self.world_size} ranks; give at least that, or "auto"'
            )

    def check_quantised(self, zero: dict[str, Any]) -> None:
        """Int8 gathers need DeepSpeed's CUDA quantiser and real numbers, not packed ones."""
        asked = zero.get("zero_quantized_weights", False)
        if not asked:
            return
        why = None
        if self.config.model.base_bits != 16:
            why = (
                "its quantiser reads 16-bit numbers, model.base_bits is"
                f" {self.config.model.base_bits}"
            )
        elif not _cuda():
            why = "DeepSpeed's quantiser has no CPU version, it needs a CUDA device"
        zero["zero_quantized_weights"] = why is None
        if why is None:
            self.notes.append(
                "zero_quantized_weights: the base is read through int8, losses differ from bf16"
            )
        elif asked == "auto":
            self.notes.append(f"zero_quantized_weights is off: {why}")
        else:
            self.problems.append(
                f'zero_optimization.zero_quantized_weights: {why}; set it to false or "auto"'
            )

    def check_hpz(self, zero: dict[str, Any]) -> None:
        size = zero.get("zero_hpz_partition_size", 1)
        if size == "auto":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            size = local if local < self.world_size and self.world_size % local == 0 else 1
            zero["zero_hpz_partition_size"] = size
            gain = (
                f"{size} ranks of each host"
                if size > 1
                else "off, the ranks are not spread over equal hosts"
            )
            self.notes.append(f"zero_hpz_partition_size auto: {gain}")
        if size < 1 or self.world_size % size:
            self.problems.append(
                f"zero_optimization.zero_hpz_partition_size: {size} does not divide the"
                f' {self.world_size} ranks; give the number of ranks per host, or "auto"'
            )
        elif size > 1 and zero.get("offload_param", {}).get("device") == "nvme":
            self.problems.append(
                "zero_optimization.zero_hpz_partition_size: DeepSpeed cannot keep the second copy"
                " on a disk; set it to 1, or offload_param.device to cpu"
            )


def _fits(key: Key, value: Any) -> bool:
    if key.kind == "any" or (value == "auto" and key.kind != "section"):
        return True
    if key.choices:
        return value in key.choices
    if key.kind == "int":
        # 5e8 is a whole number too; Python reads 1e999 as infinity, which is none.
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and value >= 0
            and value % 1 == 0
        )
    if key.kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds = {"bool": bool, "string": str, "list": list, "section": dict}
    return isinstance(value, kinds[key.kind])


def _expected(key: Key) -> str:
    if key.choices:
        return " or ".join(json.dumps(choice) for choice in key.choices)
    names = {
        "bool": "true or false",
        "int": "a whole number of 0 or more",
        "section": "an object {...}",
    }
    return names.get(key.kind, f"a {key.kind}")


def _suggest(section: str, name: str) -> str:
    """Return the nearest known keys of the section, the section it belongs to, or the section's
    keys.
    """
    word = name.strip().lower()
    known = SECTIONS[section]
    if OTHER_NAMES.get(word) in known:
        return f"did you mean '{OTHER_NAMES[word]}'?"
    likeness = {key: SequenceMatcher(None, word, key).ratio() for key in known}
    best = max(likeness.values())
    homes = [
        home or "the top level"
        for home, table in SECTIONS.items()
        if word in table and home != section
    ]
    if homes and best < 1:
        return f"it belongs in {' or '.join(homes)}"
    if best < 0.6:
        return f"known here: {', '.join(sorted(known))}"
    near = [repr(key) for key, ratio in likeness.items() if ratio >= best - 0.05]
    return f"did you mean {' or '.join(near)}?"


def _nvme_folder(path: str | None) -> Path | None:
    if path == "auto":
        return Path(os.environ.get("SPT_NVME_PATH") or tempfile.gettempdir())
    return Path(path) if path else None


def _async_io_builds() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
