"""The frozen causal LM: load, freeze, embed, run packed rows from embeddings, and the head.

Any causal LM of `transformers` whose layers go through its attention interface will do; `check`
proves it at start-up. Legend: N packed tokens, n rows, D embedding size, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.log import say_once
from spt_ds.model.activations import slim_activations
from spt_ds.model.attention import PACKED, Layout, choose_backend
from spt_ds.model.base_check import check_base
from spt_ds.model.base_files import base_path
from spt_ds.model.bf16 import bf16_advice
from spt_ds.model.compiled import eager_layers
from spt_ds.model.conversation import cache_argument
from spt_ds.model.graph_attention import enlist
from spt_ds.model.head import FrozenHead
from spt_ds.model.kernel_caches import bound_kernel_caches
from spt_ds.model.loading import check_weights, first_line, new_lm, stored_lm


class Backbone(nn.Module):
    """Root module of the frozen base: all that touches its weights runs inside one call of it.

    ZeRO-3 starts a new prefetch trace at each call of the root module; one call per micro-batch
    keeps the order of layers the same from step to step, so that gathers overlap with computation.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    """ids [n] -> rows of the table [n, D]; they have a graph only where the table trains."""
    head: Callable[..., torch.Tensor]
    """See `FrozenHead.forward`."""

    def __init__(self, lm: Any, backend: str, check_quantised: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.backend = backend
        self.check_quantised = check_quantised
        self.compiled = False
        head = lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelError(
                f"the head of {type(lm).__name__} is {type(head).__name__}; a plain linear head is"
                " needed"
            )
        frozen = FrozenHead(head.weight, head.bias)
        lm.set_output_embeddings(frozen)
        # Calls, not modules: a child of two parents would be hooked twice by ZeRO-3.
        self.embed, self.head = lm.get_input_embeddings().__call__, frozen.__call__
        lm.requires_grad_(False)
        lm.eval()
        _no_dropout(lm)
        slim_activations(lm)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(self, *args)` as one call of the root module."""
        return function(self, *args)

    @property
    def config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.lm.config
        return config

    @property
    def embed_size(self) -> int:
        """D, the size of an input embedding (OPT-350m's differs from its hidden size)."""
        size: int = self.lm.get_input_embeddings().embedding_dim
        return size

    @property
    def vocabulary(self) -> int:
        size: int = self.lm.get_input_embeddings().num_embeddings
        return size

    def run(self, embeddings: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Packed embeddings [N, D] -> last hidden states [N, head size], row by row of `layout`."""
        inputs = embeddings[None]
        if self.compiled:
            enlist(layout)
            # A view has a graph of its own: the first layer would be compiled apart from the rest.
            inputs = inputs.clone()
        out = self.lm.base_model(
            inputs_embeds=inputs,
            position_ids=layout.positions[None],
            use_cache=False,
            layout=layout,
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        if self.compiled and hidden.grad_fn is not None:
            # The backward pass finds the layout by its number, as long as somebody holds it.
            hidden.grad_fn.metadata["layout"] = layout  # type: ignore[index]
        return hidden

    def checkpoint_activations(self, mode: str) -> None:
        """Recompute layers in the backward pass: `off`, `non_reentrant` or `reentrant`."""
        with warnings.catch_warnings():
            # Names that transformers renames in 5.2x and drops in 6; setup.py admits releases that
            # know only these.
            warnings.simplefilter("ignore", FutureWarning)
            if mode == "off":
                self.lm.gradient_checkpointing_disable()
                return
            self.lm.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"}
            )
        # transformers now marks every embedding as needing a gradient. Ours are frozen, and a graph
        # that hangs on the pooled context would be freed by the first micro-batch's backward pass.
        self.lm.disable_input_require_grads()
        for module in self.modules():
            # OPT's decoder carries the flag too. In training mode some transformers releases draw
            # a number for each of its layers (LayerDrop), and the host would read it.
            if getattr(module, "gradient_checkpointing", None) is True and not hasattr(
                module, "layerdrop"
            ):
                # the layer's own flag alone: the modules in it stay in eval mode
                module.training = True

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """`transformers`' own generate on padded rows, with its own attention masks and cache."""
        with self._as_transformers_has_it():
            tokens: torch.Tensor = self.lm.generate(**kwargs)
        return tokens

    def read(self, embeddings: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> None:
        """Put keys and values of left-padded rows [rows, L, D], mask [rows, L], into `cache`."""
        with self._as_transformers_has_it():
            self.lm.base_model(inputs_embeds=embeddings, **self._cached(mask, cache))

    def next_logits(
        self, mask: torch.Tensor, cache: DynamicCache, **given: torch.Tensor
    ) -> torch.Tensor:
        """Logits [rows, V] of the token behind left-padded rows, whose keys and values go into
        `cache`.

        Args: mask [rows, L], of what the cache holds and of what is given; given, the last tokens
        of the rows: `inputs_embeds` [rows, n, D] or `input_ids` [rows, n].
        """
        inputs = self._cached(mask, cache)
        read = next(iter(given.values())).shape[1]
        inputs["position_ids"] = inputs["position_ids"][:, -read:]
        last = {"logits_to_keep": 1} if self.lm._supports_logits_to_keep() else {}
        with self._as_transformers_has_it():
            logits: torch.Tensor = self.lm(**given, **inputs, **last).logits
        return logits[:, -1]

    def _cached(self, mask: torch.Tensor, cache: DynamicCache) -> dict[str, Any]:
        # As `generate` counts positions: from a row's first real token.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        common = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        return common | cache_argument(self.lm, cache)

    @contextmanager
    def _as_transformers_has_it(self) -> Iterator[None]:
        """The model with its own attention and no recomputation, for cached decoding."""
        recomputing = [module for module in self.lm.modules() if module.training]
        # a layer that recomputes its activations drops the cache: the second token would be wrong
        self.lm.eval()
        # Gemma 2 caps its attention scores, which SDPA cannot.
        sdpa = self.backend != "eager" and self.lm._supports_sdpa
        self.lm.set_attn_implementation("sdpa" if sdpa else "eager")
        # What the base's own generation_config.json asks for (penalties, two ends) is not the
        # run's.
        own, self.lm.generation_config = self.lm.generation_config, GenerationConfig()
        try:
            with eager_layers(self):
                yield
        finally:
            self.lm.generation_config = own
            self.lm.set_attn_implementation(PACKED)
            for module in recomputing:
                module.training = True

    def check(self, *, suffix: bool = False) -> None:
        """Raise ModelError where packed rows give other logits than the base's own forward."""
        check_base(self, suffix=suffix)


def base_dtype(bits: int) -> torch.dtype:
    """Computing dtype of a base of so many bits."""
    return torch.float32 if bits == 32 else torch.bfloat16


def load_lm(
    config: ModelConfig, base: PretrainedConfig, shard: Callable[[nn.Module], None] | None = None
) -> Any:
    """Load (or draw) the weights.

    They are sharded as they are read when an HfDeepSpeedConfig is alive or `shard` is given.
    """
    dtype, path = base_dtype(config.base_bits), base_path(config.base)
    if not config.random_init:
        check_weights(config, base)
    try:
        if config.base_bits in (4, 8):
            from spt_ds.model.quant_load import load_quantized

            return load_quantized(config, base, path, shard, dtype)
        if config.random_init:
            return _random_lm(base, dtype)
        return stored_lm(config, base, path, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: {first_line(error)}"
        ) from error


def _random_lm(base: PretrainedConfig, dtype: torch.dtype) -> Any:
    # Under ZeRO-3 transformers zeroes the pad row of a weight that is already sharded; there is
    # none to zero.
    pad, base.pad_token_id = base.pad_token_id, None
    lm = new_lm(base, dtype)
    base.pad_token_id = lm.config.pad_token_id = pad
    return lm


def build_backbone(
    config: ModelConfig,
    base: PretrainedConfig,
    device: torch.device,
    *,
    strict: bool,
    shard: Callable[[nn.Module], None] | None = None,
) -> Backbone:
    """Load the frozen base, whose own configuration is `base`; the caller moves it to `device`
    unless ZeRO-3 placed its shards.

    `shard` shards one module at once; a quantised base, which is made layer by layer, needs it
    under ZeRO-3.
    """
    bound_kernel_caches()
    if device.type == "cpu" and (advice := bf16_advice(config.base_bits)):
        say_once(advice, logging.WARNING)
    lm = load_lm(config, base, shard)
    backend = choose_backend(config.attention, device, base_dtype(config.base_bits), strict=strict)
    return Backbone(lm, backend, config.base_bits in (4, 8) and config.quant.self_check)


def _no_dropout(lm: nn.Module) -> None:
    """Set every dropout rate to 0: else the same prompt's loss differs by a nat from call to call.

    `eval()` alone is not enough: a layer that recomputes its activations runs with its training
    flag set.
    """
    for module in lm.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
