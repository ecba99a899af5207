"""The commands of the documents run as they are printed, in a folder that has what they name.

A block whose fence names no language, or bash, is shell. Each command in it runs for real: those of
spt_ds and of Python in this process, with one rank and few examples (`SHORT`), the others in bash.
What cannot run on a test machine is in `CANNOT`, with the reason and with what is checked instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from spt_ds import dist
from spt_ds.cli import main
from tests.helpers.pages import bash
from tests.helpers.shell_blocks import BLOCKS, Block, commands, ours, words_of
from tests.helpers.shell_run import Shell, asks, fresh
from tests.helpers.vllm_like import spliced
from tests.unit.test_export_vllm import StandIn
from tests.unit.test_import_reference import states, written
from tests.unit.test_words import ROOT

ASSETS = ROOT / "spt_ds" / "assets"
# Pages that another test runs from the first to the last block, and that test.
ELSEWHERE = {
    "docs/tutorial/own-data.md": "tests/integration/test_own_data.py",
    "docs/how-to/labels-and-choices.md": "tests/integration/test_choices.py",
}
BASES = (
    *("BASE", "FOLDER", "FOLDER_OF_THE_BASE", "ORG/BASE", "runs/real-base/smollm2-135m"),
    *("meta-llama/Llama-2-7b-hf", "facebook/opt-125m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
PARLAI = (
    *("train_self_original_no_cands.txt", "valid_self_original_no_cands.txt"),
    *("train_self_original_no_cands.partial.txt", "valid_self_original_no_cands.expanded.txt"),
    *("train.txt", "valid.txt"),
)
LINKED = ("benchmarks", "ds_configs", "slurm", "tests", "docs")
FEW = (
    "--set train.max_steps=1 --set train.global_batch=2 --set train.micro_batch=2"
    " --set data.max_train_examples=4 --set data.max_valid_examples=2 --set data.max_tokens=192"
    " --set model.base_bits=32"
)
SAME = "--set data.test=held_out.jsonl"  # of every run, so that runs can be compared
BRIEF = "--set generate.max_new_tokens=4"
# What makes a long command short. The first pattern that a command matches counts.
SHORT = {
    r"^train .*base_matmul=fp8": f"{FEW} {SAME} --set model.base_bits=16",
    r"^train .*(data\.test=|mine\.yaml)": FEW,
    r"^train ": f"{FEW} {SAME}",
    r"^(generate|chat|audit) ": BRIEF,
    r"^bench (more|objectives|step) ": "--shape tiny --steps 1 --batch 2",
    r"^bench ": "--shape tiny --steps 1 --batch 2 --prompts 2 --examples 4",
    r"^benchmarks/rounding": "--examples 1",
}


def matches(key: str, command: str) -> bool:
    """Whether a pattern of `CANNOT` is that of a command, without the variables before it."""
    return bool(re.match(key, re.sub(r"^([A-Z_]+=\S+ )+", "", command)))


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def syntax(shell: Shell, command: str) -> None:
    """Bash can read it."""
    subprocess.run(["bash", "-n", "-c", command], check=True)


def script(shell: Shell, command: str) -> None:
    """The shell script that it starts is there, and bash can read it."""
    path = next(word for word in command.split() if (ROOT / word).is_file())
    subprocess.run(["bash", "-n", str(ROOT / path)], check=True)


def made(shell: Shell, command: str) -> None:
    """Make knows what to do for each target, and says so without doing it."""
    _, words = words_of(command)
    done = subprocess.run(
        [words[0], "-n", "-B", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), command


def has_tests(shell: Shell, command: str) -> None:
    """The tests are there, and the mark is one of those that are declared."""
    _, words = words_of(command)
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    marks = "".join(words[n + 1] for n, word in enumerate(words[3:], 3) if word == "-m")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{mark}: ' in declared for mark in re.findall(r"(?!not)\b\w+", marks))


def extra(shell: Shell, command: str) -> None:
    """Setup.py has the extra."""
    name = re.search(r"\[(\w+)\]", command)
    assert name is not None
    assert f'"{name[1]}": [' in (ROOT / "setup.py").read_text(encoding="utf-8")


def one_rank(shell: Shell, command: str) -> None:
    """The launcher's own parser accepts its words, and the job runs with one rank."""
    _, words = words_of(command)
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args(words[1:]).module
    elif words[0] == "torchrun":
        from torch.distributed.run import parse_args as torchrun

        assert torchrun(words[1:]).module
    elif words[0] == "sbatch":
        script(shell, command)
    own = ours(words)
    assert own is not None
    shell.spt_ds([word.replace("/shared/runs/", "runs/") for word in own])


