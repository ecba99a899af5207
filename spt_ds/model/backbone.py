"""The frozen causal LM: load, freeze, embed, run packed rows from embeddings, and the head.

Any causal LM of `transformers` whose layers go through its attention interface will do; `check`
proves it at start-up. Legend: N packed tokens, n rows, D embedding size, V vocabulary.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from spt_ds.config.schema import ModelConfig
from spt_ds.errors import ModelError
from spt_ds.model.activations import slim_activations
from spt_ds.model.attention import PACKED, Layout, choose_backend
from spt_ds.model.head import FrozenHead
from spt_ds.model.quant_source import refuse_foreign_quantisation

# Of the largest logit; transformers' own softmax and norms compute in fp32 even where the weights
# are fp64.
CHECK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 6e-2}
CHECK_LOGIT = 1000.0  # far above the caps that models put on their logits (15 to 50)
SUPPORTED = (
    "a base is needed whose attention goes through transformers' attention interface, with"
    " positions given from outside and a plain head: OPT, Llama, Mistral, Qwen, Gemma, Phi, GPT-2,"
    " GPT-NeoX, OLMo and others have been run"
)


class Backbone(nn.Module):
    """Root module of the frozen base. Everything that touches its weights runs inside one call of
    it.

    ZeRO-3 starts a new prefetch trace at each call of the root module; one call per micro-batch
    keeps the order of layers the same from step to step, so that gathers overlap with computation.
    """

    def __init__(self, lm: Any, backend: str, check_quantised: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.backend = backend
        self.check_quantised = check_quantised
        head = lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelError(
                f"the head of {type(lm).__name__} is {type(head).__name__}; a plain linear head is"
                " needed"
            )
        lm.set_output_embeddings(FrozenHead(head.weight, head.bias))
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

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] -> rows of the table [n, D]; a graph hangs on them only where the table trains."""
        table = self.lm.get_input_embeddings()
        with torch.set_grad_enabled(torch.is_grad_enabled() and table.weight.requires_grad):
            rows: torch.Tensor = table(ids)
        return rows

    def run(self, embeddings: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Packed embeddings [N, D] -> last hidden states [N, head size], each row of `layout` for
        itself.
        """
        out = self.lm.base_model(
            inputs_embeds=embeddings[None],
            position_ids=layout.position_ids,
            use_cache=False,
            layout=layout,
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def head(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `FrozenHead.forward`."""
        out: torch.Tensor = self.lm.get_output_embeddings()(hidden, *args, **kwargs)
        return out

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
            if getattr(module, "gradient_checkpointing", None) is True:
                # the layer's own flag alone: the modules in it stay in eval mode
                module.training = True

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """`transformers`' own generate on padded rows, with its own attention masks and cache."""
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
            tokens: torch.Tensor = self.lm.generate(**kwargs)
        finally:
            self.lm.generation_config = own
            self.lm.set_attn_implementation(PACKED)
            for module in recomputing:
                module.training = True
        return tokens

    @torch.no_grad()
    def check(self) -> None:
        """Compare packed rows with the base's own forward; raise ModelError where they differ.

        Sees a base that scales embeddings or logits outside its embedding and head, caps its
        logits, or does not hand positions or the layout on.
        """
        device, lens = self.lm.get_input_embeddings().weight.device, (3, 5)
        ids = torch.arange(sum(lens), device=device) % self.vocabulary
        positions = torch.cat([torch.arange(n) for n in lens])
        if self.check_quantised:
            from spt_ds.model.quant_check import self_check

            self_check(
                self.lm,
                lambda: self.head(
                    self.run(self.embed(ids), Layout(lens, positions, self.backend, device))
                ),
            )
        try:
            plain, high = self.run(
                self.embed(ids), Layout(lens, positions, self.backend, device)
            ).split(lens)
        except (
            AttributeError,
            KeyError,
            TypeError,
        ) as error:  # the base's own code meets a call it was not made for
            raise ModelError(
                f"{type(self.lm).__name__} cannot read packed rows ({error}); {SUPPORTED}"
            ) from error
        # A cap is invisible on small logits. The second row's hidden states are therefore stretched
        # until its logits are large, by a power of two so that no dtype rounds.
        stretch = float((CHECK_LOGIT / self.head(high).abs().max()).log2().ceil().exp2())
        ours = [self.head(plain), self.head(high * stretch)]
        self.lm.set_attn_implementation("eager")
        theirs = [
            self._own_logits(part, factor)
            for part, factor in zip(ids.split(lens), (1, stretch), strict=True)
        ]
        self.lm.set_attn_implementation(PACKED)
        gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
        gap = float(torch.stack(gaps).max())
        allowed = CHECK_TOLERANCE.get(ours[0].dtype, 6e-2)
        if not gap <= allowed:
            raise ModelError(
                f"{type(self.lm).__name__}: packed rows give other logits than the base's own"
                f" forward (largest relative difference {gap:.2g}, allowed {allowed:.0e});"
                f" {SUPPORTED}"
            )

    def _own_logits(self, ids: torch.Tensor, stretch: float) -> torch.Tensor:
        """ids [n] -> logits [n, V] of the base's own forward, what enters its head multiplied by
        `stretch`.
        """
        head = self.lm.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: (args[0] * stretch,))
        try:
            logits: torch.Tensor = self.lm(input_ids=ids[None], use_cache=False).logits[0]
        finally:
            hook.remove()
        return logits


