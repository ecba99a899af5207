"""Documents for pretraining the shipped base: dialogues in the toolkit's template, in two
spellings. No torch.

    given persona: {sentences}; context: Q: {turn} R: {turn} ... R: {turn}

BOS and EOS are added as ids by the trainer. A document always ends with a reply (R:), so its EOS
teaches to stop there.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spt_ds.errors import DataError
from spt_ds.tools.demo_dialogues import SPLITS, Conversation, apart, families, read_conversations

Talk = Conversation | tuple[str, ...]  # with personas, or the bare turns of a dialogue without
_PUNCTUATION = re.compile(r"([^\w\s'])")


@dataclass(frozen=True)
class Pools:
    """Dialogues by purpose; `held_*` are never trained on."""

    persona: list[Talk]
    general: list[Talk]
    held_persona: list[Talk]
    held_general: list[Talk]


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
    return Pools(persona, general, held[0], held[1])


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
    """Leave out the demo dialogues, and whoever shares a persona family with one of valid or test."""
    ids: dict[str, set[str]] = {}
    for name in SPLITS:
        path = demo / f"{name}.jsonl"
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; make it with python -m spt_ds.tools.demo_dialogues"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        ids[name] = {json.loads(line)["id"] for line in filter(None, lines)}
    family = families(conversations)
    taken = {one for name in ids["valid"] | ids["test"] if name in family for one in family[name]}
    return [c for c in apart(conversations, family, taken) if c.id not in ids["train"]]


def render(talk: Talk, rng: random.Random) -> str:
    """Return one document: a random side of the dialogue, a random stretch that ends with a reply,
    a random spelling.

    Half of the documents begin with the dialogue, half anywhere in it and are short, as windows of
    a training run are.
    """
    turns = talk.turns if isinstance(talk, Conversation) else talk
    owner = rng.randrange(2)  # the parity of the turns that are replies
    replies = range(owner or 2, len(turns), 2) or range(owner, len(turns), 2)
    end = rng.choice(replies)
    start = max(0, end - rng.randrange(1, 9)) if rng.random() < 0.5 else 0
    persona: tuple[str, ...] = ()
    if isinstance(talk, Conversation):
        persona = talk.personas[talk.first_user if owner == 0 else 1 - talk.first_user]
    if rng.random() < 0.5:
        persona, turns = tuple(map(str.lower, persona)), tuple(map(tokenized, turns))
    head = f"given persona: {' '.join(persona)}; context:" if persona else "context:"
    said = (
        f" {'R' if place % 2 == owner else 'Q'}: {turns[place]}" for place in range(start, end + 1)
    )
    return head + "".join(said)


def tokenized(text: str) -> str:
    """Spell as ConvAI2 does: lower case, punctuation between blanks (`i am great . and you ?`)."""
    return " ".join(_PUNCTUATION.sub(r" \1 ", text.lower()).split())


def endless(pools: Pools, persona_share: float, rng: random.Random) -> Iterator[str]:
    """Yield documents for ever, `persona_share` of them with a persona; each pool is used up before
    it repeats.
    """
    persona, general = _cycle(pools.persona, rng), _cycle(pools.general, rng)
    while True:
        yield render(next(persona if rng.random() < persona_share else general), rng)


def _cycle(pool: Sequence[Talk], rng: random.Random) -> Iterator[Talk]:
    while True:
        yield from rng.sample(pool, len(pool))


def rendered(talks: Iterable[Talk], seed: int) -> list[str]:
    """Return one document a dialogue, always the same for the same seed: for held-out figures."""
    rng = random.Random(seed)
    return [render(talk, rng) for talk in talks]
