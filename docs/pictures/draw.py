"""Draws the pictures of docs/architecture.md from the code, so that they cannot go stale.

    python docs/pictures/draw.py

writes `rooms.svg` and `step.svg` into this folder. The rooms and their arrows come from the imports
of the package. The step names functions, and a name that no longer exists is an error. A test
compares the committed files with what this script draws.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PACKAGE = ROOT / "spt_ds"
HOUSE = ROOT / "tests" / "unit" / "test_house.py"

# What a room is for. A room without an entry is an error.
PURPOSE = {
    "config": "schema of the YAML file, loading, overrides",
    "batch": "what travels from data to model",
    "dist": "process group: reduce, gather, agree",
    "data": "readers, encoding, stores, sampler, loader",
    "evaluate": "text scores, intervals, tables",
    "track": "copies of the log: TensorBoard, W&B, MLflow, trackio",
    "placement": "where the base is: memory, DeepSpeed file, choice",
    "run": "run folder, checkpoints, predictions",
    "model": "attention, bank, retriever, losses, head, decoding",
    "engine": "optimizer steps, loop, generation",
}
FENCED = ("deepspeed", "bitsandbytes", "flash_attn", "peft")


@dataclass(frozen=True)
class Box:
    """One box of the picture of a step."""

    lane: int
    title: str
    text: str
    file: str  # in the package
    names: tuple[str, ...]  # functions and methods in `file`
    repeated: bool = False  # once per micro-batch


LANES = ("data worker", "training loop", "model, under the base's root", "all ranks")
STEP = (
    Box(
        0,
        "Prepare the window",
        "draw G examples, deal them to ranks, count target tokens, pair contexts",
        "data/loader.py",
        ("TrainLoader.windows",),
    ),
    Box(
        1,
        "Start the step",
        "the next window, and what this rank was asked (stop, save)",
        "engine/trainer.py",
        ("Trainer.run",),
    ),
    Box(
        2,
        "Score the bank",
        "send the batch to the device, look tokens up once, pool the context",
        "model/spt.py",
        ("Spt.pack", "Spt.score"),
        repeated=True,
    ),
    Box(
        2,
        "Read all K prompts",
        "one forward pass over packed rows",
        "model/rows.py",
        ("read_context", "target_states"),
        repeated=True,
    ),
    Box(
        2,
        "Take the losses",
        "head on response positions only, divided by the counts of the window",
        "model/spt.py",
        ("Spt.micro_losses",),
        repeated=True,
    ),
    Box(
        2,
        "Backward",
        "through activations to prompts and retriever; frozen weights get no gradient",
        "engine/engine.py",
        ("Engine.train_window",),
        repeated=True,
    ),
    Box(
        3,
        "Contrastive loss",
        "scores of all ranks, once per window, no pass through the base",
        "model/spt.py",
        ("Spt.contrastive",),
    ),
    Box(
        3,
        "One reduction",
        "gradients, loss sums, prompt usage and requests in one buffer",
        "dist.py",
        ("all_reduce_sum",),
    ),
    Box(
        1,
        "Check, clip, update",
        "all ranks raise where a value is not finite; AdamW moves",
        "engine/engine.py",
        ("Engine.train_window",),
    ),
    Box(
        1,
        "Record, validate, save",
        "metrics.jsonl; a checkpoint with COMPLETE.json last",
        "engine/checkpoints.py",
        ("Checkpoints.save",),
    ),
)


def room_of(path: Path) -> str:
    """The folder of the package, or the file at its top, to which a module belongs."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(rooms that each room imports, other packages that it imports)."""
    inside: dict[str, set[str]] = {}
    outside: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path.relative_to(PACKAGE))
        uses, others = inside.setdefault(room, set()), outside.setdefault(room, set())
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            first, _, rest = name.partition(".")
            if first == "spt_ds":
                uses.add(rest.partition(".")[0])
            else:
                others.add(first)
    return {room: uses & inside.keys() - {room} for room, uses in inside.items()}, outside


