"""The rules of the house: arrows one way, fences, short files and functions, comments.

That every option is read is tested by reading them: `tests/integration/test_options.py`.
"""

from __future__ import annotations

import ast
import graphlib
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from spt_ds.config.load import key_paths, load_config, recipe_names
from spt_ds.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "spt_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports from strictly lower layers and from its own folder, also inside functions. So rooms
# of one layer know nothing of one another: the model reads no files of dialogues, and no data set
# knows of the model.
LAYERS = [
    {"batch", "display", "files", "rng"},
    {"errors", "yaml_input"},
    {"config", "json_input", "log", "shipped"},
    {"data", "dist", "model"},
    {"placement", "run"},
    {"evaluate"},
    {"engine"},
    {"api", "audit", "costs", "report", "sweep"},
    {
        "__init__",
        "chat",
        "cli",
        "doctor",
        "generate",
        "plan_command",
        "quantize",
        "slurm_command",
        "summary",
        "train",
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
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 400, 60, 100
MEDIAN_FILE_LINES = (100, 200)
COMMENT_SHARE = (0.03, 0.06)  # of the lines that are not blank, those that bear a comment
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
    "spt_ds.audit.command",
]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(name: str) -> str:
    """The room of a file, given by its path in the package: its folder, or itself at the top."""
    return name.split("/")[0].removesuffix(".py")


def imports(source: str) -> list[str]:
    """Every name that a source imports, wherever it does so."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer(part: str) -> int:
    layers = [index for index, parts in enumerate(LAYERS) if part in parts]
    assert len(layers) == 1, f"LAYERS names {part} {len(layers)} times"
    return layers[0]


def wrong_arrows(name: str, source: str) -> list[str]:
    """Imports of a file that lead to its own layer or a higher one."""
    own = part_of(name)
    wrong = []
    for target in imports(source):
        other = target.split(".")[1] if target.startswith("spt_ds.") else own
        if other not in (own, "__version__") and layer(other) >= layer(own):
            wrong.append(f"{name} (layer {layer(own)}) imports {target} (layer {layer(other)})")
    return wrong


def over_fences(name: str, source: str) -> list[str]:
    """Imports of a file that belong in other files alone."""
    return [
        f"{name} imports {target}, which belongs in {sorted(allowed)}"
        for target in imports(source)
        for package, allowed in FENCES.items()
        if (target == package or target.startswith(package + "."))
        and name not in allowed
        and part_of(name) not in allowed
    ]


def too_long(name: str, source: str) -> list[str]:
    """Files, functions and lines above the limits; what only quiets a tool does not count."""
    lines = source.splitlines()
    wrong = [f"{name} has {len(lines)} lines"] if len(lines) > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                wrong.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    for number, line in enumerate(lines, start=1):
        if len(line.partition("  # noqa")[0]) > MAX_COLUMNS:
            wrong.append(f"{name}:{number}: {len(line)} columns")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_keeps_the_rules(path: Path) -> None:
    name, source = name_of(path), path.read_text(encoding="utf-8")
    assert wrong_arrows(name, source) == []
    assert over_fences(name, source) == []
    assert too_long(name, source) == []


def test_the_rules_see_what_breaks_them() -> None:
    up = "def work():\n    from spt_ds.engine.trainer import train_run\n"
    assert len(wrong_arrows("model/spt.py", up)) == 1
    assert len(wrong_arrows("model/spt.py", "from spt_ds.data import readers\n")) == 1
    assert wrong_arrows("train.py", up) == []
    assert len(wrong_arrows("generate.py", "from spt_ds.train import main\n")) == 1
    assert len(over_fences("run/job.py", "import deepspeed.ops\n")) == 1
    assert over_fences("engine/zero.py", "import deepspeed.ops\n") == []
    long = "def work():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert len(too_long("x.py", long)) == 1
    assert len(too_long("x.py", "x = 1\n" * (MAX_FILE_LINES + 1))) == 1
    assert len(too_long("x.py", f'x = "{"x" * MAX_COLUMNS}"\n')) == 1


def test_layers_and_fences_name_what_is_there() -> None:
    there = {part_of(name_of(path)) for path in FILES}
    named = [part for parts in LAYERS for part in parts]
    assert sorted(named) == sorted(there)
    for allowed in FENCES.values():
        for name in allowed:
            assert (PACKAGE / name).exists(), f"FENCES names {name}, which is not there"


def test_code_is_commented_and_files_are_of_a_size() -> None:
    commented = lines = 0
    sizes = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        commented += sum(not comment.startswith(("# noqa", "# type:")) for comment in comments)
        lines += sum(bool(line.strip()) for line in source.splitlines())
        sizes.append(len(source.splitlines()))
    low, high = COMMENT_SHARE
    assert low <= commented / lines <= high, f"{commented} of {lines} lines have a comment"
    low, high = MEDIAN_FILE_LINES
    assert low <= statistics.median(size for size in sizes if size) <= high


def test_modules_have_no_import_cycles() -> None:
    """Imports at the top of a file: those inside functions make no cycle."""
    modules = {
        "spt_ds." + name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        targets = imports(ast.unparse(ast.Module([*top], [])))
        # `from spt_ds.files import sha256` names a module, or something in one.
        named = {*targets, *(target.rpartition(".")[0] for target in targets)}
        graph[name] = {target for target in named if target in modules}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the cycle
    assert len(order) == len(FILES)


def test_init_files_are_empty_but_the_root() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not path.read_text(encoding="utf-8").strip(), path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


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
