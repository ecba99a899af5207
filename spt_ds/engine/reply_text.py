"""From the tokens of a reply to its text: decoded, ended by a stop text, cut by the run's rule."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spt_ds.config.schema import Config
from spt_ds.engine.consensus import consensus
from spt_ds.engine.session import Session
from spt_ds.evaluate.text_metrics import cleaned, without_half_marker
from spt_ds.model.conversation import Endings


@dataclass(frozen=True)
class ReplyText:
    """How the replies of one run become text."""

    tokenizer: PreTrainedTokenizerBase
    rule: str  # `spt` or `none`, see `text_metrics.cleaned`
    stop: tuple[str, ...]  # texts that end a reply
    ends: tuple[int, ...]  # tokens that end one

    @classmethod
    def of(cls, session: Session) -> ReplyText:
        """As the configuration of `session` says."""
        config = session.config
        return cls(session.tokenizer, rule_of(config), config.generate.stop, session.ends)

    @property
    def endings(self) -> Endings:
        """What ends a reply, for decoding."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return Endings(self.ends, pad, self._holds_stop if self.stop else None)

    def of_tokens(self, tokens: list[int]) -> tuple[str, str]:
        """The text as it was generated, up to a stop text, and as it is shown: what the scores cut
        it to, without the half of a marker at which the limit of tokens cut it.
        """
        return self.of_text(self._decoded(tokens), bool(tokens) and tokens[-1] in self.ends)

    def of_text(self, text: str, ended: bool) -> tuple[str, str]:
        """The same of a text that is decoded already; `ended` by a token that ends a reply."""
        raw = before_stop(text, self.stop)
        reply = cleaned(raw, self.rule)
        if self.rule == "spt" and reply == raw and not ended:
            reply = without_half_marker(reply)
        return raw, reply.strip()

    def best_of(self, candidates: list[list[int]], shares: list[float]) -> int:
        """The index of the reply to give, of several to one context; see `consensus`."""
        return consensus([self.of_tokens(tokens)[1] for tokens in candidates], shares)

    def so_far(self, spoken: str) -> str:
        """What can be shown of a reply that is still growing: no later word takes it back."""
        text = before_stop(spoken, self.stop)
        if text == spoken:
            text = without_half_stop(text, self.stop)
        return cleaned(text, self.rule).strip()

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _holds_stop(self, tokens: list[int]) -> bool:
        # All of the reply is decoded each time: a stop text may run over several tokens.
        text = self._decoded(tokens)
        return any(stop in text for stop in self.stop)


def rule_of(config: Config) -> str:
    """The rule by which replies are cut: `generate.clean`, settled by the template."""
    asked = config.generate.clean
    if asked == "auto":
        return "spt" if config.data.template == "spt" else "none"
    return asked


def before_stop(text: str, stops: tuple[str, ...]) -> str:
    """Cut a text before the first of the stop texts in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def without_half_stop(text: str, stops: tuple[str, ...]) -> str:
    """Drop the longest end of a text with which a stop text may begin."""
    halves = (stop[:size] for stop in stops for size in range(1, len(stop)))
    longest = max((len(half) for half in halves if text.endswith(half)), default=0)
    return text[: len(text) - longest]
