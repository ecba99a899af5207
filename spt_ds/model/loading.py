"""The one door to transformers' loading: configuration, tokenizer and weights of a base.

Code that a base brings along is never run and nobody is asked about it, whatever stands in its
files; what is damaged, implausible or incomplete is refused before memory is taken for a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import set_quantized_state

from spt_ds.config.model import ModelConfig
from spt_ds.display import shortened, shown
from spt_ds.errors import ModelError, SptError
from spt_ds.model.attention import PACKED
from spt_ds.model.base_check import SUPPORTED
from spt_ds.model.base_files import (
    base_path,
    check_settings,
    check_tokenizer_settings,
    stored_shapes,
    weight_files,
)
from spt_ds.model.weight_names import check_shapes

MAX_BUFFER_BYTES = 4 << 30  # of what config.json alone sizes; no base that was run has 0.2 GiB
SECTION = "spt_quantization"  # in config.json of a base that `spt-ds quantize` wrote


def load_base_config(config: ModelConfig) -> PretrainedConfig:
    """Read the base's configuration."""
    path = base_path(config.base)
    check_settings(path, config.revision)
    with _reading(f"no configuration can be read from {path}"):
        base: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=False
        )
    return base


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, which must have an end-of-sequence token."""
    path = base_path(config.base)
    # AutoTokenizer reads config.json too, where there is one.
    check_settings(path, config.revision, needed=False)
    check_tokenizer_settings(path, config.revision)
    with _reading(f"no tokenizer can be read from {path}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=False
        )
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise ModelError(
            f"model.base: the tokenizer of {path} has no end-of-sequence token; replies could"
            " not end"
        )
    if pad is None:
        # Only ever at masked positions of a generation batch.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_lm(base: PretrainedConfig, dtype: torch.dtype | None = None) -> Any:
    """Build the causal LM of `base` with weights as its architecture initialises them."""
    # from_config writes into what it is given.
    base = copy.deepcopy(base)
    try:
        return AutoModelForCausalLM.from_config(
            base, dtype=dtype, attn_implementation=PACKED, trust_remote_code=False
        )
    except KeyError as error:
        if error.args != (PACKED,):
            raise
        raise ModelError(
            f"model.base: {base.model_type} picks its attention from a list of its own; {SUPPORTED}"
        ) from error


def stored_lm(config: ModelConfig, base: PretrainedConfig, path: str, dtype: torch.dtype) -> Any:
    """Load the causal LM of `base` with the weights of `path`, which `check_weights` has passed."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        config=base,
        dtype=dtype,
        attn_implementation=PACKED,
        revision=config.revision,
        trust_remote_code=False,
        # None takes what is there, safetensors first. True refuses a pickle even where nothing else
        # is.
        use_safetensors=None if config.allow_pickle else True,
    )


def generation_config(config: ModelConfig, path: str) -> GenerationConfig | None:
    """Read the base's generation_config.json; None where it has none."""
    with _reading(f"no generation_config.json can be read from {path}"):
        try:
            return GenerationConfig.from_pretrained(path, revision=config.revision or "main")
        except OSError:
            return None


def check_weights(config: ModelConfig, base: PretrainedConfig) -> None:
    """Raise ModelError unless the weight files hold what config.json describes, and nothing more.

    Reads their headers alone. A base that is stored quantised as `config` asks is checked layer by
    layer instead.
    """
    path = base_path(config.base)
    # The cheap refusals come first: the weight files of a hub base may be downloaded next.
    _refuse_other_quantisation(base, config, path)
    generation_config(config, path)
    files = weight_files(path, config.revision, pickled=config.allow_pickle)
    # From here on the number of stored tensors bounds what config.json may ask for.
    shapes = stored_shapes(path, files)
    with (
        _reading(f"config.json of {path} describes no model that can be built"),
        torch.device("meta"),
        # Keeps transformers from sharding weights that are not there.
        set_quantized_state(),
        _modules_of(len(shapes), path),
    ):
        empty = new_lm(base)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())
    if buffers > MAX_BUFFER_BYTES:
        raise ModelError(
            f"model.base: config.json of {path} asks for {buffers >> 30} GiB apart from the weights"
            f" (masks, positions), allowed are {MAX_BUFFER_BYTES >> 30}; lower the positions in it"
        )
    if not hasattr(base, SECTION):
        check_shapes(empty, shapes, path)


@contextmanager
def _modules_of(tensors: int, path: str) -> Iterator[None]:
    """Inside, raise ModelError where more modules are made than so many stored tensors have.

    A module without weights takes memory and time too, and each family has its own names for how
    many there are.
    """
    most, made = 1000 + 10 * tensors, 0

    def count(_: nn.Module, __: str, ___: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(
                f"model.base: config.json of {path} describes more than {most} modules, and its"
                f" weights are {tensors} tensors; configuration and weights belong to different"
                " models"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def quantisation_section(config: ModelConfig) -> dict[str, Any]:
    """What config.json of a stored quantised base says of it."""
    quant = config.quant
    return {
        "format": 1,
        "bits": config.base_bits,
        "type": quant.type if config.base_bits == 4 else "int8",
        "block_size": quant.block_size,
        "double_quant": quant.double_quant and config.base_bits == 4,
        "skip_modules": list(quant.skip_modules),
    }


def _refuse_other_quantisation(base: PretrainedConfig, config: ModelConfig, path: str) -> None:
    """Raise ModelError for a base that is stored quantised by others, or otherwise than `config`
    asks for.
    """
    foreign = getattr(base, "quantization_config", None)
    if foreign is not None:
        known = foreign if isinstance(foreign, dict) else {}
        method = shortened(str(known.get("quant_method", "an unknown method")))
        raise ModelError(
            f"{path}: its weights are already quantised ({method}); under ZeRO-3 such layers keep"
            " scales or whole weights on every rank. Take the 16-bit checkpoint; model.base_bits:"
            " 4 or 8 quantises it as it is read, `spt-ds quantize` stores the result"
        )
    stored = getattr(base, SECTION, None)
    if stored is None:
        return
    if not isinstance(stored, dict):
        raise ModelError(
            f"{path}: {SECTION} in its config.json is {shown(stored)}, expected what `spt-ds"
            " quantize` writes; make the folder again"
        )
    asked = quantisation_section(config)
    different = [key for key in asked if stored.get(key) != asked[key]]
    if different:
        keys = {"bits": "model.base_bits"}
        # At 8 bits there is one code book, `int8`, and scales are plain: they follow from base_bits
        # alone.
        implied = ("type", "double_quant") if stored.get("bits") == 8 else ()
        to_set = [key for key in different if key not in implied]
        wanted = ", ".join(
            f"{keys.get(key, f'model.quant.{key}')}: {stored.get(key)}" for key in to_set
        )
        got = ", ".join(f"{key} {asked[key]}" for key in different)
        raise ModelError(
            f"{path}: this base is stored quantised in another way; set {wanted} (the config has"
            f" {got})"
        )


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """Turn whatever transformers raises over a base's files into a ModelError.

    It checks few of them before use, so that damaged ones fail as a dozen unrelated classes.
    """
    try:
        yield
    except SptError:
        raise
    except Exception as error:
        raise ModelError(f"model.base: {problem}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next where it announces it; or its class."""
    first, _, rest = str(error).strip().partition("\n")
    line = first or type(error).__name__
    if line.endswith(":"):
        line = f"{line} {rest.strip().partition(chr(10))[0]}"
    line = shortened(line, 500)
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"
