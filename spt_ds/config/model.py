"""Options of the frozen base."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from spt_ds.config.section import Section


class QuantConfig(Section):
    """How a 4-bit or 8-bit base is quantised; unused at 16 and 32 bits."""

    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book. 8 bits are always blockwise dynamic int8."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = False
    """Quantise the scales of a 4-bit base to 8 bits as well (saves about 0.4 bit a weight)."""
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Linear layers whose name ends so stay in 16 bits. Embeddings and norms always do."""
    self_check: bool = True
    """Before training, compare logits through the quantised (and sharded) base with its dequantised
    weights.
    """


class ModelConfig(Section):
    """The frozen causal language model."""

    base: str = "embedded"
    """`embedded` (the small base that is shipped), a folder, or a hub id such as
    `facebook/opt-125m`.
    """
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    allow_pickle: bool = False
    """Also read weights of pickled `.bin` files, for a base that you trust; else only safetensors.
    """
    random_init: bool = False
    """Take only the configuration of `base` and draw random weights: for benchmarks without
    weights.
    """
    base_bits: Literal[4, 8, 16, 32] = 16
    """Bits of the frozen weights: 32 float, 16 bfloat, 8 or 4 quantised (see `quant`)."""
    quant: QuantConfig = QuantConfig()
    base_matmul: Literal["base_bits", "fp8"] = "base_bits"
    """How the base multiplies: in the width of `base_bits`, or in FP8 on GPUs that have it. FP8
    takes a base of 16 bits that is whole on each rank.
    """
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """Kernel of the forward pass: flash-attn (4 or 2), torch's variable-length, SDPA, or plain
    (slow, exact).
    """
    activation_checkpointing: Literal["auto", "off", "non_reentrant", "reentrant"] = "auto"
    """Recompute layers in the backward pass; `auto` decides by memory and says why."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers for training with `torch.compile`; `auto` does so for 200 steps or more on
    a GPU. The base is frozen, of 16 or 32 bits and whole on each rank.
    """

    @model_validator(mode="after")
    def _products(self) -> ModelConfig:
        if self.base_matmul == "fp8" and self.base_bits != 16:
            raise ValueError(
                f"base_matmul is fp8, which replaces products of 16 bits, and base_bits is"
                f" {self.base_bits}; set base_bits: 16, or leave base_matmul out"
            )
        if self.compile == "on" and self.uncompilable:
            raise ValueError(
                f"compile is on, and {self.uncompilable}; set compile: auto, or base_bits: 16 and"
                " base_matmul: base_bits"
            )
        return self

    @property
    def uncompilable(self) -> str:
        """Why the layers of such a base are not compiled; empty where they can be."""
        if self.base_bits in (4, 8):
            return f"base_bits is {self.base_bits}, whose layers are not compiled"
        if self.base_matmul == "fp8":
            return "base_matmul is fp8, whose layers are not compiled"
        return ""
