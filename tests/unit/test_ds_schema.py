"""The table of DeepSpeed's keys: it is DeepSpeed's own, finds each typo, and is in the document."""

from __future__ import annotations

import enum
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_ds.placement.ds_schema import DEEPSPEED_VERSION, OTHER_NAMES, SECTIONS, ZERO
from tests.helpers.ds_files import problems

ROOT = Path(__file__).resolve().parents[2]


def test_zero_table_is_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig as OffloadOptimizer,
    )
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadParamConfig as OffloadParam,
    )

    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    for model, section, gone in [
        (DeepSpeedZeroConfig, "zero_optimization", removed),
        (OffloadParam, "zero_optimization.offload_param", set()),
        (OffloadOptimizer, "zero_optimization.offload_optimizer", set()),
        (DeepSpeedZeroLeafModuleConfig, "zero_optimization.leaf_module", set()),
    ]:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        assert set(fields) == set(SECTIONS[section]) - gone
        for name, field in fields.items():
            key = SECTIONS[section][name]
            if key.kind in ("bool", "int"):
                assert _kind(field.annotation) == key.kind, name


def _kind(annotation: Any) -> str:
    """`bool` or `int` of an annotation: Optional[bool] and an int enumeration count as what they
    hold.
    """
    kinds = [
        kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)
    ]
    (kind,) = kinds
    return "int" if issubclass(kind, enum.Enum) and issubclass(kind, int) else str(kind.__name__)


def test_removed_keys_are_deepspeeds_own() -> None:
    from deepspeed.runtime import config as theirs

    def ours(section: str) -> set[str]:
        return {
            name
            for name, key in SECTIONS[section].items()
            if key.why.startswith("removed from DeepSpeed")
        }

    assert ours("") == set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert ours("zero_optimization") == set(theirs._REMOVED_ZERO_CONFIG_KEYS)


def test_precision_and_disk_tables_are_deepspeeds_own() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(SECTIONS["bf16"]) == set(DeepSpeedBF16Config.model_fields)
    assert set(SECTIONS["fp16"]) == set(DeepSpeedFP16Config.model_fields)
    assert set(SECTIONS["comms_logger"]) == set(CommsLoggerConfig.model_fields)
    assert set(SECTIONS["aio"]) == set(AIO_DEFAULT_DICT)


def test_top_level_knows_every_key_deepspeed_reads() -> None:
    """DeepSpeed has a constant and a default for each key it reads; all but those of refused
    sections are known.
    """
    from deepspeed.runtime import constants

    values = vars(constants)
    read = {
        value
        for key, value in values.items()
        if f"{key}_DEFAULT" in values and isinstance(value, str)
    }
    assert len(read) > 30
    refused = {
        "optimizer": {"type", "params", "legacy_fusion", "max_grad_norm"},
        "checkpoint": {
            "tag_validation",
            "load_universal",
            "use_node_local_storage",
            "pipeline_stage",
        },
        "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
        "no key of the file": {"check_overflow"},
    }
    known = {name for table in SECTIONS.values() for name in table}.union(*refused.values())
    assert read - known == set()


KEYS = [(section, name) for section, table in SECTIONS.items() for name in table]
LETTERS = "abcdefghijklmnopqrstuvwxyz_0123456789 "


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str, str]:
    """A section, a known key of it, and that key with one character left out, put in, changed or
    swapped.
    """
    section, key = draw(st.sampled_from(KEYS))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(LETTERS))
    edits = [
        key[:at] + key[at + 1 :],
        key[:at] + letter + key[at:],
        key[:at] + letter + key[at + 1 :],
    ]
    edits.append(key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :])
    return section, key, draw(st.sampled_from(edits))


@settings(max_examples=600, deadline=None)
@given(typos())
def test_typo_is_suggested_or_known(
    tmp_path_factory: pytest.TempPathFactory, typo: tuple[str, str, str]
) -> None:
    section, key, written = typo
    if written in SECTIONS[section]:
        return
    tree: Any = {written: 1}
    for part in reversed(section.split(".") if section else []):
        tree = {part: tree}
    found = problems(tmp_path_factory.mktemp("typo"), tree)
    path = f"{section}.{written}" if section else written
    (line,) = [
        line for line in found if re.match(re.escape(path.strip()) + r"\s*: unknown key; ", line)
    ]
    assert f"'{key}'" in line


def test_other_names_are_no_known_keys() -> None:
    known = {name for table in SECTIONS.values() for name in table}
    assert not known & set(OTHER_NAMES)
    assert set(OTHER_NAMES.values()) <= known


def test_document_names_every_key() -> None:
    text = (ROOT / "docs" / "reference" / "deepspeed.md").read_text(encoding="utf-8")
    assert DEEPSPEED_VERSION in text
    top_and_zero = [name for section in ("", "zero_optimization") for name in SECTIONS[section]]
    assert [name for name in top_and_zero if f"`{name}`" not in text] == []
    effects = [f"| `{name}` | {key.why} |" for name, key in ZERO.items() if key.use == "acts"]
    assert [row for row in effects if row not in text] == []
