"""Documents for pretraining the shipped base: dialogues in the toolkit's template. No torch.

    given persona: {sentences}; context: Q: {turn} R: {turn} ... R: {turn}

BOS and EOS are added as ids. A document always ends with a reply (R:), so its EOS teaches to stop
there. Half of the documents are spelled as usual, half as ConvAI2 spells.

Four kinds of documents are drawn:
- persona: a dialogue with its owner's persona, in shuffled order, some sentences left out, some of
  other people mixed in. Most end with a reply that has a word in common with the persona;
- borrowed: a dialogue that has no persona, with one made of what the owner says about themselves
  in it, mixed with such statements of other dialogues. To copy from it pays, which is how a small
  model learns to read a persona at all;
- plain: a dialogue without a persona;
- echo: lines, of random words or somebody's statements, that are then said again in another order.
  They make no sense and teach to look up how a line goes on. Without them a model of this size
  showed no sign of copying after 14 M tokens.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.embedded_base.dialogues import (
    SPLITS,
    Conversation,
    apart,
    families,
    read_conversations,
)
from spt_ds.errors import DataError

Talk = Conversation | tuple[str, ...]  # with personas, or the bare turns of a dialogue without
KINDS = ("persona", "borrowed", "plain", "echo")
_PUNCTUATION = re.compile(r"([^\w\s'])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_CONTENT_WORD = re.compile(r"[a-z]{4,}")
# Words of nearly every dialogue.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "about also always been come could does ever from good great have just know like lots love "
        "made make many more much nice only other really should some that them then there they "
        "thing things think this time very want well were what when where which will with work "
        "would year years your",
    )
)
_FIRST_PERSON = re.compile(r"(i|i'm|im|i've|i'd|my)\s", re.IGNORECASE)
# Openings of statements that say nothing about a person.
_EMPTY = re.compile(
    r"i (agree|know|see|think so|guess|hope|mean|bet|heard|wonder|would say|understand)\b", re.I
)


@dataclass(frozen=True)
class Document:
    """Pieces of text whose ids, one after the other, are the ids of the whole text."""

    head: tuple[str, ...]  # ends with "context:"
    turns: tuple[tuple[str, str], ...]  # (" Q:" or " R:", " text"); the last is a reply

    @property
    def text(self) -> str:
        """The whole document."""
        return "".join((*self.head, *(part for turn in self.turns for part in turn)))


@dataclass(frozen=True)
class Pools:
    """Dialogues by purpose; `held_*` are never trained on."""

    persona: list[Talk]
    general: list[Talk]
    held_persona: list[Talk]
    held_general: list[Talk]
    profile_lines: list[str] = field(default_factory=list)  # persona sentences of all trained on
    statements: list[str] = field(default_factory=list)  # what speakers of `general` say of them
    words: list[str] = field(default_factory=list)  # all different ones of `statements`


def load_pools(
    text: Sequence[Path], csv: Sequence[Path], demo: Path | None, held_share: float, seed: int
) -> Pools:
    """Read all sources and hold out `held_share` (0 to 1) of each kind, at least one dialogue.

    Of the demo dialogues in folder `demo` none is in the pools, and nobody of their valid and test
    files is either.
    """
    rng = random.Random(seed)
    general: list[Talk] = [talk for path in text for talk in read_talks(path)]
    persona: list[Talk] = list(
        without_demo(read_conversations(csv), demo) if demo else read_conversations(csv)
    )
    held: list[list[Talk]] = []
    for pool, kind in ((persona, "--persona-csv"), (general, "--text")):
        if len(pool) < 2:
            raise DataError(
                f"{kind}: {len(pool)} usable dialogues, at least 2 are needed; give more files"
            )
        rng.shuffle(pool)
        count = max(1, round(len(pool) * held_share))
        held.append(pool[:count])
        del pool[:count]
    lines = {line for talk in persona for profile in talk.personas for line in profile}  # type: ignore[union-attr]
    said = {line for talk in general for turn in talk for line in statements(turn)}  # type: ignore[union-attr]
    words = {word for line in said for word in line.split()}
    return Pools(persona, general, held[0], held[1], sorted(lines), sorted(said), sorted(words))


def read_talks(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield dialogues of at least two turns: one utterance a line, a blank line between dialogues;
    .xz or plain.
    """
    try:
        packed = path.read_bytes()
        content = (lzma.decompress(packed) if path.suffix == ".xz" else packed).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); give UTF-8 text, plain or .xz"
        ) from error
    for block in re.split(r"\n\s*\n", content):
        turns = tuple(filter(None, (" ".join(line.split()) for line in block.split("\n"))))
        if len(turns) > 1:
            yield turns