def dry(shell: Shell, command: str) -> None:
    """It lists what it would send."""
    shell.run(f"{command} --dry-run")


def listed(shell: Shell, command: str) -> None:
    """It lists its cells, whose options are all checked for that."""
    if command.startswith("bash"):
        script(shell, command)
    shell.run(f"{command} --list")


def image(shell: Shell, command: str) -> None:
    """The Dockerfile has the build arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for name in re.findall(r"--build-arg (\w+)=", command):
        assert re.search(rf"^ARG {name}=", text, re.M), name


def base_there(shell: Shell, command: str) -> None:
    """The folder holds a base; the next command asks a server that splices as vLLM does."""
    assert (shell.place / command.split()[2] / "config.json").is_file()


def upstream(shell: Shell, command: str) -> None:
    """In front of a server that splices as vLLM does."""
    with spliced(shell.place / "BASE") as (url, _):
        own = ours(words_of(re.sub(r"http://[\d.:]+", url, command))[1])
        assert own is not None
        shell.serve(own, asks)


def client(shell: Shell, command: str) -> None:
    """Asks a server that reads embeddings as vLLM does, and knows one model."""
    server = StandIn(shell.place / "BASE")
    server.decode = AutoTokenizer.from_pretrained(shell.place / "BASE").decode
    asked = re.sub(r"http://[\d.:]+", server.url, command)
    try:
        shell.run(f"{asked} --model some/base")
    finally:
        server.shutdown()
        server.server_close()
    assert len(server.keys) == 1


def curl(shell: Shell, command: str) -> None:
    """Asks a server of the run, as the page has just started one."""
    needs("curl")
    url = "http://127.0.0.1:8000"
    assert url in command
    shell.serve(
        ["serve", "runs/demo"],
        lambda there: got_reply(bash(command.replace(url, there), shell.place)),
    )


def got_reply(text: str) -> None:
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant", text


def accepted(shell: Shell, command: str) -> None:
    """Its own parser accepts the words."""
    shell.accepted(command)


def there(shell: Shell, command: str) -> None:
    """The script is there."""
    assert (ROOT / command.split()[1]).is_file()


def key(shell: Shell, command: str) -> None:
    """The key that it makes is long enough for the server, which the next command starts."""
    needs("openssl")
    shell.patch.setenv("SPT_API_KEY", bash(f"{command}; echo $SPT_API_KEY", shell.place).strip())
    assert len(os.environ["SPT_API_KEY"]) >= 16


Check = Callable[[Shell, str], None]
# What does not run as it is printed: a pattern of commands, the reason, and the check instead.
CANNOT: dict[str, tuple[str, Check]] = {
    r"\. \.venv/bin/activate": ("the tests run in an environment of their own", syntax),
    r"pip (download|wheel|install --no-index) ": ("needs a package index", syntax),
    r"pip install ": ("needs a package index", extra),
    r"make ": ("installs, or runs for minutes; make itself is not tested here", made),
    r"\.ci/": ("installs Debian packages as root; runs these tests", script),
    r"\S*python -m pytest ": ("tests that would run in a test", has_tests),
    r"git worktree ": ("needs the history, which an archive of the source has not", syntax),
    r"mkdir .* sudo ": ("needs root", syntax),
    r"docker build ": ("no container can be built on the test machines", image),
    r"docker run ": ("no container can run there; its command does", one_rank),
    r"sbatch ": ("needs Slurm; `make test-cluster` has it", one_rank),
    r"bash slurm/": ("the same", listed),
    r"spt-ds sweep (?!.*--list)": ("trains every cell of a grid, for hours", listed),
    r"spt-ds push (?!.*--dry-run)": ("sends files to the hub", dry),
    r"torchrun --nnodes|deepspeed --hostfile": ("needs several nodes", one_rank),
    r"deepspeed --num_gpus 8 ": ("needs eight GPUs", one_rank),
    r"deepspeed --num_gpus 2 ": ("starts two ranks; .ci/run makes the demo with two", one_rank),
    r"vllm serve ": ("vLLM needs a GPU", base_there),
    r"spt-ds serve .*--upstream ": ("its vLLM is another server of embeddings here", upstream),
    r"python \S+/client\.py ": ("the same", client),
    r"curl ": ("the server has another port", curl),
    r"export SPT_API_KEY=": ("bash cannot set a variable of the tests", key),
    r"python benchmarks/(communication|load_memory)": ("starts ranks for minutes", accepted),
    r"python -m benchmarks\.(sharded_layer|launches)": ("starts ranks, or needs a GPU", accepted),
    r"python -m benchmarks\.(long_context|peers|serving|soak)": ("takes minutes", accepted),
    r"python -m benchmarks\.plan_against_peaks": ("needs a real base", accepted),
    r"python -m benchmarks\.selection\.table": ("needs the runs of a sweep", accepted),
    r"spt-ds (audit|compare|generate) runs/convai2/": ("the same", syntax),
    r"python benchmarks/(quality_bits|generate_all)": ("trains or replies for hours", accepted),
    r"python benchmarks/real_base": ("loads 93 MB of weights", accepted),
    r"python benchmarks/gpu": ("needs a GPU", accepted),
    r"python benchmarks/(two_checkouts|stays)": ("needs a second checkout", accepted),
    r"python docs/gallery/make": ("needs a browser; has tests of its own", there),
}


def parlai(rows: list[dict[str, Any]]) -> str:
    """Dialogues in the format of PersonaChat's files."""
    lines = []
    for row in rows:
        said = [f"your persona: {sentence}" for sentence in row["persona"]]
        turns = [*row["history"], row["response"]]
        turns = turns[len(turns) % 2 :]
        said += [f"{a}\t{b}" for a, b in zip(turns[::2], turns[1::2], strict=True)]
        lines += [f"{number} {text}" for number, text in enumerate(said, 1)]
    return "\n".join(lines) + "\n"