def house(name: str) -> Any:
    """A table of the test of the house: LAYERS (sets of rooms, lowest first) or FENCES."""
    for node in ast.parse(HOUSE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise SystemExit(f"{HOUSE} defines no {name}")


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that a longer way implies."""

    def reach(room: str) -> set[str]:
        return graph[room].union(*map(reach, graph[room]))

    return {room: uses - set().union(*map(reach, uses)) for room, uses in graph.items()}


def defined(path: Path) -> set[str]:
    """Names of the functions, classes and methods of a file, methods as `Class.method`."""
    if not path.is_file():
        return set()
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


WIDTH, MARGIN, GAP = 960, 20, 16
SOFT, LINE, PALE = "#57606a", "#8c959f", "#f6f8fa"
FILLS = ("#ddf4ff", "#fff8c5", "#dafbe1", "#fbefff")
HEAD_LINE, TEXT_LINE = 19, 15  # down to the first line of a box, and from line to line
CHARACTER = {"small": 5.7, "code": 6.1}  # width of one character
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1b1f24}"
    ".name{font-size:14px;font-weight:bold}.small{font-size:11px;fill:#57606a}"
    ".code{font-size:10px;font-family:monospace}.head{font-size:12px;font-weight:bold}"
)

Line = tuple[str, str]  # (class, text)


def wrapped(kind: str, text: str, width: float) -> list[Line]:
    """Lines of `text` that fit into `width`, less a little at both sides."""
    lines, most = [""], int((width - 12) / CHARACTER[kind])
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [(kind, line) for line in lines]


def height_of(lines: list[Line]) -> int:
    return TEXT_LINE * len(lines) + 12


def card(x: float, y: float, w: float, h: float, fill: str, lines: Iterable[Line]) -> str:
    """A box with centred lines."""
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}"'
        f' stroke="{LINE}"/>'
    ]
    for number, (kind, text) in enumerate(lines):
        down = y + HEAD_LINE + TEXT_LINE * number
        parts.append(f'<text x="{x + w / 2:g}" y="{down:g}" class="{kind}">{escape(text)}</text>')
    return "\n".join(parts)


def arrow(*stops: tuple[float, float, float]) -> str:
    """A line with a tip through stops: x, y where it arrives, y where it leaves."""
    (x, _, y), *others = stops
    path = f"M {x:g} {y:g}"
    for number, (to, arrives, leaves) in enumerate(others, start=1):
        end = arrives - 2 if number == len(others) else arrives
        middle = (y + end) / 2
        path += f" C {x:g} {middle:g} {to:g} {middle:g} {to:g} {end:g}"
        path += f" L {to:g} {leaves:g}" if number < len(others) else ""
        x, y = to, leaves
    return f'<path d="{path}" fill="none" stroke="{SOFT}" marker-end="url(#tip)"/>'


def sheet(height: float, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
            f' width="{WIDTH}" height="{height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            f' markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker>'
            "</defs>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def levels_of(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The row of each room, 0 at the top: right below the lowest room that imports it."""
    users = {room: [other for other in graph if room in graph[other]] for room in graph}

    def level(room: str) -> int:
        return 1 + max(map(level, users[room]), default=-1)

    return {room: level(room) for room in graph}


def chains_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Each arrow as the rooms at its ends and, in every row that it crosses, a gap of its own."""
    level = levels_of(graph)
    return [
        [room, *(f"{room}>{other}@{row}" for row in range(level[room] + 1, level[other])), other]
        for room, uses in sorted(graph.items())
        for other in sorted(uses)
    ]


def rows_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms and gaps in rows, top row first, each near to those that it is joined to."""
    level, chains = levels_of(graph), chains_of(graph)
    level |= {gap: level[chain[0]] + n for chain in chains for n, gap in enumerate(chain[1:-1], 1)}
    rows = [
        sorted(room for room in level if level[room] == n) for n in range(max(level.values()) + 1)
    ]
    column = {room: n - (len(row) - 1) / 2 for row in rows for n, room in enumerate(row)}
    joined: dict[str, list[str]] = {room: [] for room in level}
    for upper, lower in (pair for chain in chains for pair in pairwise(chain)):
        joined[upper].append(lower)
        joined[lower].append(upper)
    for _ in range(8):  # by then no room moves any more
        for row in (*rows, *reversed(rows)):
            pull = {r: sum(column[o] for o in joined[r]) / max(len(joined[r]), 1) for r in row}
            row.sort(key=lambda room: (pull[room], room))
            column |= {room: n - (len(row) - 1) / 2 for n, room in enumerate(row)}
    return rows


def draw_rooms() -> str:
    """The rooms of the package: an arrow leads from a room to one that it imports."""
    inside, outside = rooms()
    layers: list[set[str]] = house("LAYERS")
    engine = next(number for number, layer in enumerate(layers) if "engine" in layer)
    above = set().union(*layers[engine + 1 :]) & inside.keys()
    files = {room for room in inside if (PACKAGE / f"{room}.py").is_file()}
    ground = set().union(*layers[:engine]) & files - PURPOSE.keys()
    if lacking := sorted(inside.keys() - above - ground - PURPOSE.keys()):
        raise SystemExit(f"{__file__}: PURPOSE does not name {', '.join(lacking)}")
    graph = {room: inside[room] & PURPOSE.keys() for room in PURPOSE if room in inside}
    rows = rows_of(reduced(graph))
    space = WIDTH - 2 * MARGIN
    w = min(200.0, (space + GAP) / max(len(graph.keys() & row) for row in rows) - GAP)

    def lines_of(room: str) -> list[Line]:
        lines = [("name", room), *wrapped("small", PURPOSE[room], w)]
        if fenced := sorted(outside[room].intersection(FENCED)):
            return [*lines, *wrapped("code", "imports " + ", ".join(fenced), w)]
        return lines if "torch" in outside[room] else [*lines, ("code", "imports no torch")]

    def band(y: float, title: str, names: set[str]) -> str:
        names = names - {"__init__"}
        lines = [("head", title), *wrapped("code", ", ".join(sorted(names)), space)]
        return card(MARGIN, y, space, height_of(lines), PALE, lines)

    h = max(height_of(lines_of(room)) for room in graph)
    at: dict[str, tuple[float, float, float]] = {}  # x of the middle, y of top and bottom
    for level, row in enumerate(rows):
        widths = [w if room in graph else GAP for room in row]
        x, y = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2, 110 + level * (h + 54.0)
        for room, width in zip(row, widths, strict=True):
            at[room] = (x + width / 2, y, y + h)
            x += width + GAP
    arrows = [arrow(*map(at.__getitem__, chain)) for chain in chains_of(reduced(graph))]
    cards = [
        card(at[room][0] - w / 2, at[room][1], w, h, FILLS[level % len(FILLS)], lines_of(room))
        for level, row in enumerate(rows)
        for room in row
        if room in graph
    ]
    end = 110 + len(rows) * (h + 54) - 24
    top = band(20, "commands, and the rooms behind them: they may import every room below", above)
    floor = band(end, "ground: small files for every room", ground)
    return sheet(
        end + 70, "The rooms of spt_ds and what they import", [top, *arrows, *cards, floor]
    )


def draw_step() -> str:
    """One training step: what happens where, in the order of time."""
    lane = (WIDTH - 2 * MARGIN) / len(LANES)
    w = lane - 24
    y, last, parts = 84.0, None, []
    repeated: list[float] = []
    for box in STEP:
        if gone := sorted(set(box.names) - defined(PACKAGE / box.file)):
            raise SystemExit(f"{__file__}: {box.file} does not define {', '.join(gone)}")
        lines = [("name", box.title), *wrapped("small", box.text, w)]
        lines += [("code", text) for text in (box.file, *box.names)]
        x, h = MARGIN + box.lane * lane + 12, height_of(lines)
        if last is not None:
            parts.append(arrow(last, (x + w / 2, y, y)))
        parts.append(card(x, y, w, h, FILLS[box.lane], lines))
        if box.repeated:
            repeated += [y, y + h]
        last = (x + w / 2, y, y + h)
        y += h + 28
    heads = []
    for number, name in enumerate(LANES):
        x = MARGIN + number * lane
        heads.append(
            f'<rect x="{x + 4:g}" y="20" width="{lane - 8:g}" height="{y - 20:g}" rx="6"'
            f' fill="{PALE}"/>'
        )
        heads.append(f'<text x="{x + lane / 2:g}" y="42" class="head">{escape(name)}</text>')
    x, top = MARGIN + 2 * lane + 6, repeated[0] - 24
    heads.append(
        f'<rect x="{x:g}" y="{top:g}" width="{lane - 12:g}" height="{repeated[-1] - top + 8:g}"'
        f' rx="6" fill="none" stroke="{SOFT}" stroke-dasharray="5 4"/>'
    )
    heads.append(
        f'<text x="{x + lane - 74:g}" y="{top + 15:g}" class="small">for each micro-batch</text>'
    )
    return sheet(y + 20, "One training step", [*heads, *parts])


PICTURES = {"rooms.svg": draw_rooms, "step.svg": draw_step}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
