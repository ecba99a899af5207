"""Inputs of the fuzz tests: good documents with a few edits, drawn by hypothesis.

Random bytes end at a parser's first check. What finds faults behind it is a document that is
nearly right: one value of another kind, one key twice, one byte too many.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Tree = Any  # what JSON can hold
Document = st.SearchStrategy[bytes]

DIGITS = "@digits@"  # stands for a number of 5,000 digits, which Python refuses to write
VALUES: tuple[Tree, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    4096,
    2**31,
    2**53 + 1,
    2**63,
    10**30,
    -(10**250),
    0.0,
    0.5,
    -0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "-1",
    "auto",
    "a",
    "hello there",
    "caf\u00e9 \U0001f600",
    "\x1b[2J\x07",
    "\u202egnp.exe",
    "\ud800",
    "\x00",
    "User 1:",
    "Q: R:",
    "../../outside",
    "/etc/passwd",
    "9" * 400,
    "x" * 5000,
    DIGITS,
    [],
    {},
    [None],
    [[]],
    {"": None},
    {"enabled": True},
    ["a", 1],
)
FRAGMENTS: tuple[bytes, ...] = (
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",  # half a surrogate pair
    b"\xef\xbb\xbf",  # a byte order mark
    b"\xe2\x80\xa8",  # a line separator of Unicode
    b"\x1b[31m",
    b"\r",
    b"\n",
    b"\n\n",
    b"\t",
    b" ",
    b'"',
    b"'",
    b",",
    b":",
    b": ",
    b"- ",
    b"#",
    b"%",
    b"|",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[" * 500,
    b'{"a":' * 500,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"\\ud800",
    b"\\u0000",
    b'"\\e[2J"',
    b"!!int abc",
    b"!!python/object/apply:os.abort []",
    b"!!timestamp 2026-02-30",
    b"&a [*a]",
    b"<<: *a",
    b"2026-02-30",
    b"your persona:",
    b"__SILENCE__",
    b"User 1:",
    b"User 3:",
    b"*User 1:*",
    b"1 ",
    b"99999999999 ",
)


def json_bytes(tree: Tree) -> bytes:
    """A tree as JSON, with the numbers that only a hostile writer would write."""
    return json.dumps(tree).replace(f'"{DIGITS}"', "9" * 5000).encode()


def json_lines(rows: Tree) -> bytes:
    """A list as one JSON value a line; anything else as one line."""
    rows = rows if isinstance(rows, list) else [rows]
    return b"".join(json_bytes(row) + b"\n" for row in rows)


@st.composite
def edited_tree(draw: st.DrawFn, tree: Tree, most: int = 3) -> Tree:
    """`tree` with up to `most` values replaced, moved, removed or given another key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, most))):
        places = list(_places(tree))
        if not places:
            return draw(st.sampled_from(VALUES))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(("near", "near", "value", "copy", "drop", "key", "twice")))
        if action in ("near", "value"):
            near = [value for value in VALUES if type(value) is type(holder[key])]
            options = near if action == "near" and near else VALUES
            holder[key] = copy.deepcopy(draw(st.sampled_from(options)))
        elif action == "copy":
            other, name = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[name])
        elif action == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == "key":
            holder[draw(st.sampled_from(("", "x", "__class__", key.upper(), key * 2)))] = holder[
                key
            ]
        else:
            holder[key] = [holder[key], holder[key]]
    return tree


def _places(tree: Tree) -> list[tuple[Any, Any]]:
    """Every (list or object, place in it) of a tree."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        holder = todo.pop()
        if isinstance(holder, (dict, list)):
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            found += [(holder, key) for key in keys]
            todo += [holder[key] for key in keys]
    return found


@st.composite
def edited_bytes(draw: st.DrawFn, content: bytes, most: int = 3) -> bytes:
    """`content` with up to `most` pieces inserted, removed, repeated or overwritten."""
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((0, 1, 1, 2, 5, 20, 100, len(content))))
        piece = content[start : start + length]
        action = draw(st.sampled_from(("insert", "insert", "replace", "drop", "repeat", "random")))
        new = b""
        if action in ("insert", "replace"):
            new = draw(st.sampled_from(FRAGMENTS)) + (piece if action == "insert" else b"")
        elif action == "repeat":
            new = piece * draw(st.sampled_from((2, 3, 50)))
        elif action == "random":
            new = draw(st.binary(max_size=8))
        content = content[:start] + new + content[start + length :]
    return content


def documents(*trees: Tree, dump: Callable[[Tree], bytes] = json_bytes) -> Document:
    """Documents near one of `trees`, as `dump` writes them."""
    whole = st.sampled_from(range(len(trees))).flatmap(lambda n: edited_tree(trees[n])).map(dump)
    return whole | whole.flatmap(edited_bytes) | st.binary(max_size=40)


def texts(*contents: bytes) -> Document:
    """Documents near one of `contents`."""
    return st.sampled_from(contents).flatmap(edited_bytes) | st.binary(max_size=40)


HEAD = b"=== "  # of the line that names a file in a packed folder
ABSENT = b"(absent)"  # in place of a file's content


def pack(files: dict[str, bytes]) -> bytes:
    """Several files as one document: a line with the name, then the content."""
    return b"".join(HEAD + name.encode() + b"\n" + text + b"\n" for name, text in files.items())


def unpack(content: bytes, good: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a packed folder over the good ones; what has no good one is left out."""
    files = dict(good)
    for part in (b"\n" + content).removesuffix(b"\n").split(b"\n" + HEAD)[1:]:
        name, _, text = part.partition(b"\n")
        if (name_text := name.decode("latin-1")) in good:
            files[name_text] = text
    return {name: text for name, text in files.items() if text != ABSENT}


@st.composite
def folders(draw: st.DrawFn, files: dict[str, Document]) -> bytes:
    """Packed folders: one or two files edited or absent, for a reader ends at the first fault."""
    names = draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True))
    return pack({n: ABSENT if draw(st.integers(0, 9)) == 0 else draw(files[n]) for n in names})
