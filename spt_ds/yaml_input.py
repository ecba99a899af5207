"""YAML from files that anyone may have written: plain data, or a `yaml.YAMLError` with its line.

PyYAML lets Python's own errors through where a text is made to break it: RecursionError on deep
nesting, ValueError on a number of 5,000 digits or a 30th of February, AttributeError, KeyError and
IndexError on values that do not fit their tag.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from spt_ds.display import shown

MAX_DEPTH = 64  # lists and mappings inside one another
MAX_NODES = 100_000  # values after references are followed: ten lines of them can stand for 10^9


def load_yaml(text: str) -> Any:
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
        # A node gets its size when it is finished: a reference to an unfinished one is inside of
        # it.
        if reference and node not in self._sizes:
            raise _fault("a list or mapping that holds itself", mark)
        if node is not None and not reference:
            size = 1 + sum(self._sizes[child] for child in _children(node))
            if size > MAX_NODES:
                raise _fault(f"more than {MAX_NODES} values, references followed", mark)
            self._sizes[node] = size
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise _fault(f"{shown(node.value)} is no {kind}", node.start_mark) from None
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
            raise _fault(f"key {shown(key)} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
