"""Builds a quantised base layer by layer, so that no rank ever holds more than its share and one
layer.

The model is built without memory for its weights; each module then gets its own weights, is
quantised if it is a linear layer, and is sharded at once, before the next one is read.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import set_quantized_state

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.log import get_logger, say_once
from spt_ds.model.loading import new_lm
from spt_ds.model.quant import Packing, QuantLinear, quantise
from spt_ds.model.quant_source import Source, open_source

WORST_LAYERS = 3

Shard = Callable[[nn.Module], None]


def load_quantized(
    config: ModelConfig,
    base: PretrainedConfig,
    path: str,
    shard: Shard | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Return the causal LM of `base` with the weights of `path`, quantised as `config` says, the
    rest in `dtype`.

    `shard` takes each finished module (ZeRO-3), children before parents; without it the weights are
    on the GPU, where there is one. Raises ModelError for a checkpoint that cannot be read,
    streamed, or is quantised in another way.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    lm = skeleton(base, dtype)
    source = open_source(lm, config, path, device)
    errors: dict[str, float] = {}
    for _, module in finished_modules(lm, config, source, device, errors):
        if shard is not None:
            shard(module)
    report(lm, errors, Packing.of(config))
    return lm


def skeleton(base: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The causal LM of `base` with real buffers and with Parameters that have no memory."""
    with (
        _parameters_on_meta(),
        # Keeps transformers from sharding empty weights.
        set_quantized_state(),
    ):
        return new_lm(base, dtype).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = _frozen(param.detach().to("meta"))
        original(module, name, param)

    # Not `torch.device("meta")`: it would take the numbers of the buffers too, and no checkpoint
    # holds those (the frequencies of RoPE).
    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def finished_modules(
    lm: Any, config: ModelConfig, source: Source, device: torch.device, errors: dict[str, float]
) -> Iterator[tuple[str, nn.Module]]:
    """Fill the modules of a `skeleton` that own weights, children before parents; yield each with
    its name.

    Linear layers become `QuantLinear` in `lm`; `errors` gets the relative error of each that was
    quantised here.
    """
    packing, to_quantise = Packing.of(config), _layers_to_quantise(lm, config)
    # Empty weight -> real one. Both are held, so that no id is given to another weight.
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    # `named_modules` lists parents first. The list is made before the loop, because quantised
    # layers replace modules of the tree.
    for name, module in reversed(list(lm.named_modules())):
        empty = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in done}
        tensors = source(name, module) if empty else {}
        if name in to_quantise:
            assert isinstance(module, nn.Linear)
            if "packed" in tensors:
                # A copy, because the source is a mapped file: a view would hold on to the file's
                # pages.
                packed = tensors["packed"].to(device, copy=True)
            else:
                packed, errors[name] = quantise(tensors["weight"], packing, device)
            bias = (
                None
                if module.bias is None
                else _frozen(tensors["bias"].to(device, module.bias.dtype, copy=True))
            )
            module = QuantLinear((module.out_features, module.in_features), packing, packed, bias)
            lm.set_submodule(name, module)
        else:
            for key, meta in empty.items():
                done[id(meta)] = meta, _frozen(tensors[key].to(device, meta.dtype, copy=True))
            for key, meta in list(module.named_parameters(recurse=False)):
                setattr(module, key, done[id(meta)][1])
        # A module whose weights are all shared was filled by the first owner and has nothing to
        # shard.
        if empty:
            yield name, module


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _layers_to_quantise(lm: Any, config: ModelConfig) -> set[str]:
    """Names of the linear layers that `quant.skip_modules` leaves; never the head, nor a weight
    that layers share.
    """
    _refuse_unknown_names(lm, config.quant.skip_modules)
    head = lm.get_output_embeddings()
    owners = Counter(id(p) for module in lm.modules() for p in module.parameters(recurse=False))
    skip = config.quant.skip_modules
    names = {
        name
        for name, module in lm.named_modules()
        if type(module) is nn.Linear
        and module is not head  # the losses read its weight
        and owners[id(module.weight)] == 1
        and not any(name == end or name.endswith("." + end) for end in skip)
    }
    if not names:
        raise ModelError(
            f"model.base_bits: {config.base_bits}: {type(lm).__name__} has no plain linear layer to"
            f" quantise apart from its head and quant.skip_modules {list(skip)}; set"
            " model.base_bits: 16"
        )
    return names


def _refuse_unknown_names(lm: Any, skip: Iterable[str]) -> None:
    """Raise ModelError for an entry that no linear layer's name ends with; `lm_head` may be tied or
    absent.
    """
    layers = [
        name.split(".") for name, module in lm.named_modules() if isinstance(module, nn.Linear)
    ]
    known = {".".join(parts[-count:]) for parts in layers for count in range(1, len(parts) + 1)} | {
        "lm_head"
    }
    for entry in skip:
        if entry not in known:
            ends = sorted({parts[-1] for parts in layers})
            near = difflib.get_close_matches(entry, sorted(known), 3) or ends
            raise ModelError(
                f"model.quant.skip_modules: {entry!r} is no linear layer of {type(lm).__name__};"
                f" did you mean {' or '.join(repr(name) for name in near)}? Known:"
                f" {', '.join(ends)}, or a layer's full name"
            )


def report(lm: nn.Module, errors: dict[str, float], packing: Packing) -> None:
    """Say once how much of the base is quantised and how well, the worst layers by name."""
    layers = [module for module in lm.modules() if isinstance(module, QuantLinear)]
    numel = sum(layer.in_features * layer.out_features for layer in layers)
    what = (
        f"{len(layers)} linear layers ({numel / 1e6:.1f} M weights) in {packing.book}, blocks of"
        f" {packing.block_size}"
    )
    if not errors:
        say_once(f"quantised base: {what}, read as stored")
        return
    worst = sorted(errors, key=lambda name: -errors[name])[:WORST_LAYERS]
    mean = sum(errors.values()) / len(errors)
    named = ", ".join(f"{name} {errors[name]:.2%}" for name in worst)
    say_once(
        f"quantised base: {what}; relative error of the weights {mean:.2%} on average, worst"
        f" {named}"
    )
    for name in sorted(errors):
        get_logger().debug("quantisation error of %s: %.4f", name, errors[name])
