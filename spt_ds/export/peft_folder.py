"""PEFT's prompt-tuning folders: one written for each prompt of a run, one read as a bank of one.

The files are those of PEFT 0.19 to 0.21, which is needed for neither. PEFT puts the virtual tokens
before all of the text, BOS included, as `prompts.position: before_text` does. Legend: K prompts, P
virtual tokens, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.data.encode import encode_context
from spt_ds.display import printable, shown
from spt_ds.engine.session import train_style
from spt_ds.errors import ConfigError, DataError
from spt_ds.export.run_files import Trained, shared_base, write_new, write_run
from spt_ds.json_input import read_json
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.placement.estimate import BaseShape
from spt_ds.run.folder import RunFolder

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "prompt_embeddings"  # the one tensor of an adapter, [P, D]
VERSION = "0.19.0"  # of PEFT, the oldest whose files are these
PERSONA, HISTORY = ("i like to ski.",), ("hi, what do you do?",)  # of the text in README.md


class Adapter(BaseModel):
    """What of adapter_config.json an import needs."""

    peft_type: Literal["PROMPT_TUNING"]
    task_type: Literal["CAUSAL_LM"]
    num_virtual_tokens: PositiveInt
    # The retriever of a bank of one is D x D numbers: more than any base has would fill the memory.
    token_dim: Annotated[int, Field(gt=0, le=1 << 15)]
    num_transformer_submodules: Literal[1] | None = 1
    base_model_name_or_path: str | None = None
    revision: str | None = None


def export_peft(run: Trained, out: Path, base: str | None) -> list[Path]:
    """Write `out/prompt-0` ... `out/prompt-(K-1)` and a README.md; return the folders.

    `base` is the name that PEFT is told, by default the run's where others can find it. Raises
    ConfigError for what PEFT cannot express.
    """
    bank, config = run.bank, run.config
    _check_expressible(run)
    settings = load_base_config(config.model).get_text_config()
    size = BaseShape.from_config(settings.to_dict()).embed
    if size != bank.shape[2]:
        raise ConfigError(
            f"{run.folder}: its prompts have {bank.shape[2]} numbers a token, and the embeddings of"
            f" {config.model.base} {size}; set model.base to the base that the run was trained over"
        )
    name = shared_base(config, base)
    name = None if name == "embedded" else name
    adapter = {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": settings.num_attention_heads,
        "num_layers": settings.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": bank.shape[1],
        "peft_type": "PROMPT_TUNING",
        "peft_version": VERSION,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": config.model.revision if base is None else None,
        "task_type": "CAUSAL_LM",
        "token_dim": bank.shape[2],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    names = [f"prompt-{k}" for k in range(len(bank))]
    readme = _readme(config, name, names)

    def fill(part: Path) -> None:
        for folder, prompt in zip(names, bank, strict=True):
            (part / folder).mkdir()
            tensors = {KEY: prompt.contiguous().clone()}
            save_file(tensors, part / folder / TENSORS, metadata={"format": "pt"})
            text = json.dumps(adapter, indent=2, sort_keys=True)
            (part / folder / SETTINGS).write_text(text, encoding="utf-8")
        (part / "README.md").write_text(readme, encoding="utf-8")

    write_new(out, fill)
    return [out / folder for folder in names]


def _check_expressible(run: Trained) -> None:
    position, mode = run.config.prompts.position, run.config.generate.mode
    if position != "before_text":
        raise ConfigError(
            f"{run.folder}: prompts.position is {position}, and PEFT puts virtual tokens before all"
            " of the text; export hub or vllm, or train with prompts.position: before_text"
        )
    if run.config.generate.reads_every_prompt:
        raise ConfigError(
            f"{run.folder}: generate.mode is {mode}, which answers with all prompts together, and"
            " PEFT reads one; --set generate.mode=select exports each of them alone"
        )


def _readme(config: Config, base: str | None, names: Sequence[str]) -> str:
    tokenizer = load_tokenizer(config.model)
    context = encode_context(
        PERSONA, HISTORY, tokenizer, config.data.max_tokens, style=train_style(config)
    )
    text = printable(str(tokenizer.decode(context.context_ids)))
    return f"""# Soft prompts for PEFT

