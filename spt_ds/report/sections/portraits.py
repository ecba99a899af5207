"""Each prompt by itself: how often it was used, when, for what, and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from spt_ds.report import plots
from spt_ds.report.markup import Markup, absent, join, tag
from spt_ds.report.plots import Floats, Line
from spt_ds.report.runs import Reply, Run
from spt_ds.report.sections.prompts import bank_size, shares_over_time
from spt_ds.report.sections.replies import bubble, persona
from spt_ds.report.typical import (
    Corpus,
    Word,
    central,
    context,
    distinctive,
    lead,
    surest,
    words,
)

OPEN = 4  # prompts of a run that are unfolded at first, those that replied most often
REPLIES, CONTEXTS, WORDS = 3, 2, 6  # shown of each prompt


@dataclass(frozen=True)
class Bank:
    """What the portraits of one run's prompts have in common."""

    run: Run
    replies: Sequence[Reply]
    """Those in which one prompt speaks."""
    steps: list[int]
    shares: Floats
    """`[K, C]`, in %: of the training examples up to each step that selected a prompt."""

    @cached_property
    def said(self) -> Corpus:
        return Corpus.of([reply.text for reply in self.replies])

    @cached_property
    def asked(self) -> Corpus:
        return Corpus.of([context(reply) for reply in self.replies])


def portraits(runs: Sequence[Run]) -> Markup:
    """A part for each prompt of each run; those without any use are named in one line."""
    parts: list[Markup] = []
    for run in runs:
        parts.append(tag("h3", run.label))
        spoken = [reply for reply in run.replies if reply.row.prompt is not None]
        steps, shares = shares_over_time(run)
        if not spoken and not steps:
            parts.append(absent("No use of a prompt is known yet."))
            continue
        parts += _bank(Bank(run, spoken, steps, shares))
    return join(parts)


def _bank(bank: Bank) -> list[Markup]:
    size = max(len(bank.shares), bank_size(bank.replies) if bank.replies else 0)
    counts = Counter(reply.row.prompt for reply in bank.replies)
    # A prompt that only training selected has a part too: when it fell silent can be seen there.
    trained = {prompt for prompt, shares in enumerate(bank.shares) if shares.any()}
    used = [prompt for prompt in range(size) if counts[prompt] or prompt in trained]
    ranked = sorted(used, key=lambda prompt: (-counts[prompt], prompt))
    parts = [_portrait(bank, prompt, place < OPEN) for place, prompt in enumerate(ranked)]
    idle = [str(prompt) for prompt in range(size) if prompt not in used]
    if idle:
        parts.append(absent(f"No reply and no logged step used: prompt {', prompt '.join(idle)}."))
    return parts


def _portrait(bank: Bank, prompt: int, is_open: bool) -> Markup:
    own = [reply for reply in bank.replies if reply.row.prompt == prompt]
    share = 100 * len(own) / len(bank.replies) if bank.replies else 0.0
    told = f"{len(own):,} of {len(bank.replies):,} replies" if bank.replies else "no replies yet"
    filled = tag("span", style=f"width:{share:.0f}%;background:{plots.colour(bank.run.number)}")
    heading = tag(
        "summary",
        tag("h4", f"Prompt {prompt}"),
        tag("span", filled, class_="share", aria_hidden="true"),
        tag("span", f"{share:.0f} % \N{MIDDLE DOT} {told}", class_="soft"),
    )
    aside = tag("div", _facts(own, prompt), _time(bank, prompt), class_="aside")
    body = tag("div", aside, tag("div", *_texts(bank, prompt, own), class_="texts"), class_="pair")
    opened = {"open": ""} if is_open else {}
    return tag("details", heading, body, class_="prompt", **opened)