def page_files(folder: Path) -> None:
    """The files that pages print: those of the first run, and the grid of a sweep."""
    first = (ROOT / "docs/tutorial/first-run.md").read_text(encoding="utf-8")
    (dialogues,) = re.findall(r"^cat > mine\.jsonl <<'END'\n(.*?)^END$", first, re.M | re.S)
    (folder / "mine.jsonl").write_text(dialogues, encoding="utf-8")
    for name, text in (
        ("mine.yaml", first),
        ("sweep.yaml", (ROOT / "docs/how-to/sweep.md").read_text(encoding="utf-8")),
    ):
        (yaml,) = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
        (folder / name).write_text(yaml, encoding="utf-8")
    (folder / "persona.txt").write_text("I like to ski.\n", encoding="utf-8")


def bases_and_data(folder: Path) -> None:
    """A small base under every name of the documents, and shipped dialogues under the others."""
    base = folder / "BASE"
    shutil.copytree(ASSETS / "base", base)
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in BASES[1:]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(base)
    lines = (ASSETS / "clients" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    chosen = list({row["dialogue_id"]: row for row in rows}.values())[:6]
    text = "".join(json.dumps(row) + "\n" for row in chosen)
    for name in ("held_out.jsonl", "TRAIN", "VALID"):
        (folder / name).write_text(text, encoding="utf-8")
    kinds = "".join(f"{row['kind']}\n" for row in chosen)
    (folder / "held_out.kinds").write_text(kinds, encoding="utf-8")
    for name in PARLAI:
        (folder / name).write_text(parlai(chosen), encoding="utf-8")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)