def without_demo(conversations: Sequence[Conversation], demo: Path) -> list[Conversation]:
    """Leave out the demo dialogues, and whoever is of a family of valid or test."""
    ids: dict[str, set[str]] = {}
    for name in SPLITS:
        path = demo / f"{name}.jsonl"
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; make it with python -m benchmarks.embedded_base.dialogues"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        ids[name] = {json.loads(line)["id"] for line in filter(None, lines)}
    family = families(conversations)
    taken = {one for name in ids["valid"] | ids["test"] if name in family for one in family[name]}
    return [c for c in apart(conversations, family, taken) if c.id not in ids["train"]]


def statements(turn: str) -> list[str]:
    """Return the sentences in which the speaker of `turn` says something about themselves."""
    said = []
    for sentence in _SENTENCE_END.split(turn):
        words = len(sentence.split())
        if (
            4 <= words <= 16
            and _FIRST_PERSON.match(sentence)
            and not _EMPTY.match(sentence)
            and not sentence.endswith("?")
        ):
            said.append(sentence if sentence[-1] in ".!" else sentence + ".")
    return said


def draw(pools: Pools, kind: str, rng: random.Random) -> Document:
    """Return a random document of `kind`, one of KINDS; text without statements has no echo."""
    if kind == "echo" and pools.statements:
        return _echo(pools, rng)
    talk = rng.choice(pools.persona if kind == "persona" else pools.general)
    if isinstance(talk, Conversation):
        return _render(talk.turns, rng.randrange(2), rng, personas(talk), pools.profile_lines)
    if kind == "plain":
        return _render(talk, rng.randrange(2), rng)
    return _borrowed(talk, pools, rng)


