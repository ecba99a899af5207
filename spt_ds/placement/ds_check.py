"""Reads a DeepSpeed file, checks its keys against the YAML and the method, and makes its plan.

DeepSpeed wraps the frozen base alone. Everything else a DeepSpeed file can hold (batch, clipping,
optimizer, schedule, precision) is owned by the YAML: such a key may be "auto", absent, or equal to
the YAML's value. All problems come in one ConfigError. No torch is imported, but by the checks of
the machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from spt_ds.config.method import TRAIN_THE_BASE
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.json_input import load_json
from spt_ds.placement import ds_machine
from spt_ds.placement.ds_machine import Findings, Hosts
from spt_ds.placement.ds_schema import OTHER_NAMES, SECTIONS, Key
from spt_ds.placement.estimate import BaseShape, trainable_bytes
from spt_ds.placement.zero_plan import Kind, ZeroPlan
from spt_ds.shipped import ds_config_path


def plan_of_file(
    path: str, config: Config, shape: BaseShape, world_size: int, hosts: Hosts | None = None
) -> ZeroPlan:
    """Read and check the DeepSpeed JSON at `path` for `world_size` ranks, by default of one host.

    It decides where the base lives, whatever `engine.placement` says. Raises ConfigError with every
    problem of the file.
    """
    checker = _Checker(path, config, shape, world_size, hosts)
    plan = checker.plan(read_deepspeed_file(path))
    asked = config.engine.placement
    if asked in ("auto", plan.kind):
        return plan
    note = f"engine.placement is {asked}, but {path} is given and decides: {plan.kind}"
    return replace(plan, notes=(note, *plan.notes))


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Return the sections of a DeepSpeed file, given by its path or by the name of a shipped one.

    Raises ConfigError, with `file:line` where JSON is at fault: also for a key that is given twice
    and for a number that JSON has not.
    """
    try:
        text = ds_config_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the DeepSpeed file: {error.strerror}; give a JSON file, or the"
            " name of a shipped one, such as zero3"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    try:
        tree = load_json(text, finite=True)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON (column {error.colno}): {error.msg}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected an object of sections, got {type(tree).__name__}")
    return tree


def plan_of_kind(
    kind: Kind, config: Config, world_size: int, hosts: Hosts | None = None
) -> ZeroPlan:
    """Return the plan of a run without a DeepSpeed file, with DeepSpeed's own defaults."""
    zero: dict[str, Any] = {"stage": 0 if kind == "replicate" else 3}
    if kind == "zero3_offload":
        zero["offload_param"] = {"device": "cpu"}
    checker = _Checker(f"engine.placement {kind}", config, None, world_size, hosts)
    return checker.plan({"zero_optimization": zero})