Made by `spt-ds export peft`. Each folder is a prompt of {config.prompts.tokens} virtual tokens:
{", ".join(names)}. The retriever that chooses among them is not part of PEFT.

    import transformers, peft
    base = transformers.AutoModelForCausalLM.from_pretrained({base or "FOLDER_OF_THE_BASE"!r})
    model = peft.PeftModel.from_pretrained(base, {names[0]!r})

The prompts were trained on texts of this form (`\\n` is a line end), which the tokenizer must not
begin with a second token of its own:

    {text}

Decode one text at a time. PEFT drops the positions of a left-padded batch, and Llama's replies
then change with the padding.
"""


def import_peft(source: Path, out: Path, base: str | None, overrides: Sequence[str]) -> Config:
    """Make the run folder `out`, a bank of one prompt, of PEFT's folder `source`.

    `base` replaces the one that the folder names. Returns the run's configuration. Raises
    DataError for a folder that is not prompt tuning of a causal LM, or damaged.
    """
    adapter = _adapter(source / SETTINGS)
    prompt = _prompt(source, adapter)
    base = base or adapter.base_model_name_or_path
    if not base:
        raise ConfigError(
            f"{source / SETTINGS}: base_model_name_or_path is empty; name the base with --base"
        )
    tree: dict[str, Any] = {
        "name": "imported",
        "model": {"base": base, "revision": adapter.revision},
        "prompts": {"count": 1, "tokens": adapter.num_virtual_tokens},
        "retriever": {"projections": "shared"},
        "losses": {"selection": 0.0, "fusion": 0.0, "contrastive": 0.0},
    }
    size = adapter.token_dim
    # A bank of one has nothing to choose: the retriever compares prompt and context as they are.
    tensors = {
        "bank.weight": prompt[None],
        "retriever.context.weight": torch.eye(size),
        "retriever.context.bias": torch.zeros(size),
    }
    made: list[Config] = []

    def fill(part: Path) -> None:
        plain = RunFolder(part)
        plain.config.write_text(dump_config(Config.model_validate(tree)), encoding="utf-8")
        made.append(plain.load_config(overrides))
        write_run(part, made[0], tensors, 0, None)

    write_new(out, fill)
    return made[0]


def _adapter(path: Path) -> Adapter:
    mend = "give a folder that PEFT's save_pretrained wrote for prompt tuning of a causal LM"
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); {mend}") from error
    try:
        return Adapter.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, fault["loc"])) or "the file"
        kinds = {
            "peft_type": "; only PROMPT_TUNING is virtual tokens before the text and nothing else",
            "task_type": "; only causal LMs are trained here",
        }
        raise DataError(
            f"{path}: {key} is {shown(fault['input'])} ({fault['msg']}){kinds.get(key, '')}; {mend}"
        ) from error


def _prompt(source: Path, adapter: Adapter) -> torch.Tensor:
    """The virtual tokens [P, D] in fp32."""
    path = source / TENSORS
    if not path.is_file() and (source / "adapter_model.bin").is_file():
        raise DataError(
            f"{source}: has only pickled weights (adapter_model.bin), which are not read; save the"
            " adapter again with PEFT's save_pretrained(safe_serialization=True)"
        )
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the adapter again") from error
    shape = (adapter.num_virtual_tokens, adapter.token_dim)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    prompt = tensors.get(KEY)
    if len(tensors) != 1 or prompt is None or tuple(prompt.shape) != shape:
        raise DataError(
            f"{path}: holds {shown(found)}, expected {KEY} of shape {shape} alone, as"
            f" {SETTINGS} says"
        )
    if not prompt.is_floating_point() or not bool(torch.isfinite(prompt.float()).all()):
        raise DataError(
            f"{path}: {KEY} holds numbers that are not finite, or no floating-point numbers; save"
            " the adapter again"
        )
    return prompt.float()