def personas(talk: Conversation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the personas of who has the even turns and of who has the odd ones."""
    first, other = talk.personas[talk.first_user], talk.personas[1 - talk.first_user]
    return first, other


def _render(
    turns: tuple[str, ...],
    owner: int,
    rng: random.Random,
    profiles: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    others: Sequence[str] = (),
) -> Document:
    """Return a random stretch that ends with a reply of `owner`, the parity of the replies."""
    start, end = _stretch(turns, owner, rng)
    persona: list[str] = []
    if profiles is not None:
        if rng.random() < 0.6:
            start, end = _about(profiles[owner], turns, owner, rng) or (start, end)
        persona = [line for line in profiles[owner] if rng.random() < 0.85] or [*profiles[owner]]
        if others and rng.random() < 0.3:
            persona += rng.choices(others, k=rng.randrange(1, 3))
        if rng.random() < 0.75:
            rng.shuffle(persona)
    return document(persona, turns[start : end + 1], spelling=rng.randrange(2))


def _borrowed(turns: tuple[str, ...], pools: Pools, rng: random.Random) -> Document:
    """Return a document whose persona is what the owner says of themselves, and of others."""
    said = [statements(turn) for turn in turns]
    owner = rng.randrange(2)
    if not any(said[owner::2]):
        owner = 1 - owner
    speaking = [place for place in range(owner, len(turns), 2) if said[place] and place > 0]
    start, end = _stretch(turns, owner, rng)
    if speaking and rng.random() < 0.8:
        end = rng.choice(speaking)
        start = max(0, end - rng.randrange(1, 9)) if rng.random() < 0.5 else 0
    last = said[end] if rng.random() < 0.85 else []
    rest = [line for place in range(owner, len(turns), 2) if place != end for line in said[place]]
    own = [*last, *rng.sample(rest, min(len(rest), rng.randrange(4)))][:5]
    persona = own + rng.sample(pools.statements, min(len(pools.statements), rng.randrange(1, 5)))
    rng.shuffle(persona)
    return document(persona, turns[start : end + 1], spelling=rng.randrange(2))


def _echo(pools: Pools, rng: random.Random) -> Document:
    """Return lines as a persona and some of them again as turns."""
    lines = rng.sample(pools.statements, min(len(pools.statements), rng.randrange(3, 8)))
    if rng.random() < 0.6:
        lines = [" ".join(rng.choices(pools.words, k=rng.randrange(4, 10))) for _ in lines]
    said = [rng.choice(lines) for _ in range(rng.randrange(1, len(lines) + 1))]
    return document(lines, said, spelling=rng.randrange(2), same=True)


def _stretch(turns: Sequence[str], owner: int, rng: random.Random) -> tuple[int, int]:
    """Return first and last turn; half begin with the dialogue, half are short, anywhere in it."""
    replies = range(owner or 2, len(turns), 2) or range(owner, len(turns), 2)
    return _until(rng.choice(replies), rng)


def _until(end: int, rng: random.Random) -> tuple[int, int]:
    return (max(0, end - rng.randrange(1, 9)) if rng.random() < 0.5 else 0), end


def _about(
    persona: Sequence[str], turns: Sequence[str], owner: int, rng: random.Random
) -> tuple[int, int] | None:
    """Return first and last turn of a stretch whose reply has a word of the persona; None: none."""
    words = content_words(persona)
    about = [end for end in range(owner or 2, len(turns), 2) if words & content_words([turns[end]])]
    return _until(rng.choice(about), rng) if about else None


def content_words(lines: Iterable[str]) -> set[str]:
    """Return the words of four letters and more that are not in nearly every dialogue."""
    return {word for line in lines for word in _CONTENT_WORD.findall(line.lower())} - _COMMON


def document(
    persona: Sequence[str], turns: Sequence[str], spelling: int, same: bool = False
) -> Document:
    """Return the document of a dialogue that ends with a reply; spelling 1 is ConvAI2's.

    That spells persona and turns in two ways; `same` makes it one.
    """
    if spelling and same:
        persona, turns = [tokenized(line) for line in persona], [tokenized(turn) for turn in turns]
    elif spelling:
        persona, turns = [line.lower() for line in persona], [tokenized(turn) for turn in turns]
    # A piece begins with its blank and takes along what follows without one, as words of a
    # byte-level tokenizer do: only then are the ids of pieces the ids of the whole text.
    head = ["context:"]
    if persona:
        head = ["given persona:", *(f" {line}" for line in persona)]
        head[-1] += "; context:"
    return Document(
        tuple(head),
        tuple(
            (" Q:" if (len(turns) - place) % 2 == 0 else " R:", f" {turn}")
            for place, turn in enumerate(turns)
        ),
    )


def tokenized(text: str) -> str:
    """Spell as ConvAI2 does: lower case, punctuation between blanks (`i am great . and you ?`)."""
    return " ".join(_PUNCTUATION.sub(r" \1 ", text.lower()).split())


def endless(pools: Pools, shares: Sequence[float], rng: random.Random) -> Iterator[Document]:
    """Yield documents for ever; `shares` are the weights of KINDS."""
    while True:
        yield draw(pools, rng.choices(KINDS, shares)[0], rng)


def rendered(talks: Iterable[Talk], seed: int) -> list[Document]:
    """Return one document a dialogue, always the same for the same seed: for held-out figures."""
    rng = random.Random(seed)
    return [
        _render(talk.turns, rng.randrange(2), rng, personas(talk))
        if isinstance(talk, Conversation)
        else _render(talk, rng.randrange(2), rng)
        for talk in talks
    ]
