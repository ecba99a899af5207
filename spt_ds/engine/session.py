"""Opens what training and generation share: tokenizer, frozen base (whole or sharded), method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from spt_ds import dist
from spt_ds.config.data import names
from spt_ds.config.method import SUFFIX_POSITIONS
from spt_ds.config.model import ModelConfig
from spt_ds.config.schema import Config
from spt_ds.data.encode import ContextStyle
from spt_ds.data.shots import worked_examples
from spt_ds.data.sources import open_sources
from spt_ds.data.store import ExampleStore
from spt_ds.data.template import TemplateStyle, make_template
from spt_ds.engine.zero import Sharding, local_bytes
from spt_ds.errors import ConfigError
from spt_ds.log import get_logger
from spt_ds.model.backbone import Backbone, build_backbone
from spt_ds.model.baselines import build_base_trainables
from spt_ds.model.fp8 import multiply_in_fp8
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, Trainables, build_trainables
from spt_ds.placement.agree import agree_on_placement
from spt_ds.placement.choose import Placement
from spt_ds.placement.estimate import BaseShape
from spt_ds.rng import keyed_seed
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder


@dataclass(frozen=True)
class Base:
    """What is known of the base before its weights are read; read once in a run."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    shape: BaseShape
    """The sizes that decide where the base lives."""


def read_base(config: ModelConfig) -> Base:
    """Read the base's tokenizer and configuration; where one rank cannot, all raise its error."""

    def read() -> Base:
        tokenizer, base = load_tokenizer(config), load_base_config(config)
        return Base(tokenizer, base, BaseShape.from_config(base.to_dict()))

    return dist.agreed(read)


