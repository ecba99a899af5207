"""The run folder: configuration first, then what the run writes, at last DONE.json. Written by rank
0.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import spt_ds
from spt_ds.config.load import dump_config, load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.files import write_whole

CONFIG, DONE, METRICS, ENVIRONMENT = "config.yaml", "DONE.json", "metrics.jsonl", "environment.json"
CHECKPOINTS = "checkpoints"
# What of the environment is recorded is an allow-list, so that no secret gets into a run folder.
RECORDED = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
    "WORLD_SIZE",
)
# What may change between a run and its continuation. It leaves every step's draws and arithmetic
# alone, up to the order of sums; `max_steps` and `epochs` say how long the run is, which a cosine
# schedule follows, and `eval_every_steps` at which steps the best checkpoint is looked for.
FREE = {"engine", "checkpoint", "log", "generate"}
FREE_KEYS = {
    "train": {"max_steps", "epochs", "eval_every_steps", "max_hours", "micro_batch"},
    "data": {"workers", "cache_dir", "test", "max_test_examples"},
    "model": {"activation_checkpointing", "attention"},
}


def prepare(run_dir: Path, config: Config, deepspeed_config: str | None) -> None:
    """Make the folder and write configuration, DeepSpeed JSON (already checked), versions and
    environment into it.

    A DONE.json is removed first: call it only for a run that is to go on. Raises ConfigError as
    `check` does.
    """
    check(run_dir, config)
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (run_dir / DONE).unlink(missing_ok=True)
        write_whole(run_dir / CONFIG, dump_config(config))
        write_whole(run_dir / ENVIRONMENT, json.dumps(environment(), indent=2))
        if deepspeed_config is not None:
            write_whole(
                run_dir / "deepspeed.json", Path(deepspeed_config).read_text(encoding="utf-8")
            )
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another --run-dir"
        ) from error


def check(run_dir: Path, config: Config) -> None:
    """Raise ConfigError when the folder holds a run whose numbers this configuration would not
    continue.

    What a refused start left behind, without a line of metrics or a checkpoint, holds none.
    """
    earlier = run_dir / CONFIG
    held = any((run_dir / name).is_file() for name in (METRICS, DONE)) or any(
        (run_dir / CHECKPOINTS).glob("step-*")
    )
    changed = differences(load_config(str(earlier)), config) if held and earlier.is_file() else []
    if changed:
        raise ConfigError(
            f"{run_dir}: holds a run with another configuration ({'; '.join(changed)}); "
            "choose another --run-dir, or remove the folder to start over"
        )


def is_done(run_dir: Path, config: Config) -> bool:
    """Whether the folder's run is done and this configuration asks for no more steps; raises as
    `check` does.
    """
    check(run_dir, config)
    done, earlier = run_dir / DONE, run_dir / CONFIG
    if not done.is_file():
        return False
    if not earlier.is_file():
        return True
    before, now = load_config(str(earlier)).train, config.train
    if (before.max_steps, before.epochs) == (now.max_steps, now.epochs):
        return True
    if now.max_steps:
        try:
            return int(json.loads(done.read_text(encoding="utf-8"))["step"]) >= now.max_steps
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{done}: cannot be read ({error}); remove it and the run goes on"
            ) from error
    return before.max_steps == 0 and now.epochs <= before.epochs


def differences(old: Config, new: Config) -> list[str]:
    """List `key: old -> new` for every changed option that moves the numbers of the training."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    watched = [
        (section, key)
        for section in before.keys() - FREE
        if isinstance(before[section], dict)  # not the name of the run
        for key in before[section].keys() - FREE_KEYS.get(section, set())
    ]
    return sorted(
        f"{section}.{key}: {before[section][key]!r} -> {after[section][key]!r}"
        for section, key in watched
        if before[section][key] != after[section][key]
    )


def environment() -> dict[str, Any]:
    """Versions, code state, hardware and the allow-listed variables."""
    packages = ("torch", "deepspeed", "transformers", "bitsandbytes", "datasets", "tokenizers")
    return {
        "spt_ds": spt_ds.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": {"host": platform.node(), "cpus": os.cpu_count(), "system": platform.platform()},
        "variables": {name: os.environ[name] for name in RECORDED if name in os.environ},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """The git commit, with `-dirty` where files changed, or `unknown` outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()