def base_path(name: str) -> str:
    """Return the folder or hub id of `model.base`; `embedded` is the base that is shipped."""
    if name == "embedded":
        return str(resources.files("spt_ds") / "assets" / "base")
    if (
        os.sep in name
        and not Path(name).exists()
        and (name.startswith((".", os.sep)) or name.count("/") > 1)
    ):
        raise ModelError(
            f"model.base: no folder {name}; give a folder with config.json and weights, or a hub id"
        )
    return name


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer; raise ModelError when it is missing or has no end-of-sequence
    token.
    """
    path = base_path(config.base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=config.revision
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: no tokenizer can be read from {path}: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.base: the tokenizer of {path} has no end-of-sequence token; replies could"
            " not end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # only ever masked positions of a generation batch
    return tokenizer


def base_dtype(bits: int) -> torch.dtype:
    """Computing dtype of a base of so many bits."""
    return torch.float32 if bits == 32 else torch.bfloat16


def load_base_config(config: ModelConfig) -> PretrainedConfig:
    """Read the base's configuration."""
    path = base_path(config.base)
    try:
        base = AutoConfig.from_pretrained(path, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: no configuration can be read from {path}: {_first_line(error)}"
        ) from error
    return base


def load_lm(
    config: ModelConfig, base: PretrainedConfig, shard: Callable[[nn.Module], None] | None = None
) -> Any:
    """Load (or draw) the weights, sharded as they are read when an HfDeepSpeedConfig is alive or
    `shard` is given.
    """
    dtype, path = base_dtype(config.base_bits), base_path(config.base)
    refuse_foreign_quantisation(base, config, path)
    try:
        if config.base_bits in (4, 8):
            from spt_ds.model.quant_load import load_quantized

            return load_quantized(config, base, path, shard, dtype)
        return _full_precision(config, base, path, dtype)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: no weights can be loaded from {path}: {_first_line(error)}"
        ) from error
    except KeyError as error:
        if error.args != (PACKED,):
            raise
        raise ModelError(
            f"model.base: {base.model_type} picks its attention from a list of its own; {SUPPORTED}"
        ) from error


def _full_precision(
    config: ModelConfig, base: PretrainedConfig, path: str, dtype: torch.dtype
) -> Any:
    if config.random_init:
        # Under ZeRO-3 transformers zeroes the pad row of a weight that is already sharded; there is
        # none to zero.
        pad, base.pad_token_id = base.pad_token_id, None
        lm = AutoModelForCausalLM.from_config(base, dtype=dtype, attn_implementation=PACKED)
        base.pad_token_id = lm.config.pad_token_id = pad
        return lm
    return AutoModelForCausalLM.from_pretrained(
        path, config=base, dtype=dtype, attn_implementation=PACKED, revision=config.revision
    )


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
    lm = load_lm(config, base, shard)
    backend = choose_backend(config.attention, device, base_dtype(config.base_bits), strict=strict)
    return Backbone(lm, backend, config.base_bits in (4, 8) and config.quant.self_check)


def _no_dropout(lm: nn.Module) -> None:
    """Set every dropout rate to 0: with one, the same prompt's loss differs by a nat from call to
    call.

    `eval()` alone is not enough: a layer that recomputes its activations runs with its training
    flag set.
    """
    for module in lm.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