@dataclass(frozen=True)
class Session:
    """What training and generation share.

    `backbone` is whole or sharded. `backbone(function, ...)` runs the function inside one call of
    it, whose hooks gather weights; its children are not called from outside.
    """

    config: Config
    world: dist.World
    base: Base
    sharding: Sharding
    backbone: nn.Module
    spt: Spt
    ends: tuple[int, ...]
    """Tokens that end a reply."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer


def open_session(config: Config, base: Base, placement: Placement, world: dist.World) -> Session:
    """Load the base as placed, prove it usable, and initialise what trains."""
    _check_positions(config, base.config, config.data.max_tokens, "data.max_tokens")
    if config.model.base_matmul == "fp8" and placement.zero.stage == 3:
        raise ConfigError(
            "model.base_matmul: fp8 needs the whole base on each rank, and this run shards it; set"
            " engine.placement: replicate and leave a DeepSpeed file of stage 3 out, or leave"
            " model.base_matmul out"
        )
    # A template that does not fit the base is refused here, before any weight is read.
    template = make_template(base.tokenizer, template_style(config))
    sharding = Sharding(placement.zero, world.device)
    # From here on ZeRO-3 shards each weight as it is read: no rank ever holds the whole base.
    sharding.before_load()
    backbone = build_backbone(
        config.model,
        base.config,
        world.device,
        strict=config.engine.strict,
        shard=sharding.shard_function(),
    )
    backbone.checkpoint_activations(placement.recompute)
    wrapped = sharding.wrap(backbone)
    # One call of it, as every use of the base: its hooks gather weights and release them.
    suffix = config.prompts.position in SUFFIX_POSITIONS
    wrapped(lambda inner: inner.check(suffix=suffix))
    if config.model.base_matmul == "fp8":
        # After the check, which compares the base with its own forward pass.
        multiply_in_fp8(backbone.lm, world.device)
    tokenizer, pad = base.tokenizer, base.tokenizer.pad_token_id
    assert isinstance(pad, int)
    functions = functions_of(config.reference, pad)
    texts = config.prompts.init_texts
    if config.prompts.init == "template":
        init_ids = [template.system(text) for text in texts]
    else:
        init_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    seed = keyed_seed(config.train.seed, "trainables")

    def build(inner: Backbone) -> Trainables:
        """What trains, with its first values: the same on every rank and in every start."""
        if config.method.type == "spt":
            return build_trainables(config, inner, functions, init_ids, seed)
        return build_base_trainables(config, inner, seed)

    # Made outside of ZeRO: whole and fp32 on every rank.
    trainables = wrapped(build)
    count = sum(parameter.numel() for parameter in trainables.parameters())
    get_logger().info(f"method: {config.method.type}, {count:,} trained parameters")
    get_logger().info(f"base: {local_bytes(wrapped) / 2**20:.1f} MiB on this rank")
    spt = Spt(config, trainables, functions)
    return Session(config, world, base, sharding, wrapped, spt, template.ends)


def open_trained(
    config: Config, folder: RunFolder, which: str, deepspeed_config: str | None, world: dist.World
) -> tuple[Session, Path]:
    """Open a run with the tensors of one of its checkpoints, whose folder is returned too.

    `which` is `best`, `last` or the number of a step.
    """
    path = dist.agreed(lambda: checkpoint.find(folder.checkpoints, which))
    session = open_untrained(config, deepspeed_config, world)
    saved = dist.agreed(lambda: checkpoint.load(path))
    checkpoint.restore_trainables(session.spt.trainables, saved.trainables, path)
    return session, path


def open_untrained(config: Config, deepspeed_config: str | None, world: dist.World) -> Session:
    """Open the base and what trains, with its first values."""
    base = read_base(config.model)
    placement = agree_on_placement(config, base.shape, deepspeed_config, world)
    return open_session(config, base, placement, world)


def open_split(session: Session, split: Literal["train", "valid", "test"]) -> ExampleStore:
    """Read and tokenise one split, once per node.

    With `data.few_shot` the worked examples that stand before each context are drawn from the train
    split. Contexts of the test split are cut as a conversation's are, without a look at the reply.
    Raises EngineError on all ranks when they see different data.
    """
    data, world = session.config.data, session.world
    source = names(getattr(data, split))
    style = train_style(session.config) if split == "train" else context_style(session)

    def build() -> ExampleStore:
        reserved = session.config.generate.max_new_tokens if split == "test" else None
        return open_sources(data, split, session.tokenizer, style, reserved)

    store = dist.leader_first(world, build)
    dist.same_everywhere(f"data.{split} ({source})", store.data_hash)
    if split == "test":
        _check_longest(session, store)
    get_logger().info(f"data.{split}: {len(store)} examples of {source}")
    return store


def _check_longest(session: Session, store: ExampleStore) -> None:
    """A reference reply, or an answer to choose, may be longer than a reply may be."""
    options, base = session.config.generate, session.base.config
    if options.perplexity:
        longest = int(store.lengths.total.max(initial=0))
        what = "generate.perplexity, context and reference reply"
        _check_positions(session.config, base, longest, what)
    if options.choices != "none":
        longest = int((store.lengths.context + store.choice_len).max(initial=0))
        what = "generate.choices, context and longest answer"
        _check_positions(session.config, base, longest, what)


def template_style(config: Config) -> TemplateStyle:
    """The template of a run, and where its prompts stand in it."""
    data = config.data
    variables = tuple(sorted(data.template_variables.items()))
    return TemplateStyle(data.template, data.instructions, variables, config.prompts.position)


def train_style(config: Config) -> ContextStyle:
    """What the model sees beside a dialogue in training."""
    data = config.data
    return ContextStyle(data.persona, template=template_style(config), overflow=data.overflow)


def context_style(session: Session) -> ContextStyle:
    """What the model sees beside a dialogue that it answers, the same in every start."""
    data, style = session.config.data, train_style(session.config)
    if not data.few_shot:
        return style
    train, seed = open_split(session, "train"), keyed_seed(session.config.train.seed, "few-shot")
    shots = worked_examples(train, session.tokenizer, data.few_shot, data.max_tokens, seed, style)
    return replace(style, shots=shots)


def _check_positions(config: Config, base: PretrainedConfig, text_tokens: int, what: str) -> None:
    longest = getattr(base, "max_position_embeddings", None)
    needed = text_tokens + config.prompts.tokens
    if longest is not None and needed > longest:
        raise ConfigError(
            f"{what}: {text_tokens} text tokens and prompts.tokens: {config.prompts.tokens} make"
            f" {needed}, the base has {longest} positions; data.max_tokens:"
            f" {config.data.max_tokens - needed + longest} fits"
        )
