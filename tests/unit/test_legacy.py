"""Configurations of 0.1.0 load and mean the same: those of two runs in `data/config_0.1.0`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.legacy import MOVED
from spt_ds.config.load import key_paths, load_config
from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError

RECORDED = Path(__file__).parents[1] / "data" / "config_0.1.0"


@pytest.mark.parametrize("name", ["demo", "reference"])
def test_a_recorded_configuration_is_that_of_its_recipe(name: str) -> None:
    text = (RECORDED / f"{name}.yaml").read_text(encoding="utf-8")
    assert all(f"  {old.rpartition('.')[2]}: " in text for old, _, _ in MOVED)
    # Younger than the recordings: the recipes of OPT admit pickles, and TensorBoard is the default.
    today = load_config(name, ["model.allow_pickle=false", "log.trackers=[]"])
    assert load_config(str(RECORDED / f"{name}.yaml")) == today


def test_every_new_key_is_an_option() -> None:
    assert {new for _, new, _ in MOVED} <= set(key_paths(Config))


CASES = [
    ("prompts.init=reference", "unit_normal_prompts", True),
    ("retriever.activation=reference", "jumping_activation", True),
    ("retriever.pool=padded_text", "padded_pool", True),
    ("retriever.pool_length_tokens=300", "pool_length_tokens", 300),
    ("losses.mask=nonzero", "nonzero_mask", True),
]


@pytest.mark.parametrize(("override", "key", "value"), CASES)
def test_an_old_key_means_the_new_one(override: str, key: str, value: Any) -> None:
    changed, plain = load_config("demo", [override]), load_config("demo")
    assert getattr(changed.reference, key) == value != getattr(plain.reference, key)
    expected = {**plain.reference.model_dump(), key: value}
    assert changed.model_dump() == {**plain.model_dump(), "reference": expected}


def test_the_later_override_counts_whichever_way_it_is_written() -> None:
    old = str(RECORDED / "reference.yaml")
    assert not load_config(old, ["reference.padded_pool=false"]).reference.padded_pool
    assert not load_config("reference", ["retriever.pool=context"]).reference.padded_pool
    both = ["reference.padded_pool=false", "retriever.pool=padded_text"]
    assert load_config("demo", both).reference.padded_pool
    assert not load_config("demo", both[::-1]).reference.padded_pool


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("losses: {mask: nonzero}\nreference: {nonzero_mask: false}\n", "losses.mask: unknown key"),
        ("retriever: {pool: both}\n", "retriever.pool: unknown key"),
        ("retriever: {pool: [padded_text]}\n", "retriever.pool: unknown key"),
        ("prompts: {init: uniform}\n", "prompts.init"),
        ("losses: {mask: nonzero}\nreference: 3\n", "reference"),
    ],
)
def test_what_the_table_does_not_know_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert part in str(caught.value)
