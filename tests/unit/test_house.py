"""The rules of the house: arrows one way, fences, short files and functions, comments.

That every option is read is tested by reading them: `tests/integration/test_options.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.house import columns, comments, functions, import_cycle, imports, measure
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
    {"log"},
    {"config", "json_input", "peers", "shipped"},
    {"data", "dist", "model"},
    {"placement", "run"},
    {"evaluate", "track"},
    {"engine"},
    {"api", "audit", "costs", "export", "report", "sweep"},
    {
        "__init__",
        "chat",
        "cli",
        "doctor",
        "generate",
        "plan",
        "quantize",
        "runs",
        "serve",
        "slurm_command",
        "summary",
        "train",
        "watch",
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
MEDIAN_FILE_LINES = (120, 200)
COMMENT_PERCENT = (3, 5)  # of the lines that are not blank, those that are comments
WITHOUT_TORCH = [
    "spt_ds.config.load",
    "spt_ds.placement.choose",
    "spt_ds.plan.command",
    "spt_ds.run.job",
    "spt_ds.evaluate.text_metrics",
    "spt_ds.data.readers",
    "spt_ds.data.encode",
    "spt_ds.cli",
    "spt_ds.summary",
    "spt_ds.runs",
    "spt_ds.watch",
    "spt_ds.serve.command",
    "spt_ds.audit.command",
    "spt_ds.export.command",
    "spt_ds.export.import_command",
    "spt_ds.export.push_command",
]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(name: str) -> str:
    """The room of a file, given by its path in the package: its folder, or itself at the top."""
    return name.split("/")[0].removesuffix(".py")


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
    """Files, functions and lines above the limits."""
    lines = source.splitlines()
    wrong = [f"{name} has {len(lines)} lines"] if len(lines) > MAX_FILE_LINES else []
    for function, length in functions(source).items():
        if length > MAX_FUNCTION_LINES:
            wrong.append(f"{name}:{function} has {length} lines")
    for number, line in enumerate(lines, start=1):
        if columns(line) > MAX_COLUMNS:
            wrong.append(f"{name}:{number}: {columns(line)} columns")
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


def test_the_package_as_a_whole() -> None:
    figures = measure(PACKAGE)
    assert import_cycle(PACKAGE) == []
    low, high = COMMENT_PERCENT
    assert low <= figures["comment_percent"] <= high
    low, high = MEDIAN_FILE_LINES
    assert low <= figures["median_file_lines"] <= high


def test_a_cycle_and_comments_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "one.py").write_text("# why\nfrom house import two  # behind code\n\n")
    (package / "two.py").write_text("def work():\n    from house import one\n    return one\n")
    assert import_cycle(package) == []
    assert measure(package)["comment_percent"] == 20  # 1 of 5 lines
    (package / "two.py").write_text("import house.one\n")
    assert sorted(set(import_cycle(package))) == ["house.one", "house.two"]


def test_only_comments_on_their_own_lines_count() -> None:
    behind = "x = [\n    1,  # behind code\n]  # behind code\ny = '# a string'\n"
    assert comments(behind) == 0
    assert comments("#!/usr/bin/env python\n# type: ignore\n# noqa: E501\nx = 1\n") == 0
    assert comments("# why\nx = [\n    # why\n    1,\n]\nif x:\n    # why\n    x = []\n") == 3
    assert comments("# a sentence\n# of two lines\nx = 1\n") == 2


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
