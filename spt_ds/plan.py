"""Memory arithmetic of a run, without torch and without a GPU: what fits where, and why.

Sizes come from the base's config.json alone. The formulas are compared with counted parameters and
counted saved activations in the tests. GiB is 2**30 bytes throughout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spt_ds.config.schema import Config
from spt_ds.errors import EngineError, ModelError

GIB = 2**30
# share of a rank's memory that is planned with; the rest is for fragments, buffers and the runtime
USABLE = 0.85
FIXED_BYTES = GIB  # process, kernels and communication buffers
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, as it stands in ds_configs/ too
RESPONSE_TOKENS = 64  # four times the mean reply of ConvAI2
# Models whose feed-forward has no gate although it is sized by `intermediate_size`.
UNGATED = {"phi", "gpt_neox", "starcoder2", "nemotron"}

V2_FILES = ("memory.max", "memory.current")

Placement = Literal["replicate", "zero3", "zero3_offload"]


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a causal LM that decide its memory."""

    hidden: int
    embed: int  # size of an embedding; OPT-350m's differs from its hidden size
    layers: int
    ffn: int
    ffn_matrices: int  # 3 with a gate (Llama), 2 without (OPT)
    experts: int  # feed-forward blocks of a layer; 1 but for mixtures of experts
    queries: int  # heads times their size
    keys: int  # key/value heads times their size
    vocabulary: int
    embeddings: int  # tables of vocabulary size: 1 when the head is tied
    masked_relu: bool  # keeps a byte where other activations keep a number (`model/activations.py`)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseShape:
        """Read the sizes under the names `transformers` uses; raise ModelError naming the one that
        is missing.
        """

        def first(*names: str) -> int:
            for name in names:
                if config.get(name) is not None:
                    return int(config[name])
            raise ModelError(
                f"the base's configuration has none of {', '.join(names)}: its memory cannot be"
                " planned"
            )

        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        head = int(config.get("head_dim") or hidden // heads)
        gated = (
            config.get("intermediate_size") is not None and config.get("model_type") not in UNGATED
        )
        return cls(
            hidden=hidden,
            embed=int(config.get("word_embed_proj_dim") or hidden),
            layers=first("num_hidden_layers", "n_layer"),
            ffn=int(config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden),
            ffn_matrices=3 if gated else 2,
            experts=int(config.get("num_local_experts") or config.get("num_experts") or 1),
            queries=heads * head,
            keys=int(config.get("num_key_value_heads") or heads) * head,
            vocabulary=first("vocab_size"),
            embeddings=1 if config.get("tie_word_embeddings", True) else 2,
            masked_relu=config.get("model_type") == "opt"
            and config.get("activation_function") == "relu",
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        return self.hidden * (
            2 * self.queries + 2 * self.keys + self.experts * self.ffn_matrices * self.ffn
        )

    @property
    def parameters(self) -> int:
        """All weights of the base; norms, biases and learned positions (1.3 % of OPT-125m, less of
        others) left out.
        """
        return self.layers * self.layer_parameters + self.table_parameters

    @property
    def table_parameters(self) -> int:
        """Embeddings and head, with the projections between them and the layers where they differ
        in size.
        """
        between = 2 * self.embed * self.hidden if self.embed != self.hidden else 0
        return self.embeddings * self.vocabulary * self.embed + between

    def base_bytes(self, bits: int) -> int:
        """Bytes of the weights; embeddings and head stay at 16 bits when the layers have 4 or 8."""
        table = self.table_parameters * (4 if bits == 32 else 2)
        scales = 4 / 64 if bits in (4, 8) else 0.0  # an fp32 scale per block of 64
        return int(self.layers * self.layer_parameters * (bits / 8 + scales) + table)

    def activation_bytes(
        self, tokens: int, bits: int, *, recompute: bool, trained: bool = False
    ) -> int:
        """Bytes kept for the backward pass of `tokens` packed tokens; at most a quarter above what
        is counted.

        Where weights are frozen a linear layer keeps nothing: kept are the inputs of norms (those
        of gated models compute in fp32), q, k, v and, by variable-length kernels, the output of
        attention, and the inputs of the activation and of the gate's product. With recomputation
        one layer's worth, and each layer's input. Weights that train (`trained`) add the inputs of
        linear layers; adapters on 16-bit layers cast them to fp32, each for itself, of which this
        is the most there can be.
        """
        size = 4 if bits == 32 else 2
        gated = self.ffn_matrices == 3
        norms = 2 * self.hidden * (4 if gated else size)
        attention = 2 * (self.queries + self.keys) * size
        feed_forward = self.ffn if self.masked_relu else (3 if gated else 1) * self.ffn * size
        layer = norms + attention + feed_forward
        if trained:
            layer += 4 * (2 * self.hidden + self.ffn)
            if gated:
                layer += (
                    4 * 2 * self.hidden
                )  # RMS norms, which go with gates, keep what their weight multiplies
            if bits != 32:
                layer += 4 * (3 * self.hidden + self.queries)
        last_norm = self.hidden * 4
        if recompute:
            return tokens * (self.layers * self.hidden * size + layer + last_norm)
        return tokens * (self.layers * layer + last_norm)

    def context_bytes(self, tokens: int, bits: int) -> int:
        """Keys and values of `tokens` context tokens, which the branches of `placement: suffix`
        read until the end of the backward pass."""
        return tokens * self.layers * 2 * self.keys * (4 if bits == 32 else 2)


def trainable_bytes(config: Config, shape: BaseShape) -> int:
    """Weights, gradients and two Adam moments of what trains beside the base, fp32.

    Of `method.type: full` the weights are the base's own; `lora` is counted as if every linear
    layer had an adapter.
    """
    kind = config.method.type
    if kind == "none":
        return 0
    if kind == "full":
        return 12 * shape.parameters
    if kind == "lora":
        ends = (
            4 * shape.hidden
            + 2 * (shape.queries + shape.keys)
            + shape.ffn_matrices * (shape.hidden + shape.ffn)
        )
        return 16 * shape.layers * config.method.lora.rank * ends
    sides = 1 if config.retriever.projections == "shared" else 2
    count = config.prompts.count * config.prompts.tokens * shape.embed + sides * (
        shape.embed**2 + shape.embed
    )
    return 16 * count


def step_bytes(config: Config, shape: BaseShape, *, recompute: bool) -> int:
    """Most bytes that one micro-batch keeps for its backward pass.

    With `placement: suffix` a response is taken to be at most RESPONSE_TOKENS long.
    """
    c, bits = config, config.model.base_bits
    suffix = c.prompts.placement == "suffix"
    per_prompt = c.prompts.tokens + (
        min(RESPONSE_TOKENS, c.data.max_tokens) if suffix else c.data.max_tokens
    )
    tokens = c.train.micro_batch * (c.losses.train_top_m or c.prompts.count) * per_prompt
    kept = shape.activation_bytes(tokens, bits, recompute=recompute, trained=c.method.trains_base)
    if suffix:
        kept += shape.context_bytes(c.train.micro_batch * c.data.max_tokens, bits)
    return kept


def memory_per_rank(device_bytes: int | None, local_size: int) -> int:
    """Bytes a rank can plan with: its GPU's memory, or its share of what the host has available."""
    return (
        int(device_bytes * USABLE) if device_bytes is not None else host_memory_per_rank(local_size)
    )


def host_memory_per_rank(local_size: int, root: Path = Path("/")) -> int:
    """A rank's share of the host memory that this process may take: what is free, and what its
    cgroups leave of it.

    Slurm's `--mem` and containers limit by cgroup, which /proc/meminfo does not know. `root` is for
    the tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # not Linux: the free pages are all that is known
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([available, *_left_in_cgroups(root)]) * USABLE / local_size)


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that each memory cgroup around this process leaves, v2 and v1; file pages count as
    free.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            limit, used = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else V2_FILES
            )
            inner = mount / group.strip(
                "/"
            )  # a container may see its own group as the mount itself
            for folder in (
                inner,
                *(parent for parent in inner.parents if parent.is_relative_to(mount)),
            ):
                with contextlib.suppress(
                    OSError, ValueError
                ):  # no such file there, or `max`: no limit
                    left = int((folder / limit).read_text()) - int((folder / used).read_text())
                    yield max(
                        left + _file_pages(folder / "memory.stat", "total_" if controllers else ""),
                        0,
                    )


def _file_pages(stat: Path, prefix: str) -> int:
    """Bytes of a cgroup's page cache, which the kernel drops before it refuses memory."""
    names = {f"{prefix}inactive_file", f"{prefix}active_file"}
    pairs = (line.split() for line in stat.read_text(encoding="ascii").splitlines())
    return sum(int(count) for name, count in pairs if name in names)


def resident_bytes(shape: BaseShape, bits: int, placement: Placement, world_size: int) -> int:
    """Bytes of the base on one rank: its copy, or its share and what ZeRO-3 keeps gathered at one
    time.
    """
    base = shape.base_bytes(bits)
    if placement == "replicate":
        return base
    gathered = min(base, LIVE_PARAMETERS * {32: 4, 16: 2}.get(bits, 1))
    return gathered + (base // world_size if placement == "zero3" else 0)


def choose_placement(
    config: Config, shape: BaseShape, world_size: int, rank_bytes: int, host_bytes: int | None
) -> tuple[Placement, str]:
    """Pick where the base lives for `engine.placement`, and say why in one line.

    `host_bytes` is a rank's share of its host's memory; None on a machine without GPUs, where the
    host's memory is the rank's own and offload frees nothing. Raises EngineError where `auto` finds
    no place.
    """
    asked = config.engine.placement
    if asked != "auto":
        return asked, f"placement: {asked} (as configured)"
    bits = config.model.base_bits
    base = shape.base_bytes(bits)
    sharded = resident_bytes(shape, bits, "zero3", world_size)
    rest = FIXED_BYTES + trainable_bytes(config, shape)
    rest += step_bytes(config, shape, recompute=True)
    room = rank_bytes - rest
    sizes = (
        f"base {base / GIB:.2f} GiB at {bits} bits, {max(room, 0) / GIB:.2f} GiB left for it on"
        " each rank"
    )
    if config.method.trains_base:
        if base > room:
            raise EngineError(
                f"engine.placement: auto finds no place for the base: {sizes}, and method.type:"
                f" {config.method.type}, which trains weights in it, needs a copy on each rank."
                " Take a smaller base, lower train.micro_batch or data.max_tokens, on hosts"
                " without GPUs fewer ranks; engine.placement: replicate is taken without this"
                " check"
            )
        return (
            "replicate",
            (
                f"placement: replicate ({sizes}: method.type: {config.method.type} trains weights"
                " in it)"
            ),
        )
    if base <= room:
        return "replicate", f"placement: replicate ({sizes}: sharding would only add communication)"
    if world_size > 1 and sharded <= room:
        return (
            "zero3",
            f"placement: zero3 ({sizes}: a share of 1/{world_size} and what is gathered fit)",
        )
    share, gathered = base // world_size, resident_bytes(shape, bits, "zero3_offload", world_size)
    if host_bytes is not None and gathered <= room and share <= host_bytes - FIXED_BYTES:
        return (
            "zero3_offload",
            (
                f"placement: zero3_offload ({sizes}: a share of 1/{world_size} and what is gathered"
                f" do not fit; the share, {share / GIB:.2f} GiB, goes to the host, which has"
                f" {host_bytes / GIB:.2f} GiB for each rank)"
            ),
        )
    need = (
        f"a share of 1/{world_size} is {share / GIB:.2f} GiB, what is gathered at one time"
        f" {gathered / GIB:.2f} GiB"
    )
    host = (
        "without a GPU, host offload takes the same memory"
        if host_bytes is None
        else (
            f"the host has {host_bytes / GIB:.2f} GiB for each rank's share,"
            f" {FIXED_BYTES / GIB:.0f} GiB of it in use"
        )
    )
    raise EngineError(
        f"engine.placement: auto finds no place for the base: {sizes}; {need}; {host}. Set"
        " model.base_bits: 4 or 8, take"
        f" {'more ranks' if host_bytes is not None else 'ranks on more hosts'}, or keep the shares"
        " on a disk: --deepspeed_config ds_configs/zero3_offload_nvme.json. Another"
        " engine.placement is taken without this check"
    )


def choose_checkpointing(
    config: Config, shape: BaseShape, placement: Placement, world_size: int, rank_bytes: int
) -> tuple[str, str]:
    """Pick `off`, `non_reentrant` or `reentrant` for `model.activation_checkpointing`, and say why
    in one line.
    """
    asked = config.model.activation_checkpointing
    if asked != "auto":
        return asked, f"activation checkpointing: {asked} (as configured)"
    bits = config.model.base_bits
    base = resident_bytes(shape, bits, placement, world_size)
    room = rank_bytes - FIXED_BYTES - trainable_bytes(config, shape) - base
    kept = step_bytes(config, shape, recompute=False)
    used = "off" if kept <= room else "non_reentrant"
    verdict = "fit" if used == "off" else "do not fit"
    return (
        used,
        (
            f"activation checkpointing: {used} ({kept / GIB:.2f} GiB of activations at most"
            f" {verdict} into {max(room, 0) / GIB:.2f} GiB)"
        ),
    )
