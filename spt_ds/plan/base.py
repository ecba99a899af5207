"""The sizes of a base, and the memory of this machine, without importing PyTorch where it can."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ConfigError, ModelError
from spt_ds.json_input import read_json
from spt_ds.log import say_loading
from spt_ds.placement.estimate import BaseShape
from spt_ds.placement.known_bases import KNOWN_BASES
from spt_ds.placement.memory import GIB, USABLE, Memory, host_memory_per_rank, memory_per_rank

# Whether the head is a table of its own follows from the model's class where config.json says
# nothing of it, so that such a file is left to transformers.
_DECIDES = "tie_word_embeddings"


def shape_of(config: ModelConfig) -> BaseShape:
    """The sizes of `model.base`: a well-known one, a folder with config.json, or a hub id.

    Raises ModelError where they cannot be read.
    """
    if config.base in KNOWN_BASES:
        return BaseShape.from_config(KNOWN_BASES[config.base])
    folder = Path(config.base)
    if config.base == "embedded":
        folder = Path(str(resources.files("spt_ds") / "assets" / "base"))
    if (folder / "config.json").is_file():
        try:
            settings = read_json(folder / "config.json")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.base: {folder / 'config.json'} is damaged ({error}); give a base's folder"
            ) from error
        if isinstance(settings, dict) and _DECIDES in settings and "hidden_size" in settings:
            return BaseShape.from_config(settings)
    say_loading()
    from spt_ds.model.loading import load_base_config

    return BaseShape.from_config(load_base_config(config).to_dict())


def memory_of(gpu_gib: float | None, host_gib: float | None, ranks: int) -> Memory:
    """What each of `ranks` ranks can plan with: as given, else as this machine has it."""
    gpu = _gpu_bytes() if gpu_gib is None else int(gpu_gib * GIB)
    if gpu is None and host_gib is not None:
        raise ConfigError(
            "--host-gib is the host's memory next to a GPU, and this machine has none; give"
            " --memory-gib too"
        )
    host = host_memory_per_rank(ranks) if host_gib is None else int(host_gib * GIB * USABLE)
    return Memory(memory_per_rank(gpu, ranks), None if gpu is None else host)


def _gpu_bytes() -> int | None:
    """Memory of this machine's first GPU, None without one; by the driver's own tool."""
    # To ask PyTorch would import it, which takes longer than the whole plan.
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return int(told.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
