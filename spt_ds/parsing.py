"""The door for JSON and YAML that others wrote: plain data, or one error of the parser's own kind.

Python's parsers fail in many ways on text that is meant to break them: RecursionError on deep
nesting, ValueError on a number of 5,000 digits or a 30th of February, and `"\\ud800"` becomes a
string that no file can hold. Here every refusal is a `json.JSONDecodeError` or a `yaml.YAMLError`
with its position, so that a caller handles one kind and names its file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 64  # lists and objects inside one another
MAX_DIGITS = 300  # of a whole number: every one of them is also a double
MAX_YAML_NODES = 100_000  # after references are followed: ten lines of them can stand for 10^9
MAX_FILE_BYTES = 64 << 20  # of a JSON document; data sets and predictions are read line by line

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """A value that JSON's grammar allows and we do not; `text` is how it is written."""

    def __init__(self, problem: str, text: str) -> None:
        super().__init__(problem)
        self.text = text


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises JSONDecodeError (a ValueError, as UnicodeDecodeError is) also for nesting beyond
    MAX_DEPTH, numbers beyond MAX_DIGITS or a double's range, NaN and Infinity, a key that an object
    holds twice, and half a surrogate pair.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    try:
        value = _DECODER.decode(text)
    except _Refused as error:
        at = max(text.rfind(error.text), 0)
        raise json.JSONDecodeError(str(error), text, at) from None
    if escape := _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            problem = "half a surrogate pair, which is no character"
            raise json.JSONDecodeError(problem, text, escape.start()) from None
    return value


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of at most MAX_FILE_BYTES; raise OSError or ValueError."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return parse_json(content)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
            raise json.JSONDecodeError(problem, text, match.start())


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number of {len(text)} digits, allowed are {MAX_DIGITS}", text)
    return int(text)


def _fraction(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _Refused("a number that is too large for a double", text)
    return number


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is no JSON number", name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"key {twice[:60]!r} is given twice", json.dumps(twice, ensure_ascii=False))
    return tree


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_whole_number,
    parse_float=_fraction,
    parse_constant=_no_constant,
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text: words, numbers, lists and mappings only.

    Raises YAMLError also for a key given twice, a tag that builds anything else, a value that does
    not fit its tag, and for nesting and sizes beyond the limits above.
    """
    return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain data only


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and, as YAML 1.2, reads 1e-3 as a number and `off`
    and a date as words.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [
            (tag, pattern)
            for tag, pattern in rules
            if tag != "tag:yaml.org,2002:timestamp"
            and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - as above
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None
        or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # nodes below each finished node, itself included

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, reference = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        if self._depth == MAX_DEPTH:
            raise _fault(f"nested deeper than {MAX_DEPTH} levels", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if reference and node not in self._sizes:
            raise _fault("a list or mapping that holds itself", mark)
        if node is not None and not reference:
            size = 1 + sum(self._sizes[child] for child in _children(node))
            if size > MAX_YAML_NODES:
                raise _fault(f"more than {MAX_YAML_NODES} values, references followed", mark)
            self._sizes[node] = size
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise _fault(f"{str(node.value)[:60]!r} is no {kind}", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise _fault("a whole number beyond 64 bits", node.start_mark)
        return _joined(value, node.start_mark) if isinstance(value, str) else value


def _joined(text: str, mark: yaml.Mark) -> str:
    """Join the two escapes that JSON writes for a character beyond U+FFFF, as PyYAML does not."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise _fault("half a surrogate pair, which is no character", mark) from None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _fault(problem: str, mark: yaml.Mark) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _mapping(loader: _StrictLoader, node: yaml.Node) -> dict[Hashable, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _fault("expected `key: value` lines", node.start_mark)
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        # No option is called by a list, and a list cannot be hashed.
        if not isinstance(key_node, yaml.ScalarNode):
            raise _fault("a key must be a word", key_node.start_mark)
        key = loader.construct_object(key_node)
        if key in seen:
            raise _fault(f"key {str(key)[:60]!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
