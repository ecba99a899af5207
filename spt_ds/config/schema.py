"""The typed schema of one YAML file. Unknown keys are refused; every field says its unit; no torch
is imported.

Field docstrings become the descriptions of `spt-ds config --schema`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: unknown keys refused, values immutable, field docstrings kept."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """Kernel of the forward pass: flash-attn (4 or 2), torch's variable-length, SDPA, or plain
    (slow, exact).
    """
    activation_checkpointing: Literal["auto", "off", "non_reentrant", "reentrant"] = "auto"
    """Recompute layers in the backward pass; `auto` decides by memory and says why."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) of `method.type: lora`; unused otherwise."""

    rank: PositiveInt = 8
    """Rank of each adapter."""
    alpha: PositiveFloat = 16.0
    """The adapters' product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers whose name ends so get an adapter; empty takes peft's choice for the
    architecture.
    """


class MethodConfig(Section):
    """What trains: SPT, or one of the baselines in its place."""

    type: Literal["spt", "lora", "full", "none"] = "spt"
    """`spt`: prompts and retriever (prompt tuning where prompts.count is 1); `lora`: adapters in
    the base; `full`: all of the base; `none`: nothing, the base is evaluated as it is. The last
    three have no soft prompts."""
    lora: LoraConfig = LoraConfig()

    @property
    def trains_base(self) -> bool:
        """Whether weights in the base train, which then must be whole on each rank."""
        return self.type in ("lora", "full")


class PromptsConfig(Section):
    """The bank of soft prompts."""

    count: PositiveInt = 4
    """K, prompts in the bank."""
    tokens: NonNegativeInt = 8
    """P, virtual tokens per prompt; 0 with a `method.type` that has no soft prompts."""
    init: Literal["vocab", "text", "normal"] = "vocab"
    """Rows sampled from the frozen embedding table, given strings, or normal at its deviation."""
    init_texts: tuple[str, ...] = ()
    """With `init: text`, one string per prompt (or one for all); repeated or cut to P tokens."""
    placement: Literal["prefix", "suffix"] = "prefix"
    """Before the text, or between context and response (the context is then read once for all K).
    """

    @model_validator(mode="after")
    def _texts(self) -> PromptsConfig:
        if self.init == "text" and len(self.init_texts) not in (1, self.count):
            raise ValueError(
                f"init: text needs 1 or count={self.count} init_texts, got {len(self.init_texts)}"
            )
        if self.init != "text" and self.init_texts:
            raise ValueError(f"init_texts is only read with init: text, but init is {self.init}")
        return self


class RetrieverConfig(Section):
    """The dense retriever."""

    projections: Literal["separate", "shared"] = "separate"
    """W_c and W_p apart, or one Linear for both sides (as the reference has it)."""


class LossConfig(Section):
    """Weights and temperatures of the four losses."""

    selection: NonNegativeFloat = 1.0
    """Weight of the selection loss."""
    fusion: NonNegativeFloat = 1.0
    """Weight of the fusion loss."""
    fusion_weights: Literal["scores", "normalised"] = "scores"
    """Mix the logits of the K prompts by their scores s_k (the paper), or by s_k / sum_k s_k: a
    mean, at the scale of one prompt's logits, which does not drive all scores to their minimum."""
    contrastive: NonNegativeFloat = 1.0
    """Weight of the contrastive loss."""
    tau_gold: PositiveFloat = 1.0
    """Temperature of the target softmax(-nll / tau)."""
    tau_sim: PositiveFloat = 1.0
    """Temperature of the retriever's softmax(s / tau)."""
    bleu_threshold: float = 20.0
    """Gamma: contexts whose sentence BLEU (0 to 100) lies above it form a similar pair."""
    head_chunk_mib: PositiveInt = 128
    """Upper bound of the vocabulary logits that exist at one time, in MiB."""
    train_top_m: NonNegativeInt = 0
    """Selective backward: score all K without gradient, then train the m best of each example; 0
    trains all K.
    """


class ReferenceConfig(Section):
    """What the public reference does in its own way; for the recipe `reference`, off elsewhere."""

    unit_normal_prompts: bool = False
    """Draw the prompts from N(0, 1), as PEFT does, instead of by `prompts.init`."""
    jumping_activation: bool = False
    """Score by softplus(beta 10, threshold 1), which jumps down at cos 0.1."""
    padded_pool: bool = False
    """Pool over the whole padded text, in training with the response, not over the context."""
    pool_length_tokens: PositiveInt = 512
    """Length in tokens that `padded_pool` pads a text to."""
    nonzero_mask: bool = False
    """Average over the targets with a loss other than 0, not over all of them."""