def accumulation_steps(config: Config, world_size: int) -> int:
    """Return ceil(ceil(global_batch / ranks) / micro_batch), that of the busiest rank."""
    share = -(-config.train.global_batch // world_size)
    return -(-share // config.train.micro_batch)


class _Checker:
    """One walk over one file: collects problems, notes and the keys that act."""

    def __init__(
        self,
        source: str,
        config: Config,
        shape: BaseShape | None,
        world_size: int,
        hosts: Hosts | None,
    ) -> None:
        self.source = source
        self.config = config
        self.shape = shape
        self.world_size = world_size
        self.hosts = hosts or Hosts(world_size)
        self.found = Findings()

    def plan(self, tree: dict[str, Any]) -> ZeroPlan:
        """Check `tree` and return its plan; raise ConfigError with all problems."""
        acting = self.walk("", tree)
        zero = acting.setdefault("zero_optimization", {})
        # The checks across keys need well-formed values.
        if self.found.problems:
            self.fail()
        stage, offload = (
            zero.setdefault("stage", 0),
            zero.get("offload_param", {}).get("device", "none"),
        )
        self.check_stage(stage, zero)
        if offload == "nvme":
            ds_machine.check_nvme(self.found, zero, self.shape, self.world_size)
        if "zero_quantized_weights" in zero:
            ds_machine.check_quantised(self.found, zero, self.config.model.base_bits)
        # On one host there is no copy to settle, unless the file asks for one.
        if stage == 3 and ("zero_hpz_partition_size" in zero or self.hosts.ranks < self.world_size):
            bits = self.config.model.base_bits
            ds_machine.check_second_copy(self.found, zero, self.world_size, bits, self.hosts)
        if self.found.problems:
            self.fail()
        if offload != "nvme" and acting.pop("aio", None):
            self.found.notes.append(
                "aio has no effect without zero_optimization.offload_param.device nvme"
            )
        if self.found.inert:
            self.found.notes.append(
                "accepted without effect here (docs/reference/deepspeed.md says why):"
                f" {', '.join(self.found.inert)}"
            )
        # DeepSpeed wants a batch size and uses it for nothing here.
        acting["train_micro_batch_size_per_gpu"] = self.config.train.micro_batch
        if self.config.model.base_bits != 32:
            acting["bf16"] = {"enabled": True}
        return ZeroPlan(stage, offload, acting, tuple(self.found.notes))

    def problem(self, text: str) -> None:
        self.found.problems.append(text)

    def fail(self) -> None:
        lines = "\n".join(f"  {problem}" for problem in self.found.problems)
        raise ConfigError(
            f"{self.source}: {len(self.found.problems)} problem(s) in the DeepSpeed"
            f" configuration\n{lines}"
        )

    def walk(self, section: str, tree: dict[str, Any]) -> dict[str, Any]:
        """Check every key of one section; return those that act, without "auto".

        `section` is its dotted path.
        """
        acting: dict[str, Any] = {}
        for name, value in tree.items():
            path = f"{section}.{name}" if section else name
            key = SECTIONS[section].get(name)
            if key is None:
                self.problem(f"{path}: unknown key; {_suggest(section, name)}")
            elif not _fits(key, value):
                self.problem(f"{path}: expected {_expected(key)}, got {json.dumps(value)}")
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
                self.found.inert.append(path)
            # "auto" is DeepSpeed's default, which it takes where a key is left out. Of these three
            # keys it means ours, which `ds_machine` works out.
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
        """Let a refused key pass when it is switched off, but name misspelt keys inside it."""
        if isinstance(value, dict):
            if path in SECTIONS:
                before = len(self.found.inert)
                self.walk(path, value)
                del self.found.inert[before:]  # the section as a whole is spoken of
            if value.get("enabled") in (False, "auto") or value.get("device") == "none":
                return
        if value in (False, None, "auto"):
            return
        why = key.why
        if path == "zero_optimization.offload_optimizer":
            states = ""
            if self.shape is not None and self.config.method.type == "spt":
                moments = trainable_bytes(self.config, self.shape) / 2  # not weight and gradient
                states = f" ({moments / 1e6:.1f} MB)"
            why += f": the trainables' Adam states{states} stay with them on each rank; remove it"
        self.problem(f"{path}: {why}")

    def compare(self, path: str, key: Key, value: Any) -> None:
        """Check a value that the YAML owns."""
        owned = {
            "train_batch_size": self.config.train.global_batch,
            "train_micro_batch_size_per_gpu": self.config.train.micro_batch,
            "gradient_accumulation_steps": accumulation_steps(self.config, self.world_size),
            "gradient_clipping": self.config.optim.clip_norm,
            "bf16.enabled": self.config.model.base_bits != 32,
        }[path]
        by_tokens = self.config.train.micro_batch_tokens and "train.micro_batch" in key.why
        if value == "auto" or (value == owned and not by_tokens):
            return
        if by_tokens:
            self.problem(
                f"{path}: got {json.dumps(value)}, but train.micro_batch_tokens of the YAML makes"
                ' it another number in each step; write "auto"'
            )
            return
        ranks = f" ({self.world_size} ranks)" if path == "gradient_accumulation_steps" else ""
        self.problem(
            f"{path}: got {json.dumps(value)}, but {key.why} of the YAML makes it"
            f" {json.dumps(owned)}{ranks}; "
            f'write "auto" or change the YAML'
        )

    def check_stage(self, stage: int, zero: dict[str, Any]) -> None:
        if stage not in (0, 1, 2, 3):
            self.problem(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage}")
            return
        offload = zero.get("offload_param", {})
        if stage == 3:
            if self.config.method.type in TRAIN_THE_BASE:
                self.problem(
                    "zero_optimization.stage: 3 shards the base, but method.type:"
                    f" {self.config.method.type} of the YAML trains weights in it and needs all of"
                    " it on each rank; use stage 0, 1 or 2, or no file"
                )
            if self.world_size == 1 and offload.get("device", "none") == "none":
                self.found.notes.append(
                    "stage 3 with one rank shards nothing; a copy per rank does the same, faster"
                )
            return
        if offload.get("device", "none") != "none":
            self.problem(
                f"zero_optimization.offload_param: stage {stage} ignores it; set"
                " zero_optimization.stage to 3, or remove it"
            )
        self.found.notes.append(
            f"stage {stage}: each rank has a copy of the base and of what trains"
        )
        useless = sorted(name for name in zero if name not in ("stage", "offload_param"))
        self.found.inert += [f"zero_optimization.{name}" for name in useless]
        for name in [*useless, "offload_param"]:
            zero.pop(name, None)


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
    """Name the nearest keys of the section, the section of this key, or the section's keys."""
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
    # A key that exists elsewhere was put in the wrong place. It is no misspelling of one from here.
    if homes and best < 1:
        return f"it belongs in {' or '.join(homes)}"
    if best < 0.6:
        return f"known here: {', '.join(sorted(known))}"
    near = [repr(key) for key, ratio in likeness.items() if ratio >= best - 0.05]
    return f"did you mean {' or '.join(near)}?"
