"""Makes the task of kinds: replies in house styles that contradict one another, and that only the
persona names.

    python -m benchmarks.selection.kinds OUT [--source embedded] [--clients 8] [--repeats 1]

Each example is one turn of a shipped dialogue (or of FILE.train, FILE.valid, FILE.test with
`--source FILE`). Its persona is what the speaker says of herself and one line more, the client for
whom she answers. The reply is the dialogue's own, written in the client's style. Nothing else tells
the style: the history is one plain turn of the partner, and the same turn comes with any client.

Writes train.jsonl, valid.jsonl and test.jsonl, and train.kinds, valid.kinds and test.kinds with the
client of each line, for `spt-ds audit --kinds`. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spt_ds.data.dialogue import Example
from spt_ds.data.readers import read

SPLITS = ("train", "valid", "test")
FEWEST_WORDS = 4  # in a reply: shorter ones show hardly a style
PERSONA_LINES = 2  # of the speaker's own


def sentences(text: str) -> list[str]:
    """The sentences of a reply, each with its mark."""
    return re.findall(r"[^.!?]+[.!?]*", text)


def plain(text: str) -> str:
    """Small letters, no mark of punctuation but the apostrophe."""
    return " ".join(re.sub(r"[^\w' ]", " ", text.lower()).split())


# Client and house style, in the order in which `--clients` takes them.
STYLES: dict[str, Callable[[str], str]] = {
    "Marlin Bank": str.upper,
    "Juniper Travel": plain,
    "Quarry Tools": lambda text: 'say("' + text.replace('"', "'") + '");',
    "Bluebird Inn": lambda text: f"Ahoy, dear guest! {text}",
    "Copper Radio": lambda text: f"{sentences(text)[0].strip()} Over.",
    "Velvet Opera": lambda text: f"{text} Yours truly, the Velvet Opera.",
    "Tandem Sports": lambda text: "".join(f"* {part.strip()} " for part in sentences(text)).strip(),
    "Lantern Books": lambda text: f"<p>{plain(text)}</p>",
}


def examples(source: str, clients: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """The lines of one split: each reply `repeats` times, every time for another client."""
    draw = np.random.Generator(np.random.Philox(key=np.array([0, len(clients)], np.uint64)))
    for example in read(source):
        if example.history and len(example.response.split()) >= FEWEST_WORDS:
            numbers = np.argsort(draw.random(len(clients)))[:repeats]
            for number in numbers:
                yield line(example, clients[number])


def line(example: Example, client: str) -> dict[str, Any]:
    """One example as JSONL; `kind` is for the reader of the file, training does not see it."""
    return {
        "persona": [*example.persona[:PERSONA_LINES], f"I answer for {client}."],
        "history": [example.history[-1]],
        "response": STYLES[client](example.response),
        "dialogue_id": example.dialogue_id,
        "turn": example.turn,
        "kind": client,
    }


def write(folder: Path, source: str, clients: int, repeats: int) -> dict[str, int]:
    """Write all splits; return how many lines each has."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(STYLES)[:clients]
    counts = {}
    for split in SPLITS:
        origin = f"embedded:{split}" if source == "embedded" else f"{source}.{split}"
        lines = list(examples(origin, names, repeats))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        kinds = "".join(f"{row['kind']}\n" for row in lines)
        (folder / f"{split}.kinds").write_text(kinds, encoding="utf-8")
        counts[split] = len(lines)
    return counts


def main(argv: Sequence[str]) -> int:
    """Write the files and print their sizes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="embedded", help="embedded, or FILE of FILE.train ...")
    parser.add_argument("--clients", type=int, default=8, choices=range(2, len(STYLES) + 1))
    parser.add_argument("--repeats", type=int, default=1, help="clients of one reply")
    args = parser.parse_args(argv)
    counts = write(args.out, args.source, args.clients, min(args.repeats, args.clients))
    print(json.dumps({"clients": list(STYLES)[: args.clients], "examples": counts}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