class DataConfig(Section):
    """Dialogues and how they become tokens."""

    train: str = "embedded:train"
    """File, `embedded:train`, or `hub:NAME[:CONFIG][:SPLIT]`."""
    valid: str = "embedded:valid"
    """The same for validation loss."""
    test: str = "embedded:test"
    """The same for generation and scores."""
    format: Literal["auto", "parlai", "spc_csv", "jsonl"] = "auto"
    """File format; auto looks at suffix and first line."""
    max_tokens: PositiveInt = 512
    """Longest context plus response in tokens, without virtual tokens; the oldest turns are dropped
    to fit.
    """
    persona: bool = True
    """Show the persona to the model; false leaves it out of every text, though not out of
    predictions.jsonl.
    """
    few_shot: NonNegativeInt = 0
    """Examples of the training data, drawn by train.seed, that stand before each context of
    validation and test (`method.type: none` only). They take up to half of max_tokens."""
    max_train_examples: NonNegativeInt = 0
    """Use only the first n training examples; 0 uses all."""
    max_valid_examples: NonNegativeInt = 0
    """The same for validation."""
    max_test_examples: NonNegativeInt = 0
    """The same for generation."""
    cache_dir: str | None = None
    """Folder of tokenised data; default $SPT_CACHE, else ~/.cache/spt_ds."""
    workers: NonNegativeInt = 1
    """Data worker processes per rank; 0 prepares windows in the training process."""


class OptimConfig(Section):
    """AdamW on the bank and the retriever, all in fp32."""

    lr: PositiveFloat = 1e-3
    """Learning rate of the retriever, and of the prompts unless `prompts_lr` is given."""
    prompts_lr: PositiveFloat | None = None
    """Learning rate of the prompt bank."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to 0 at the last step, or constant."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""


class TrainConfig(Section):
    """Length and shape of the run."""

    max_steps: NonNegativeInt = 0
    """Optimizer steps; 0 takes them from `epochs`. With `method.type: none` there are none."""
    epochs: PositiveInt = 1
    """Passes over the training data when `max_steps` is 0."""
    global_batch: PositiveInt = 32
    """Examples per optimizer step over all ranks; the result does not depend on how they are split.
    """
    micro_batch: PositiveInt = 4
    """Examples per forward pass on one rank; each is read under all K prompts."""
    eval_every_steps: NonNegativeInt = 0
    """Steps between validation losses; 0 evaluates before the first and after the last step only.
    """
    seed: NonNegativeInt = 0
    """Seed of initialisation and data order."""
    max_hours: NonNegativeFloat = 0.0
    """Wall-clock budget in hours; the run saves and stops when it is spent. 0 has no limit."""


class EngineConfig(Section):
    """Where the frozen base lives, and how long ranks wait for one another."""

    placement: Literal["auto", "replicate", "zero3", "zero3_offload"] = "auto"
    """A copy per rank, ZeRO-3 shards, or shards in host memory; auto decides from sizes and memory
    and says why. A DeepSpeed JSON, where one is given, decides instead."""
    collective_timeout_s: PositiveInt = 600
    """Seconds a rank waits in a collective before the run fails."""
    strict: bool = False
    """Make every fallback an error."""


class CheckpointConfig(Section):
    """Saving the trainable state."""

    every_steps: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept; the best one always is."""
    on_save_error: Literal["continue", "stop"] = "stop"
    """What a failed save (disk full) does to the run; the older checkpoints stay either way."""


class LogConfig(Section):
    """What the run writes beside its checkpoints."""

    every_steps: PositiveInt = 10
    """Steps between lines in metrics.jsonl and on the screen."""
    tensorboard: bool = False
    """Write TensorBoard event files too (extra `tensorboard`)."""


