"""The rules of the house: arrows one way, fences, empty __init__ files, short files and functions,
no dead options.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spt_ds.config.load import key_paths, load_config, recipe_names
from spt_ds.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "spt_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports only from lower layers, or from its own layer inside its own folder.
LAYERS = [
    {"display", "errors", "files", "json_input", "log", "rng", "shipped", "yaml_input"},
    {"config", "dist", "batch", "data", "evaluate", "placement", "run"},
    {"model"},
    {"engine"},
    {
        "train",
        "generate",
        "cli",
        "summary",
        "quantize",
        "plan_command",
        "slurm_command",
        "doctor",
        "chat",
        "report",
        "costs",
        "sweep",
        "api",
        "baselines",
        "__init__",
    },
]
FENCES = {
    "deepspeed": {"engine", "placement/ds_machine.py"},
    "bitsandbytes": {"model/quant.py"},
    "flash_attn": {"model/attention.py"},
    "peft": {"model/baselines.py"},
    "torch.distributed": {"dist.py", "engine"},
    # Loading anything of a base is done in one place, where code that it brings cannot run.
    "transformers.AutoConfig": {"model/loading.py"},
    "transformers.AutoTokenizer": {"model/loading.py"},
    "transformers.AutoModelForCausalLM": {"model/loading.py"},
}
WITHOUT_TORCH = [
    "spt_ds.config.load",
    "spt_ds.placement.choose",
    "spt_ds.plan_command",
    "spt_ds.run.job",
    "spt_ds.evaluate.text_metrics",
    "spt_ds.data.readers",
    "spt_ds.data.encode",
    "spt_ds.cli",
    "spt_ds.summary",
]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer(part: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if part in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_run_one_way(path: Path) -> None:
    own = part_of(path)
    for target in imports(path):
        if not target.startswith("spt_ds.") or target == "spt_ds.__version__":
            continue
        other = target.split(".")[1]
        if other == own:
            continue
        assert {own, other} != {
            "model",
            "data",
        }, f"{name_of(path)} imports {target}: model and data stay apart"
        if layer(own) == len(LAYERS) - 1:
            continue  # entry points and tools may use one another's small helpers
        assert layer(other) <= layer(own), (
            f"{name_of(path)} (layer {layer(own)}) imports {target} (layer {layer(other)})"
        )


def test_modules_have_no_import_cycles() -> None:
    names = {
        ("spt_ds." + name_of(p)[:-3].replace("/", ".")).removesuffix(".__init__"): p for p in FILES
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for (
            node
        ) in tree.body:  # imports at the top of the file: lazy ones inside functions make no cycle
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("spt_ds")
            ):
                targets |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        graph[name] = {
            target for target in targets if target in names and target not in (name, "spt_ds")
        }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_fences(path: Path) -> None:
    for target in imports(path):
        for package, allowed in FENCES.items():
            if target == package or target.startswith(package + "."):
                inside = name_of(path) in allowed or part_of(path) in allowed
                assert inside, (
                    f"{name_of(path)} imports {package}, which belongs in {sorted(allowed)}"
                )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, (
                f"{node.name} is {(node.end_lineno or 0) - node.lineno} lines"
            )


def test_init_files_are_empty_but_the_root() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not path.read_text(encoding="utf-8").strip(), path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("path", list(key_paths(Config)))
def test_every_option_is_read(path: str) -> None:
    _section, _, name = path.rpartition(".")
    holders = [p for p in FILES if p.parent != PACKAGE / "config"]
    pattern = re.compile(
        rf"\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']|max_\{{split\}}_examples"
    )
    assert any(pattern.search(p.read_text(encoding="utf-8")) for p in holders), (
        f"nothing reads {path}"
    )


@pytest.mark.parametrize("path", list(key_paths(Config)))
def test_every_option_is_described(path: str) -> None:
    model = Config
    *sections, last = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    description = model.model_fields[last].description
    assert description
    assert len(description) > 10


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    assert load_config(name).name == name


def test_product_speaks_of_itself_alone() -> None:
    words = re.compile("|".join(["py" + "pi.org", "/wo" + "rk/", "CL" + "AUDE", "issue #" + r"\d"]))
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".json", ".sh", ".sbatch", ".toml"}
            and path.is_file()
        ):
            if path.name in {"vocab.json", "tokenizer.json"}:
                continue
            found = words.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"


def test_json_schema_is_complete() -> None:
    from spt_ds.config.load import json_schema

    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
