"""Pick the dialogues that the package ships from Synthetic-Persona-Chat, split so that no persona
is on two sides.

    python -m benchmarks.embedded_base.dialogues --csv valid.csv test.csv \
        --out spt_ds/assets/dialogues --seed 0

Writes train.jsonl, valid.jsonl and test.jsonl, one dialogue a line: `{"id", "persona", "turns",
"first_speaker"}`; the persona's owner is "self", the other speaker "partner", turns alternate.

The source varies a profile by a sentence or two, so equal profiles are not enough to tell people
apart: profiles that share any sentence, directly or through others, form one *family*, and a family
is only ever on one side.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from spt_ds.errors import DataError

SPLITS = ("train", "valid", "test")
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
_TURN = re.compile(r"User ([12]):(.*)")
# The generator left name slots such as "[User 1's name]" or "[your name]" in a third of the
# conversations.
_NAME_SLOT = re.compile(
    r"\[[^\[\]]*(?:name|user)[^\[\]]*\]|[({<][^(){}<>]*\bname[^(){}<>]*[)}>]", re.IGNORECASE
)
_SLOT = re.compile(r"[\[{<]|\(user", re.IGNORECASE)  # any other slot: the conversation is left out
_NAMES = (
    "Alex",
    "Sam",
    "Jamie",
    "Robin",
    "Casey",
    "Jordan",
    "Taylor",
    "Morgan",
    "Riley",
    "Chris",
    "Pat",
    "Dana",
)


@dataclass(frozen=True)
class Conversation:
    """Two people talking: turns alternate and user `first_user` (0 or 1) has the first."""

    id: str  # file stem and row, the same for the same CSV files
    personas: tuple[tuple[str, ...], tuple[str, ...]]
    turns: tuple[str, ...]
    first_user: int

    def opener(self, user: int) -> str:
        """Return who speaks first in the view of `user`: "self" or "partner"."""
        return "self" if user == self.first_user else "partner"


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """Read CSV files; conversations whose speakers do not alternate or that keep a slot to fill in
    are skipped.
    """
    found: list[Conversation] = []
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error}); give Synthetic-Persona-Chat CSV files"
            ) from error
        if not rows or set(COLUMNS) - set(rows[0]):
            got = sorted(rows[0]) if rows else "an empty file"
            raise DataError(f"{path}:1: the columns must be {list(COLUMNS)}, got {got}")
        for number, row in enumerate(rows):
            conversation = _conversation(
                f"{path.stem.lower()}-{number:05d}", [row[name] or "" for name in COLUMNS]
            )
            if conversation is not None:
                found.append(conversation)
    return found


def _conversation(name: str, cells: Sequence[str]) -> Conversation | None:
    personas = [
        tuple(line.strip() for line in cell.split("\n") if line.strip()) for cell in cells[:2]
    ]
    speakers: list[int] = []
    turns: list[str] = []
    names = random.Random(name).sample(_NAMES, 2)
    for line in filter(None, map(str.strip, cells[2].split("\n"))):
        match = _TURN.fullmatch(line)
        if match is None:
            return None
        if text := " ".join(match[2].split()):
            speakers.append(int(match[1]) - 1)
            turns.append(_fill_names(text, names, speakers[-1]))
    alternate = all(one != two for one, two in pairwise(speakers))
    if (
        len(turns) < 2
        or not alternate
        or not all(personas)
        or any(_SLOT.search(turn) for turn in turns)
    ):
        return None
    return Conversation(name, (personas[0], personas[1]), tuple(turns), speakers[0])


def _fill_names(text: str, names: Sequence[str], speaker: int) -> str:
    """Put a first name into each name slot: the numbered user's, else the speaker's own."""

    def name(match: re.Match[str]) -> str:
        number = re.search("[12]", match[0])
        return names[int(number[0]) - 1 if number else speaker]

    return _NAME_SLOT.sub(name, text)


def sentence_key(sentence: str) -> str:
    """Return what two spellings of one persona sentence have in common: words in lower case."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def families(conversations: Iterable[Conversation]) -> dict[str, tuple[str, str]]:
    """Return the family of each conversation's two users by conversation id (union-find over shared
    sentences).
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    conversations = list(conversations)
    keys = {
        c.id: [[sentence_key(line) for line in persona] for persona in c.personas]
        for c in conversations
    }
    for profiles in keys.values():
        for first, *rest in profiles:
            for other in rest:
                parent[find(other)] = find(first)
    return {name: (find(profiles[0][0]), find(profiles[1][0])) for name, profiles in keys.items()}


def apart(
    conversations: Iterable[Conversation], family: dict[str, tuple[str, str]], taken: set[str]
) -> list[Conversation]:
    """Return the conversations of which neither user is of a family in `taken`."""
    return [c for c in conversations if not taken.intersection(family[c.id])]


def split(
    conversations: Sequence[Conversation], sizes: dict[str, int], seed: int
) -> dict[str, list[Conversation]]:
    """Draw `sizes` conversations a split; DataError when the families leave too few."""
    rng = random.Random(seed)
    family = families(conversations)
    pool = list(conversations)
    chosen: dict[str, list[Conversation]] = {}
    for name in ("valid", "test"):
        group = _grow(pool, family, sizes[name], rng)
        chosen[name] = rng.sample([c for c in pool if group.issuperset(family[c.id])], sizes[name])
        pool = apart(pool, family, group)
    if len(pool) < sizes["train"]:
        raise DataError(
            f"train: {len(pool)} conversations are left, asked for {sizes['train']}; give more CSV"
            " files"
        )
    chosen["train"] = rng.sample(pool, sizes["train"])
    return chosen


def _grow(
    pool: Sequence[Conversation], family: dict[str, tuple[str, str]], size: int, rng: random.Random
) -> set[str]:
    """Return families with at least `size` conversations among themselves and few with others,
    found greedily.
    """
    pairs = Counter(frozenset(family[c.id]) for c in pool)
    names = sorted(frozenset().union(*pairs))
    rng.shuffle(names)
    group: set[str] = set()
    while (inside := sum(n for pair, n in pairs.items() if pair <= group)) < size:
        if len(group) == len(names):
            raise DataError(
                f"{inside} conversations are left, asked for {size}; give more CSV files or smaller"
                " splits"
            )
        group.add(
            max(
                (name for name in names if name not in group),
                key=lambda name: _density(pairs, group | {name}),
            )
        )
    return group


def _density(pairs: Counter[frozenset[str]], group: set[str]) -> float:
    """Return the share of the conversations touching `group` that stay inside it."""
    touching = sum(n for pair, n in pairs.items() if pair & group)
    return sum(n for pair, n in pairs.items() if pair <= group) / touching


def write(chosen: dict[str, list[Conversation]], out: Path) -> None:
    """Write one JSONL file a split; the persona's owner is user 1 and user 2 in turn."""
    out.mkdir(parents=True, exist_ok=True)
    for name, conversations in chosen.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for place, conversation in enumerate(conversations):
                user = place % 2
                record = {
                    "id": conversation.id,
                    "persona": conversation.personas[user],
                    "turns": conversation.turns,
                    "first_speaker": conversation.opener(user),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.embedded_base.dialogues`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--csv", type=Path, nargs="+", required=True, help="Synthetic-Persona-Chat CSV files"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for train.jsonl, valid.jsonl and test.jsonl"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draw (default %(default)s)"
    )
    parser.add_argument(
        "--max-turns", type=int, default=40, help="leave out longer ones (default %(default)s)"
    )
    for name, size in zip(SPLITS, (240, 30, 30), strict=True):
        parser.add_argument(
            f"--{name}", type=int, default=size, help=f"dialogues in {name} (default %(default)s)"
        )
    args = parser.parse_args(argv)
    conversations = [c for c in read_conversations(args.csv) if 6 <= len(c.turns) <= args.max_turns]
    write(split(conversations, {name: getattr(args, name) for name in SPLITS}, args.seed), args.out)


if __name__ == "__main__":
    main()
