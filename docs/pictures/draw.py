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
from pathlib import Path

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
    "plan": "memory arithmetic of a run",
    "run": "run folder, checkpoints, predictions",
    "model": "attention, bank, retriever, losses, head, decoding",
    "engine": "optimizer steps, checkpoints, loop, generation",
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
        "look tokens up once, pool the context, cosine with each prompt",
        "model/spt.py",
        ("Spt.pooled", "Trainables.scores"),
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
        "metrics.jsonl; checkpoint with COMPLETE.json last",
        "engine/checkpoint.py",
        ("save",),
    ),
)


# --- what the code says


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


def layers() -> list[set[str]]:
    """The layers that the test of the house enforces, lowest first."""
    for node in ast.parse(HOUSE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            found: list[set[str]] = ast.literal_eval(node.value)
            return found
    raise SystemExit(f"{HOUSE} defines no LAYERS")


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that a longer way implies."""

    def reach(room: str) -> set[str]:
        return graph[room].union(*map(reach, graph[room]))

    return {room: uses - set().union(*map(reach, uses)) for room, uses in graph.items()}


def defined(path: Path) -> set[str]:
    """Names of the functions, classes and methods of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


# --- drawing

WIDTH, MARGIN, GAP = 960, 20, 16
SOFT, LINE, PALE = "#57606a", "#8c959f", "#f6f8fa"
FILLS = ("#ddf4ff", "#fff8c5", "#dafbe1", "#fbefff")
HEAD_LINE, TEXT_LINE = 19, 15  # down to the first line of a box, and from line to line
CHARACTER = 5.7  # width of one character of the small type
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1b1f24}"
    ".name{font-size:14px;font-weight:bold}.small{font-size:11px;fill:#57606a}"
    ".code{font-size:10px;font-family:monospace}.head{font-size:12px;font-weight:bold}"
)

Line = tuple[str, str]  # (class, text)


def wrapped(kind: str, text: str, width: float) -> list[Line]:
    """Lines of `text` that fit into `width`."""
    lines = [""]
    for word in text.split():
        if lines[-1] and (len(lines[-1]) + 1 + len(word)) * CHARACTER > width:
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


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return (
        f'<path d="M {x1:g} {y1:g} C {x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2 - 2:g}"'
        f' fill="none" stroke="{SOFT}" marker-end="url(#tip)"/>'
    )


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


def rows_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The rooms in rows, top row first: each below all that import it and near to them."""
    users = {room: {other for other in graph if room in graph[other]} for room in graph}

    def depth(room: str) -> int:
        return 1 + max(map(depth, users[room]), default=-1)

    rows: list[list[str]] = []
    column: dict[str, float] = {}
    for level in sorted({depth(room) for room in graph}):
        row = sorted(room for room in graph if depth(room) == level)
        pull = {r: sum(column[u] for u in users[r]) / max(len(users[r]), 1) for r in row}
        row.sort(key=lambda room: pull[room])
        column |= {room: place - (len(row) - 1) / 2 for place, room in enumerate(row)}
        rows.append(row)
    return rows


def draw_rooms() -> str:
    """The rooms of the package: an arrow leads from a room to one that it imports."""
    inside, outside = rooms()
    ground, *_, commands = ({*layer} & inside.keys() for layer in layers())
    graph = {room: uses - ground for room, uses in inside.items() if room not in ground | commands}
    if lacking := sorted(graph.keys() - PURPOSE.keys()):
        raise SystemExit(f"{__file__}: PURPOSE does not name {', '.join(lacking)}")
    rows = rows_of(graph)
    space = WIDTH - 2 * MARGIN
    w = min(200.0, (space + GAP) / max(map(len, rows)) - GAP)

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
    at = {
        room: (WIDTH / 2 + (place - len(row) / 2) * (w + GAP) + GAP / 2, 110 + level * (h + 54))
        for level, row in enumerate(rows)
        for place, room in enumerate(row)
    }
    arrows = [
        arrow(at[room][0] + w / 2, at[room][1] + h, at[other][0] + w / 2, at[other][1])
        for room, uses in sorted(reduced(graph).items())
        for other in sorted(uses)
    ]
    level_of = {room: level for level, row in enumerate(rows) for room in row}
    cards = [card(*at[r], w, h, FILLS[level_of[r] % len(FILLS)], lines_of(r)) for r in graph]
    end = 110 + len(rows) * (h + 54) - 24
    top = band(20, "commands: each may import every room below", commands)
    floor = band(end, "ground: every room may import it", ground)
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
            parts.append(arrow(*last, x + w / 2, y))
        parts.append(card(x, y, w, h, FILLS[box.lane], lines))
        if box.repeated:
            repeated += [y, y + h]
        last = (x + w / 2, y + h)
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
