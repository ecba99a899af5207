"""Chooses prompts without the base: its tokenizer, embedding table, bank and retriever, on the CPU.

What follows from the choice, the embeddings up to a reply, goes to a server that has the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from spt_ds.config.generation import GenerateConfig
from spt_ds.config.schema import Config
from spt_ds.data.template import make_template
from spt_ds.engine.context import Contexts
from spt_ds.engine.reply_text import ReplyText, rule_of
from spt_ds.engine.session import template_style, train_style
from spt_ds.errors import ConfigError
from spt_ds.model.decode import choose_prompts
from spt_ds.model.loading import load_base_config, load_tokenizer
from spt_ds.model.prompt_bank import PromptBank
from spt_ds.model.reference import functions_of
from spt_ds.model.retriever import Retriever
from spt_ds.model.spt import Spt, Trainables
from spt_ds.model.table import load_table
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder


@dataclass(frozen=True)
class Routed:
    """One context whose prompt is chosen."""

    prompt: int
    scores: tuple[float, ...]  # [K]
    virtual: torch.Tensor  # [P, D], the prompt's
    beginning: torch.Tensor  # [C + P, D] context and prompt in their order, in the base's dtype
    context_tokens: int  # C
    dropped_turns: int


class Router:
    """A trained run without the layers of its base."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, spt: Spt, table: Any):
        self.config, self.tokenizer = config, tokenizer
        self._spt, self._table = spt, table
        style = train_style(config)
        self._contexts = Contexts(tokenizer, config.data.max_tokens, style)
        self.ends = make_template(tokenizer, template_style(config)).ends
        self.text = ReplyText(tokenizer, rule_of(config), config.generate.stop, self.ends)

    @torch.no_grad()
    def route(
        self, persona: Sequence[str], history: Sequence[str], options: GenerateConfig, key: int
    ) -> Routed:
        """Choose the prompt that is to answer, as `decode` does; raise DataError.

        `key` is what noise of `generate.mode` is keyed by.
        """
        batch, dropped = self._contexts.batch(persona, history, options.max_new_tokens, key)
        spt = self._spt
        text, _, scores = spt.score(self._table, spt.pack(batch))
        prompt = choose_prompts(options.mode, scores, (key,), self.config.train.seed)[0]
        assert prompt is not None
        head = batch.before_prompt(spt.suffix)[0]
        virtual = spt.trainables.bank.weight[prompt].to(text.dtype)
        beginning = torch.cat([text[:head], virtual, text[head:]])
        told = tuple(scores[:, 0].tolist())
        return Routed(prompt, told, virtual, beginning, len(text), dropped)


def open_router(run: Path, which: str, overrides: Sequence[str]) -> Router:
    """Open a run without the layers of its base; raise SptError where replies need them here."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(
            f"{run}: no {folder.config.name} in it; give the folder of a run that was trained"
        )
    config = folder.load_config([*overrides, "generate.perplexity=false"])
    _check(config)
    tokenizer, base = load_tokenizer(config.model), load_base_config(config.model)
    path = checkpoint.find(folder.checkpoints, which)
    table = load_table(config.model, base)
    size, count = table.weight.shape[1], config.prompts.count
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    functions = functions_of(config.reference, pad)
    retriever = Retriever(
        size,
        shared=config.retriever.projections == "shared",
        keys=count if config.retriever.keys == "learned" else 0,
        activation=functions.activation,
    )
    trained = Trainables(PromptBank(torch.zeros(count, config.prompts.tokens, size)), retriever)
    checkpoint.restore_trainables(trained, checkpoint.load(path).trainables, path)
    return Router(config, tokenizer, Spt(config, trained, functions), cast(Any, table))


def _check(config: Config) -> None:
    """Raise ConfigError where another server cannot give the run's replies."""
    options = config.generate
    problems = {
        f"method.type: {config.method.type} has no bank": config.method.type != "spt",
        f"generate.mode: {options.mode} reads each token's logits under all prompts, which no"
        " server offers": options.reads_every_prompt,
        "generate.num_beams: beams are not the same on every server": options.num_beams > 1,
        "generate.repetition_penalty: a server also counts the context": (
            options.repetition_penalty != 1.0
        ),
        "generate.no_repeat_ngram_size: servers have no such option": (
            options.no_repeat_ngram_size > 0
        ),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(
            f"--upstream: {'; '.join(found)}; set another, or serve the run without --upstream"
        )