def runs(folder: Path) -> None:
    """Trained for a step, with replies and scores; under every name of the documents."""
    test = f"data.test={folder / 'held_out.jsonl'}"
    for name, recipe in (("demo", "clients"), ("one", "demo"), ("pt", "baseline-pt")):
        run = f"runs/{name}"
        words = ["train", "--config", recipe, "--run-dir", run, *FEW.split(), "--set", test]
        assert main(words) == 0
        for more in ([], ["--base-alone"]):
            assert main(["generate", run, *BRIEF.split(), *more]) == 0
        assert main(["evaluate", run]) == 0
    for source, names in {
        "demo": (
            "bank",
            "first",
            "spt",
            "llama-2-7b",
            "../other/folder",
        ),
        "one": ("spt-seed0", "spt-seed1"),
        "pt": ("pt-longer", "pt-same-size", "pt-seed0", "lora-seed0"),
    }.items():
        for name in names:
            shutil.copytree(f"runs/{source}", f"runs/{name}")
    # It is compared with a run that answers VALID.
    shutil.rmtree("runs/spt/generate")
    assert main(["generate", "runs/spt", *BRIEF.split(), "--set", f"data.test={folder}/VALID"]) == 0
    seed = Path("runs/spt-seed1/config.yaml")
    seed.write_text(seed.read_text().replace("seed: 0", "seed: 1"), encoding="utf-8")
    assert main(["export", "hub", "runs/demo", "shared/demo"]) == 0
    assert main(["export", "peft", "runs/one", "shared/demo-peft"]) == 0
    assert main(["export", "vllm", "runs/demo", "shared/demo-vllm"]) == 0
    reference, yaml = written(folder / "reference", states())
    (reference / "ds_ckpt").rename(folder / "ds_ckpt")
    yaml.rename(folder / "settings.yaml")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documents name; each block runs in a copy of it."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SPT_CACHE", str(folder / "cache"))
        bases_and_data(folder)
        page_files(folder)
        runs(folder)
    dist.shutdown()
    return folder


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in BLOCKS])
def test_a_block_runs(
    block: Block, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if test := ELSEWHERE.get(block.page):
        assert Path(block.page).name in (ROOT / test).read_text(encoding="utf-8")
        return
    place = tmp_path / "place"
    shutil.copytree(prepared, place, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.setenv("SPT_CACHE", str(prepared / "cache"))
    threads = torch.get_num_threads()
    shell = Shell(place, SHORT, monkeypatch)
    todo = list(commands(block.code))
    for command in todo:
        fresh(command)
    for command in todo:
        _, check = next(
            (entry for key, entry in CANNOT.items() if matches(key, command)),
            ("", Shell.run),
        )
        check(shell, command)
    torch.set_num_threads(threads)
    dist.shutdown()
    # So many copies would fill a disk; that of a block which fails is kept.
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(place)


def test_a_command_without_a_rule_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.fail.Exception, match="add it to CANNOT with the reason"):
        Shell(tmp_path, SHORT, monkeypatch).run("reboot now")


def test_commands_are_whole() -> None:
    text = "# why\na \\\n  b   # c\n\nX=1 d '\n e'\ncat > f <<'END'\ng 'h\nEND\ni\n"
    here = "cat > f <<'END'\ng 'h\nEND"
    assert list(commands(text)) == ["a \\\n  b   # c", "X=1 d '\n e'", here, "i"]
    assert words_of("X=1 a \\\n  b   # c") == ({"X": "1"}, ["a", "b"])


def test_the_tables_name_what_is_there() -> None:
    every = [command for block in BLOCKS for command in commands(block.code)]
    pages = {block.page for block in BLOCKS}
    stale = [key for key in CANNOT if not any(matches(key, command) for command in every)]
    words = [" ".join(ours(given) or given[1:]) for _, given in map(words_of, every) if given]
    stale += [key for key in SHORT if not any(re.search(key, line) for line in words)]
    assert not stale, f"no command of the documents matches: remove from the table {stale}"
    assert set(ELSEWHERE) <= pages
