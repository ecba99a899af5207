"""Opens what training and generation share: process group, tokenizer, frozen base (whole or
sharded), method.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spt_ds import dist, plan
from spt_ds.config.schema import Config
from spt_ds.data.encode import Shown
from spt_ds.data.shots import worked_examples
from spt_ds.data.store import ExampleStore, build_store
from spt_ds.engine.ds_config import DsPlan, load_ds_config, plan_for
from spt_ds.engine.zero import Sharding, local_bytes
from spt_ds.errors import ConfigError
from spt_ds.log import get_logger
from spt_ds.model.backbone import Backbone, build_backbone
from spt_ds.model.baselines import build_base_trainables
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.model.spt import Spt, Trainables, build_trainables
from spt_ds.rng import keyed_seed


@dataclass(frozen=True)
class Session:
    """`root` is the backbone, sharded or not: call it with a function, never its children."""

    config: Config
    world: dist.World
    tokenizer: PreTrainedTokenizerBase
    sharding: Sharding
    root: nn.Module
    spt: Spt


def open_session(config: Config, deepspeed_config: str | None, world: dist.World) -> Session:
    """Load tokenizer and base as the plan says, prove the base usable, and initialise what trains.

    `deepspeed_config` is the path of a DeepSpeed JSON, which then decides the placement, or None.
    """
    tokenizer = load_tokenizer(config.model)
    ds_plan, recompute = decide(config, deepspeed_config, world)
    sharding = Sharding(ds_plan, world.device)
    sharding.before_load()
    backbone = build_backbone(
        config.model, world.device, strict=config.engine.strict, shard=sharding.shard_function()
    )
    _check_positions(config, backbone.config, config.data.max_tokens, "data.max_tokens")
    backbone.checkpoint_activations(recompute)
    root = sharding.wrap(backbone)
    root(lambda inner: inner.check(config.prompts.placement))
    init_ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in config.prompts.init_texts
    ]
    seed = keyed_seed(config.train.seed, "trainables")

    def build(inner: Backbone) -> Trainables:
        if config.method.type == "spt":
            return build_trainables(config, inner, init_ids, seed)
        return build_base_trainables(config, inner, seed)

    trainables = root(build)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    count = sum(parameter.numel() for parameter in trainables.parameters())
    get_logger().info(f"method: {config.method.type}, {count:,} trained parameters")
    get_logger().info(f"base: {local_bytes(root) / 2**20:.1f} MiB on this rank")
    return Session(config, world, tokenizer, sharding, root, Spt(config, trainables, pad))


def open_split(session: Session, split: Literal["train", "valid", "test"]) -> ExampleStore:
    """Read and tokenise one split, once per node; raise EngineError on all ranks when they see
    different data.

    With `data.few_shot` the worked examples that stand before each context are drawn from the train
    split. Contexts of the test split are cut as a conversation's are, without a look at the reply.
    """
    data, world = session.config.data, session.world
    source = getattr(data, split)
    shown = Shown(data.persona) if split == "train" else shown_to(session)

    def build() -> ExampleStore:
        return build_store(
            source,
            session.tokenizer,
            max_tokens=data.max_tokens,
            format=data.format,
            max_examples=getattr(data, f"max_{split}_examples"),
            cache_dir=data.cache_dir,
            shown=shown,
            reserved=session.config.generate.max_new_tokens if split == "test" else None,
        )

    store = dist.leader_first(world, build)
    dist.same_everywhere(f"data.{split} ({source})", store.data_hash)
    if (
        split == "test" and session.config.generate.perplexity
    ):  # a reference reply may be longer than a reply may be
        longest = int(store.lengths.total.max(initial=0))
        base = load_base_config(session.config.model)
        _check_positions(
            session.config, base, longest, "generate.perplexity, context and reference reply"
        )
    get_logger().info(f"data.{split}: {len(store)} examples of {source}")
    return store


def shown_to(session: Session) -> Shown:
    """What the model is shown beside a dialogue that it answers: the same on every rank and in
    every start.
    """
    data = session.config.data
    shots: tuple[int, ...] = ()
    if data.few_shot:
        train, seed = (
            open_split(session, "train"),
            keyed_seed(session.config.train.seed, "few-shot"),
        )
        shots = worked_examples(
            train, session.tokenizer, data.few_shot, data.max_tokens, seed, persona=data.persona
        )
    return Shown(data.persona, shots)


def decide(config: Config, deepspeed_config: str | None, world: dist.World) -> tuple[DsPlan, str]:
    """Choose placement and activation checkpointing together on all ranks, and say why once."""
    shape = plan.BaseShape.from_config(load_base_config(config.model).to_dict())
    gpu = (
        torch.cuda.get_device_properties(world.device).total_memory
        if world.device.type == "cuda"
        else None
    )
    # Ranks decide together: the smallest memory of all counts.
    rank_bytes = min(dist.gather_json(plan.memory_per_rank(gpu, world.local_size)))
    host_bytes = min(dist.gather_json(plan.host_memory_per_rank(world.local_size)))
    memory = Memory(rank_bytes, None if gpu is None else host_bytes)
    ds_plan, recompute, lines = dist.agreed(
        lambda: settle(config, shape, deepspeed_config, world.size, memory)
    )
    if deepspeed_config is not None:
        _same_plan(ds_plan)
    for line in lines:
        get_logger().info(line)
    return ds_plan, recompute


@dataclass(frozen=True)
class Memory:
    """Bytes that the poorest rank can plan with, and its share of its host's memory where it has a
    GPU beside it.
    """

    rank_bytes: int
    host_bytes: int | None


def settle(
    config: Config,
    shape: plan.BaseShape,
    deepspeed_config: str | None,
    world_size: int,
    memory: Memory,
) -> tuple[DsPlan, str, list[str]]:
    """Placement, activation checkpointing and the lines that say why; free of collectives, for
    `spt-ds plan` too.
    """
    if deepspeed_config is not None:
        ds_plan = load_ds_config(deepspeed_config, config, world_size)
        placement: plan.Placement = "replicate" if ds_plan.stage < 3 else "zero3"
        if ds_plan.offload != "none":
            placement = "zero3_offload"
        why = f"placement: {placement} ({deepspeed_config})"
    else:
        placement, why = plan.choose_placement(config, shape, world_size, *astuple(memory))
        ds_plan = plan_for(placement, config, world_size)
    recompute, why_recompute = plan.choose_checkpointing(
        config, shape, placement, world_size, memory.rank_bytes
    )
    return ds_plan, recompute, [why, why_recompute, *ds_plan.notes]


def _same_plan(ds_plan: DsPlan) -> None:
    """Ranks must shard alike; the swap folder of NVMe offload alone is each process's own."""
    shared = json.loads(json.dumps(ds_plan.engine_config))
    shared.get("zero_optimization", {}).get("offload_param", {}).pop("nvme_path", None)
    dist.same_everywhere("the DeepSpeed configuration", json.dumps(shared, sort_keys=True))


def _check_positions(config: Config, base: object, text_tokens: int, what: str) -> None:
    longest = getattr(base, "max_position_embeddings", None)
    needed = text_tokens + config.prompts.tokens
    if longest is not None and needed > longest:
        raise ConfigError(
            f"{what}: {text_tokens} text tokens and prompts.tokens: {config.prompts.tokens} make"
            f" {needed}, the base has {longest} positions; data.max_tokens:"
            f" {config.data.max_tokens - needed + longest} fits"
        )