class GenerateConfig(Section):
    """Decoding of replies for evaluation and chat."""

    mode: Annotated[str, Field(pattern=r"^(select|fuse|random|fixed:\d+|noise:\d*\.?\d+)$")] = (
        "select"
    )
    """Prompt of each example: highest score, fused logits of all, random, always k, or highest
    score under noise.
    """
    max_new_tokens: PositiveInt = 32
    """Longest reply in tokens."""
    batch_size: PositiveInt = 16
    """Examples decoded together on one rank."""
    do_sample: bool = False
    """Sample instead of greedy decoding."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens; 0: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of sampling."""
    num_beams: PositiveInt = 1
    """Beams; 1 is greedy."""
    length_penalty: float = 1.0
    """Power of the length by which a beam's log-likelihood is divided; above 0 favours long
    replies.
    """
    min_new_tokens: NonNegativeInt = 0
    """Shortest reply in tokens."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes tokens that the reply has already less likely (CTRL, Keskar et al. 2019)."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """No n tokens come twice in one reply; 0: they may."""
    perplexity: bool = False
    """Also measure the loss of the reference reply under the chosen prompt."""

    @model_validator(mode="after")
    def _fits(self) -> GenerateConfig:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                "do_sample and num_beams exclude one another; set num_beams: 1, or do_sample: false"
            )
        if self.mode == "fuse" and self.num_beams > 1:
            raise ValueError(
                "mode: fuse mixes the rows of one example and cannot beam; set num_beams: 1"
            )
        if self.mode == "fuse" and self.perplexity:
            raise ValueError(
                "perplexity is not defined for mode: fuse; use the fusion loss of training"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, max_new_tokens only"
                f" {self.max_new_tokens}"
            )
        needs = {
            "temperature": "do_sample: true",
            "top_k": "do_sample: true",
            "top_p": "do_sample: true",
            "length_penalty": "num_beams above 1",
        }
        for name, need in needs.items():
            idle = not self.do_sample if "sample" in need else self.num_beams == 1
            if idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, which acts only with {need}")
        return self


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "run"
    """Name of the run; the run folder starts with it."""
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    prompts: PromptsConfig = PromptsConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    losses: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    generate: GenerateConfig = GenerateConfig()

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.losses.train_top_m > self.prompts.count:
            raise ValueError(
                f"losses.train_top_m is {self.losses.train_top_m}, the bank has prompts.count ="
                f" {self.prompts.count}; give 0 (all) to prompts.count"
            )
        if self.reference.unit_normal_prompts and self.prompts.init != "vocab":
            raise ValueError(
                f"prompts.init is {self.prompts.init}, but reference.unit_normal_prompts draws the"
                " prompts from N(0, 1); leave one of them out"
            )
        kind, _, number = self.generate.mode.partition(":")
        if kind == "fixed" and int(number) >= self.prompts.count:
            raise ValueError(
                f"generate.mode is {self.generate.mode}, prompts run from 0 to"
                f" {self.prompts.count - 1}"
            )
        return self

    @model_validator(mode="after")
    def _method(self) -> Config:
        kind = self.method.type
        if self.data.few_shot and kind != "none":
            raise ValueError(
                f"data.few_shot is {self.data.few_shot} and method.type {kind}: worked examples"
                " stand in the place of training; set method.type: none, or data.few_shot: 0"
            )
        if kind == "spt":
            if not self.prompts.tokens:
                raise ValueError(
                    "prompts.tokens is 0, but method.type: spt trains soft prompts; give 1 or more,"
                    " or another method.type (lora, full, none)"
                )
            return self
        needed: dict[str, tuple[object, object]] = {
            "prompts.count": (self.prompts.count, 1),
            "prompts.tokens": (self.prompts.tokens, 0),
            "prompts.placement": (self.prompts.placement, "prefix"),
            "losses.selection": (self.losses.selection, 0),
            "losses.fusion": (self.losses.fusion, 0),
            "losses.contrastive": (self.losses.contrastive, 0),
        }
        wrong = [f"{key}: {want} (got {got})" for key, (got, want) in needed.items() if got != want]
        if wrong:
            raise ValueError(
                f"method.type: {kind} has no soft prompts to choose from; set {', '.join(wrong)}"
            )
        if self.method.trains_base:
            self._trainable_base(kind)
        return self

    def _trainable_base(self, kind: str) -> None:
        allowed = {"lora": (16, 32), "full": (32,)}[kind]
        if self.model.base_bits not in allowed:
            raise ValueError(
                f"method.type: {kind} trains weights of the base, and model.base_bits is"
                f" {self.model.base_bits}; set model.base_bits: {' or '.join(map(str, allowed))}"
            )
        if self.model.activation_checkpointing == "reentrant":
            raise ValueError(
                f"method.type: {kind} trains weights inside the layers, which"
                " model.activation_checkpointing: reentrant loses; set it to non_reentrant, off or"
                " auto"
            )
        if self.engine.placement not in ("auto", "replicate"):
            raise ValueError(
                f"method.type: {kind} trains weights of the base, which needs all of it on each"
                f" rank, and engine.placement is {self.engine.placement}; set engine.placement:"
                " replicate or auto"
            )
