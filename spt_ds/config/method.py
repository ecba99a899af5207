"""Options of the method: what trains, the prompts, the retriever and the losses."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from spt_ds.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

# Values of `method.type` that train weights in the base, which then must be whole on each rank.
TRAIN_THE_BASE = ("lora", "full")
# Values of `prompts.position` in suffix placement: the prompt follows a context, which is read once
# for all K prompts.
SUFFIX_POSITIONS = ("last_turn", "before_reply")


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


class PromptsConfig(Section):
    """The bank of soft prompts."""

    count: PositiveInt = 4
    """K, prompts in the bank."""
    tokens: NonNegativeInt = 8
    """P, virtual tokens per prompt; 0 with a `method.type` that has no soft prompts."""
    init: Literal["vocab", "text", "template", "normal"] = "vocab"
    """Rows sampled from the frozen embedding table, given strings, the same as data.template writes
    a persona (with the words before it), or normal at its deviation.
    """
    init_texts: tuple[str, ...] = ()
    """With `init: text` or `template`, one string per prompt (or one for all); repeated or cut to P
    tokens.
    """
    position: Literal["before_text", "system", "last_turn", "before_reply"] = "before_text"
    """Where the prompt stands: before the text, at the head of the system message, at the end of
    the partner's last turn, or directly before the reply. The two in the middle need a chat
    template. What stands before one of the last two is read once for all K prompts.
    """

    warm_start_steps: NonNegativeInt = 0
    """Steps in which all prompts are one, which trains by its nll alone; then they part."""

    @model_validator(mode="after")
    def _texts(self) -> PromptsConfig:
        if self.warm_start_steps and len(self.init_texts) > 1:
            raise ValueError(
                f"warm_start_steps begins with one prompt for all, got {len(self.init_texts)}"
                " init_texts; give one"
            )
        given = self.init in ("text", "template")
        if given and len(self.init_texts) not in (1, self.count):
            raise ValueError(
                f"init: {self.init} needs 1 or count={self.count} init_texts, got"
                f" {len(self.init_texts)}"
            )
        if not given and self.init_texts:
            raise ValueError(
                f"init_texts is only read with init: text or template, but init is {self.init}"
            )
        return self


class RetrieverConfig(Section):
    """The dense retriever."""

    projections: Literal["separate", "shared"] = "separate"
    """W_c and W_p apart, or one Linear for both sides (as the reference has it)."""
    keys: Literal["prompts", "learned"] = "prompts"
    """What a context is compared with: a projection of each prompt, or a trained vector for each.
    """

    @model_validator(mode="after")
    def _sides(self) -> RetrieverConfig:
        if self.keys == "learned" and self.projections == "shared":
            raise ValueError(
                "keys: learned has no projection of prompts to share; set projections: separate"
            )
        return self


class LossConfig(Section):
    """The objective, and weights and temperatures of its losses."""

    objective: Literal["paper", "mixture"] = "paper"
    """`paper`: nll and the three losses weighted below; `mixture`: the likelihood of a mixture of
    the prompts, with the softmax of s / tau_sim as its weights."""
    temperature: PositiveFloat = 1.0
    """T of the mixture, for losses in nats a reply; above 1 more prompts learn from each reply."""
    balance: NonNegativeFloat = 0.0
    """Weight of the mixture's balance loss, which keeps the prompts used equally: without it some
    never learn."""
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

    @model_validator(mode="after")
    def _of_objective(self) -> LossConfig:
        if self.objective == "paper":
            needed: dict[str, float | str] = {"temperature": 1.0, "balance": 0}
            why = "temperature and balance act only with objective: mixture"
        else:
            needed = {"selection": 0, "fusion": 0, "contrastive": 0, "fusion_weights": "scores"}
            why = "objective: mixture has a loss of its own"
        wrong = [
            f"{key}: {want} (got {getattr(self, key)})"
            for key, want in needed.items()
            if getattr(self, key) != want
        ]
        if wrong:
            raise ValueError(f"{why}; set {', '.join(wrong)}")
        return self


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