def _facts(own: Sequence[Reply], prompt: int) -> Markup:
    if not own:
        return absent("It replied to none of the examples.")
    f1 = 100 * sum(reply.f1 for reply in own) / len(own)
    length = sum(len(words(reply.text)) for reply in own) / len(own)
    facts = [("Mean F1 of its replies", f"{f1:.1f}"), ("Mean words of a reply", f"{length:.1f}")]
    scored = [reply for reply in own if len(reply.row.scores) > 1]
    if scored:
        score = sum(reply.row.scores[prompt] for reply in scored) / len(scored)
        ahead = sum(lead(reply, prompt) for reply in scored) / len(scored)
        facts += [("Mean score", f"{score:.3f}"), ("Mean lead over the next", f"{ahead:+.3f}")]
    return tag("dl", *(tag("div", tag("dt", a), tag("dd", b)) for a, b in facts), class_="facts")


def _time(bank: Bank, prompt: int) -> Markup:
    """Its share of the training examples over the steps."""
    if not bank.steps:
        return absent("No prompt use was logged.")
    values = bank.shares[prompt]
    title = "Use in training, % of examples"
    alt = (
        f"Prompt {prompt} of {bank.run.label}: {title} over steps. {values[0]:.0f} % up to step"
        f" {bank.steps[0]}, {values[-1]:.0f} % up to step {bank.steps[-1]}; at most"
        f" {values.max():.0f} %."
    )
    line = Line([*zip(bank.steps, map(float, values), strict=True)], plots.colour(bank.run.number))
    # All prompts have the same vertical axis, or a use of 2 % would look like one of 80 %.
    plot = plots.curves(f"use{bank.run.number}-{prompt}", alt, [line], limits=(0, 100))
    return tag("figure", tag("figcaption", title), plot)


def _texts(bank: Bank, prompt: int, own: Sequence[Reply]) -> list[Markup]:
    if not own:
        return []
    texts = [reply.text for reply in own]
    said = distinctive(texts, bank.said, WORDS)
    asked = distinctive([context(reply) for reply in own], bank.asked, WORDS)
    places = central(texts, bank.said)[:REPLIES]
    repeated = Counter(tuple(words(text)) for text in texts)
    replies = (
        tag("p", "Typical replies", class_="label"),
        *(_reply(own[place], repeated[tuple(words(texts[place]))]) for place in places),
        *_words("More often in its replies than elsewhere (share of replies)", said),
    )
    contexts = (
        tag("p", "Typical contexts", class_="label"),
        *(_context(reply, prompt) for reply in surest(own, prompt)[:CONTEXTS]),
        *_words("More often in its contexts than elsewhere (share of contexts)", asked),
    )
    return [tag("div", *replies), tag("div", *contexts)]


def _reply(reply: Reply, times: int) -> Markup:
    """A reply under what the partner had said, as the two bubbles of a chat."""
    parts = [bubble("div", "partner", text) for text in reply.row.history[-1:]]
    parts.append(bubble("div", "self", reply.text or "(empty)"))
    if times > 1:
        parts.append(tag("p", f"said {times} times", class_="soft times"))
    return tag("div", *parts, class_="chat")


def _context(reply: Reply, prompt: int) -> Markup:
    """The persona and the last utterance that it was chosen for, with its lead in score."""
    parts = [persona(reply.row.persona)] if reply.row.persona else []
    parts += [bubble("div", "partner", text) for text in reply.row.history[-1:]]
    if len(reply.row.scores) > 1:
        told = f"score {reply.row.scores[prompt]:.3f}, {lead(reply, prompt):+.3f} over the next"
        parts.append(tag("p", told, class_="soft"))
    return tag("div", *parts, class_="context")


def _words(title: str, found: Sequence[Word]) -> list[Markup]:
    if not found:
        return []
    items = (
        tag(
            "li",
            tag("bdi", word.text, dir="auto"),
            tag("span", f" {100 * word.own:.0f} % / {100 * word.others:.0f} %", class_="soft"),
        )
        for word in found
    )
    return [tag("p", f"{title}:", class_="soft"), tag("ul", *items, class_="words")]
