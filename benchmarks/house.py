"""Measures the house: import cycles, sizes of files and functions, comments, line lengths.

    python benchmarks/house.py [FOLDER]     # FOLDER is a package, default spt_ds

`tests/unit/test_house.py` holds the limits. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import io
import json
import statistics
import tokenize
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "spt_ds"


def imports(source: str) -> list[str]:
    """Every name that a source imports, wherever it does so."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def import_cycle(package: Path) -> list[str]:
    """A cycle of imports at the top of files, or nothing: those inside functions make no cycle."""
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        targets = imports(ast.unparse(ast.Module([*top], [])))
        # `from spt_ds.files import sha256` names a module, or something in one.
        named = {*targets, *(target.rpartition(".")[0] for target in targets)}
        graph[name] = {target for target in named if target in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def functions(source: str) -> dict[str, int]:
    """Lines of each function, by `LINE: NAME`."""
    return {
        f"{node.lineno}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def columns(line: str) -> int:
    """Length of a line; what only quiets a tool does not count."""
    return len(line.partition("  # noqa")[0])


def comments(source: str) -> int:
    """Lines that are a comment for a reader; one behind code does not count."""
    return sum(
        token.type == tokenize.COMMENT
        and not token.line[: token.start[1]].strip()
        and not token.string.startswith(("# noqa", "# type:", "#!"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )


def measure(package: Path) -> dict[str, Any]:
    """The figures of a package; empty files count for nothing."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))]
    sources = [source for source in sources if source.strip()]
    lines = [line for source in sources for line in source.splitlines()]
    sizes = [len(source.splitlines()) for source in sources]
    filled = sum(bool(line.strip()) for line in lines)
    return {
        "files": len(sources),
        "lines": len(lines),
        "import_cycles": int(bool(import_cycle(package))),
        "longest_file_lines": max(sizes),
        "median_file_lines": statistics.median(sizes),
        "longest_function_lines": max(n for source in sources for n in functions(source).values()),
        "longest_line_columns": max(map(columns, lines)),
        "comment_percent": round(100 * sum(map(comments, sources)) / filled, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE)
    figures = measure(parser.parse_args().folder.resolve())
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):24} {value}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
