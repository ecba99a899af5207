"""Checkpoints that know no world size: what trains and Adam's moments, in fp32.

A checkpoint is a folder `step-00000200` with `trainables.safetensors`, `optimizer.safetensors` and
`state.json`, and it is one only when `COMPLETE.json` is in it, the last file written, which holds
the sha256 of the others. It is written under a temporary name, flushed to disk and renamed. Reading
runs no code. There is no generator state to save: every draw of a run is keyed by its seed and step
(see rng.py), so a run resumed on other ranks draws the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from spt_ds.display import shown
from spt_ds.errors import CheckpointError, SptError
from spt_ds.files import sync
from spt_ds.json_input import load_json, read_json
from spt_ds.log import get_logger

MARKER = "COMPLETE.json"
TRAINABLES, OPTIMIZER, STATE = "trainables.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    `state` is plain JSON: step, best metric, configuration, code version.
    """

    trainables: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` to `folder/step-N` atomically and return its path; call on one rank only.

    Raises CheckpointError when the disk refuses; older checkpoints are untouched and nothing
    half-written stays.
    """
    step = checkpoint.state["step"]
    name = _name(step)
    assert name is not None
    final = folder / name
    temporary = folder / f".{final.name}.writing"
    if _is_whole(final):
        # A run that was killed after its last save takes no step before it saves again: the same
        # numbers are there already, and to replace them would leave a moment without them.
        return final
    files = {
        TRAINABLES: save_tensors(_plain(checkpoint.trainables)),
        OPTIMIZER: save_tensors(_plain(checkpoint.optimizer)),
        STATE: json.dumps(checkpoint.state, indent=2).encode(),
    }
    marker = {
        "format": FORMAT,
        "step": step,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in (*files.items(), (MARKER, json.dumps(marker, indent=2).encode())):
            _write(temporary / name, data)
        # Before the rename: a power cut must not leave the final name on a folder whose files are
        # not there yet.
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # left by a kill without its marker
        temporary.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); free space or choose another"
            " --run-dir. Earlier checkpoints are intact"
        ) from error
    return final


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; raise CheckpointError saying what is wrong with it."""
    files = _verified(path)
    try:
        # Parsed from the bytes that were verified: the files are not read a second time.
        state = load_json(files[STATE])
        tensors = load_tensors(files[TRAINABLES]), load_tensors(files[OPTIMIZER])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not written by spt_ds ({error})") from error
    if problem := _fault(state, path.name):
        raise CheckpointError(f"{path}: not written by spt_ds ({STATE}: {problem})")
    return Checkpoint(*tensors, state)


def _fault(state: Any, name: str) -> str:
    """What is wrong with the parts of a state that every reader needs; empty where nothing is."""
    if not isinstance(state, dict) or not isinstance(state.get("run", {}), dict):
        return f"expected an object in which 'run' is an object, got {shown(state)}"
    if name != _name(state.get("step")):
        return f"step is {shown(state.get('step'))} in the folder {name}"
    best = state.get("run", {}).get("best_step")
    if best is not None and _name(best) is None:
        return f"best_step is {shown(best)}, expected null or a whole number from 0 on"
    return ""


def _name(step: object) -> str | None:
    """The folder of a step's checkpoint; None where `step` is no step."""
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**12:
        return None
    return f"step-{step:08d}"


def load_newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest good checkpoint of a run; a warning names each damaged one before it."""
    # Names sort as the steps do, because the numbers are padded with zeros.
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return path, load(path)
        except CheckpointError as error:
            get_logger().warning(f"{error}; trying an older checkpoint")
    return None


def find(folder: Path, which: str) -> Path:
    """Return a run's `best`, `last` or numbered checkpoint; CheckpointError when there is none.

    `which` is what a user gave: anything else is an error that names the three.
    """
    if which.isdecimal() and len(which) < 13:
        path = folder / f"step-{int(which):08d}"
        if not path.is_dir():
            there = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
            raise CheckpointError(f"{path}: no such checkpoint; there are: {there}")
        return path
    if which not in ("best", "last"):
        raise SptError(f"--checkpoint {shown(which)}: give best, last or the number of a step")
    newest = load_newest(folder)
    if newest is None:
        raise CheckpointError(
            f"{folder}: no good checkpoint; train first, or give another run folder"
        )
    path, saved = newest
    best = saved.state.get("run", {}).get("best_step")
    if which == "last" or best is None:
        return path
    wanted = folder / f"step-{best:08d}"
    if wanted.is_dir():
        return wanted
    get_logger().warning(
        f"{wanted}: the best checkpoint is missing; using the last one, {path.name}, instead"
    )
    return path


def set_aside(folder: Path, step: int) -> None:
    """Rename what is newer than `step`, from which a run resumes: it is damaged.

    Raises CheckpointError when the disk refuses.
    """
    newer = [path for path in sorted(folder.glob("step-*")) if path.name > f"step-{step:08d}"]
    for path in newer:
        target = path.with_name(f"damaged-{path.name}")
        try:
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be renamed ({error.strerror}); move it away by hand"
            ) from error
    if newer:
        names = ", ".join(path.name for path in newer)
        get_logger().warning(
            f"{folder}: set aside as damaged-*: {names}; the run resumes from step {step}"
        )


def prune(folder: Path, keep_last: int, best: int | None, saved: int) -> None:
    """Remove old checkpoints: the newest `keep_last` and that of step `best` stay.

    `saved` is the step that was just written: it stays, and nothing newer counts. Raises
    CheckpointError when the disk refuses.
    """
    complete = [
        path
        for path in sorted(folder.glob("step-*"))
        if path.name <= f"step-{saved:08d}" and (path / MARKER).is_file()
    ]
    for path in complete[:-keep_last]:
        if best is None or path.name != f"step-{best:08d}":
            try:
                # The marker goes first: what a kill leaves behind is then no checkpoint.
                (path / MARKER).unlink()
            except OSError as error:
                raise CheckpointError(
                    f"{path}: cannot be removed ({error.strerror}); look at its owner"
                ) from error
            shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Adam's moments and step counts as `name.exp_avg` ...; empty before the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    out = {}
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}.{key}"] = torch.as_tensor(value)
    return out


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    tensors: dict[str, torch.Tensor],
    source: Path,
) -> None:
    """Put back what `optimizer_tensors` gave, all of it or nothing; `source` is where it was read.

    Raises CheckpointError where they are not those of the run's parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = dict(zip(names, parameters, strict=True))
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        moments.setdefault(name, {})[kind] = value
    # All of them are checked before the first is put back.
    for name, kinds in moments.items():
        fits = name in named and all(
            value.shape == (torch.Size() if kind == "step" else named[name].shape)
            for kind, value in kinds.items()
        )
        if not fits or kinds.keys() != set(MOMENTS):
            raise CheckpointError(
                f"{source}: does not fit this run: {shown(name)} in {OPTIMIZER} has"
                f" {', '.join(f'{shown(k)} {tuple(v.shape)}' for k, v in sorted(kinds.items()))}"
            )
    for name, kinds in moments.items():
        parameter = named[name]
        optimizer.state[parameter] = {
            # AdamW keeps its step counts on the CPU, whatever the device of the parameter.
            kind: value.clone() if kind == "step" else value.to(parameter.device).clone()
            for kind, value in kinds.items()
        }


def restore_trainables(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: Path
) -> None:
    """Copy `tensors` into the parameters of the same names and shapes, all of them or none."""
    own = dict(module.named_parameters())
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unknown {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the run has {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source}: does not fit this run: {'; '.join(sorted(problems))}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    try:
        _verified(path)
    except CheckpointError:
        return False
    return True


def _verified(path: Path) -> dict[str, bytes]:
    marker_path = path / MARKER
    if not marker_path.is_file():
        raise CheckpointError(f"{path}: incomplete checkpoint ({MARKER} is missing)")
    try:
        marker = read_json(marker_path)
        expected = dict(marker["sha256"])
        files = {name: (path / name).read_bytes() for name in (TRAINABLES, OPTIMIZER, STATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint ({type(error).__name__}: {error})"
        ) from error
    if marker.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {shown(marker.get('format'))}, this version reads {FORMAT}"
        )
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != expected.get(name):
            raise CheckpointError(f"{path}: damaged checkpoint ({name} does not match its sha256)")
    return files
