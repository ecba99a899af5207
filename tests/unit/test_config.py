"""Configuration: strict keys, every problem in one error, overrides, YAML's traps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_ds.cli import main as cli
from spt_ds.config.load import dump_config, key_paths, load_config, recipe_names
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.generate import BASE_ALONE, identity

ROOT = Path(__file__).resolve().parents[2]


def problem(text: str, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    return str(caught.value)


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    text = problem(
        "optim: {lrr: 1}\nprompts: {count: 0}\nlosses: {tau_gold: -1, tau: 2}\ntrain: {seed: x}\n",
        tmp_path,
    )
    assert "5 problem(s)" in text
    for part in (
        "optim.lrr: unknown key; did you mean 'lr'?",
        "prompts.count",
        "losses.tau_gold",
        "losses.tau:",
    ):
        assert part in text
    assert "train.seed" in text


def test_a_key_of_another_section_is_found(tmp_path: Path) -> None:
    assert "did you mean 'optim.warmup_steps'?" in problem("train: {warmup_steps: 3}\n", tmp_path)


def test_syntax_error_has_its_line(tmp_path: Path) -> None:
    assert "run.yaml:2: not valid YAML" in problem("name: a\nmodel: x: y\n", tmp_path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert "'lr' is given twice" in problem("optim:\n  lr: 1.0\n  lr: 2.0\n", tmp_path)


def test_a_control_character_has_its_line(tmp_path: Path) -> None:
    assert "run.yaml:2: not valid YAML: control character U+0007" in problem(
        "name: a\nmodel: {base: b\x07}\n", tmp_path
    )


def test_a_key_that_is_a_list_has_its_line(tmp_path: Path) -> None:
    assert "run.yaml:2: not valid YAML: a key must be a word" in problem(
        "name: a\n? [b]\n: c\n", tmp_path
    )


def test_a_folder_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").name == "demo"
    with pytest.raises(ConfigError, match="other: no such configuration file"):
        load_config("other")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(str(path))


def test_fault_10_integer_where_a_float_is_expected_is_taken() -> None:
    config = load_config("demo", ["losses.tau_gold=2", "losses.selection=1"])
    assert config.losses.tau_gold == 2.0
    assert isinstance(config.losses.selection, float)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert load_config("demo", [f"optim.lr={text}"]).optim.lr == 1e-4


def test_off_is_a_word_and_true_is_not() -> None:
    config = load_config("demo", ["model.activation_checkpointing=off", "engine.strict=true"])
    assert config.model.activation_checkpointing == "off"
    assert config.engine.strict is True


@pytest.mark.parametrize(
    "override", ["lr", "optim.lr", "=3", "optim..lr=3", "name.x=1", "optim.lr=[1"]
)
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config("demo", [override])


def test_unknown_recipe_and_missing_file() -> None:
    with pytest.raises(ConfigError, match="did you mean 'opt-125m'"):
        load_config("opt-125")
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["prompts.init=text"], "needs 1 or count"),
        (
            ["prompts.init=normal", "reference.unit_normal_prompts=true"],
            "prompts.init is normal, but reference.unit_normal_prompts draws",
        ),
        (["prompts.init_texts=[a]"], "only read with init: text"),
        (["losses.train_top_m=9"], "prompts.count = "),
        (["losses.objective=mixture"], "losses: objective: mixture has a loss of its own; set"),
        (["losses.objective=mixture"], "selection: 0 (got 1.0), fusion: 0 (got 1.0)"),
        (
            ["losses.temperature=2", "losses.balance=1"],
            "act only with objective: mixture; set temperature: 1.0 (got 2.0), balance: 0",
        ),
        (["retriever.keys=learned", "retriever.projections=shared"], "no projection of prompts"),
        (
            [
                "prompts.init=text",
                "prompts.init_texts=[a, b, c, d]",
                "prompts.warm_start_steps=3",
            ],
            "begins with one prompt for all, got 4 init_texts",
        ),
        (["generate.mode=fixed:9"], "prompts run from 0 to"),
        (["generate.mode=best"], "generate.mode"),
        (
            ["generate.do_sample=true", "generate.num_beams=2"],
            "generate: do_sample and num_beams exclude",
        ),
        (["generate.mode=fuse", "generate.num_beams=2"], "cannot beam"),
        (["generate.mode=fuse", "generate.perplexity=true"], "not defined for mode: fuse"),
        (["generate.mode=rank", "generate.num_beams=2"], "cannot beam"),
        (["generate.samples=2", "generate.do_sample=true"], "only with mode: rank"),
        (["generate.samples=2", "generate.mode=rank"], "do_sample: true"),
        (["generate.min_new_tokens=40"], "max_new_tokens only 32"),
        (["generate.temperature=0.7"], "temperature is 0.7, which acts only with do_sample: true"),
        (["generate.length_penalty=2"], "acts only with num_beams above 1"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas"),
        (["optim.lr=.inf"], "optim.lr"),
    ],
)
def test_values_that_do_not_fit_one_another(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    assert part in str(caught.value)


@settings(deadline=None)
@given(st.integers(1, 64), st.floats(1e-6, 10), st.sampled_from(["prefix", "suffix"]))
def test_dump_reads_back_to_the_same(count: int, tau: float, placement: str) -> None:
    config = load_config(
        "demo",
        [f"prompts.count={count}", f"losses.tau_sim={tau!r}", f"prompts.placement={placement}"],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(str(path)) == config


def test_key_paths_name_every_leaf() -> None:
    paths = list(key_paths(Config))
    assert "model.quant.block_size" in paths
    assert len(paths) == len(set(paths))


def test_cli_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["config"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    shipped = (path.stem for path in (ROOT / "spt_ds" / "recipes").rglob("*.yaml"))
    assert sorted(listed) == sorted(shipped) == recipe_names()
    assert cli(["config", "demo", "--set", "optim.lrr=1"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err
    assert cli(["config", "--schema"]) == 0
    assert '"properties"' in capsys.readouterr().out
    assert cli(["nonsense"]) == 2


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("model.base_bits=4", False),
        ("prompts.position=before_reply", False),
        ("losses.fusion_weights=normalised", False),
        ("prompts.warm_start_steps=3", False),
        ("generate.mode=random", False),
        ("train.seed=1", False),
        ("engine.placement=zero3", True),
        ("log.every_steps=3", True),
    ],
)
def test_replies_of_another_start_are_taken_over_only_from_the_same_work(
    override: str, same: bool
) -> None:
    plain, other = (
        identity(load_config("demo", given), "marker", "data") for given in ([], [override])
    )
    assert (plain == other) is same


@pytest.mark.parametrize("name", recipe_names())
def test_the_base_of_any_recipe_can_reply_alone(name: str) -> None:
    """`spt-ds generate --base-alone` resets all that only a bank of prompts can have."""
    assert load_config(name, list(BASE_ALONE)).method.type == "none"


def test_the_base_of_a_run_with_every_option_of_the_bank_can_reply_alone() -> None:
    texts = ["prompts.count=2", "prompts.init=text", "prompts.init_texts=[a, b]"]
    mixture = [
        "losses.objective=mixture",
        "losses.temperature=2",
        "losses.balance=0.1",
        *(f"losses.{name}=0" for name in ("selection", "fusion", "contrastive")),
    ]
    options = [*texts, "prompts.position=before_reply", "losses.train_top_m=2", *mixture]
    assert load_config("demo", options).prompts.init_texts == ("a", "b")
    assert load_config("demo", [*options, *BASE_ALONE]).prompts.count == 1
