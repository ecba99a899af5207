"""DeepSpeed files: the shipped ones load, plans hold what acts, each misuse gets its message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError
from spt_ds.placement.choose import choose_placement
from spt_ds.placement.ds_check import accumulation_steps, plan_of_file, plan_of_kind
from spt_ds.placement.ds_schema import DEEPSPEED_VERSION
from spt_ds.placement.memory import GIB, Memory
from tests.helpers.ds_files import config, load, plain_machine, problems, sizes, zero

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
__all__ = ["plain_machine"]  # a fixture
pytestmark = pytest.mark.usefixtures("plain_machine")

# --- plans


def test_five_files_are_shipped() -> None:
    names = [path.stem for path in SHIPPED]
    assert names == ["zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme", "zeropp"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [16, 32])
def test_shipped_file_loads(path: Path, world: int, bits: int) -> None:
    plan = plan_of_file(str(path), config(model={"base_bits": bits}), sizes(), world)
    assert (plan.stage, plan.offload) == {
        "zero2": (2, "none"),
        "zero3": (3, "none"),
        "zero3_offload_cpu": (3, "cpu"),
        "zero3_offload_nvme": (3, "nvme"),
        "zeropp": (3, "none"),
    }[path.stem]
    assert "auto" not in json.dumps(plan.engine_config)
    assert plan.engine_config.get("bf16") == (None if bits == 32 else {"enabled": True})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_takes_the_plan(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = plan_of_file(str(path), Config(), sizes(), 1)
    read = DeepSpeedConfig(plan.engine_config)
    assert read.zero_optimization_stage == plan.stage
    assert read.bfloat16_config.enabled
    offload = read.zero_config.offload_param
    assert ("none" if offload is None else offload.device) == plan.offload


def test_reading_imports_neither_torch_nor_deepspeed() -> None:
    sizes_of_base = {"hidden_size": 8, "num_attention_heads": 1, "n_layer": 1, "vocab_size": 9}
    file = str(ROOT / "ds_configs" / "zero3_offload_cpu.json")
    code = "\n".join(
        [
            "import sys",
            "from spt_ds.config.schema import Config",
            "from spt_ds.placement.ds_check import plan_of_file",
            "from spt_ds.placement.estimate import BaseShape",
            f"plan_of_file({file!r}, Config(), BaseShape.from_config({sizes_of_base!r}), 2)",
            "heavy = {'torch', 'deepspeed', 'transformers'}",
            "print(sorted(heavy & sys.modules.keys()))",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("placement", "stage", "offload"),
    [
        ("replicate", 0, "none"),
        ("zero3", 3, "none"),
        ("zero3_offload", 3, "cpu"),
        ("auto", 0, "none"),
    ],
)
def test_plan_without_a_file(placement: str, stage: int, offload: str) -> None:
    asked = config(engine={"placement": placement})
    plan = choose_placement(asked, sizes(), None, 2, Memory(64 * GIB, None)).zero
    assert (plan.stage, plan.offload) == (stage, offload)


def test_quantised_base_computes_in_bf16() -> None:
    assert plan_of_kind("zero3", config(model={"base_bits": 4}), 2).engine_config["bf16"] == {
        "enabled": True
    }


def test_file_decides_over_placement(tmp_path: Path) -> None:
    plan = load(tmp_path, zero(), config(engine={"placement": "replicate"}))
    assert plan.notes == (
        f"engine.placement is replicate, but {tmp_path / 'ds.json'} is given and decides: zero3",
    )
    assert load(tmp_path, zero(), config(engine={"placement": "zero3"})).notes == ()


@pytest.mark.parametrize(
    ("batch", "world", "micro", "steps"), [(32, 2, 4, 4), (10, 4, 2, 2), (3, 8, 4, 1)]
)
def test_accumulation_steps(batch: int, world: int, micro: int, steps: int) -> None:
    assert (
        accumulation_steps(config(train={"global_batch": batch, "micro_batch": micro}), world)
        == steps
    )


def test_a_budget_of_tokens_leaves_no_number_to_compare_with(tmp_path: Path) -> None:
    cfg = config(train={"micro_batch": 2, "micro_batch_tokens": 4096})
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        with pytest.raises(ConfigError, match=f"{key}: got 2, but train.micro_batch_tokens"):
            load(tmp_path, {**zero(), key: 2}, cfg)
        load(tmp_path, {**zero(), key: "auto"}, cfg)


def test_values_equal_to_the_yaml_pass(tmp_path: Path) -> None:
    owned = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
    }
    cfg = config(train={"global_batch": 10, "micro_batch": 2}, optim={"clip_norm": 0.5})
    plan = load(tmp_path, owned | zero(), cfg, world=4)
    # Only what DeepSpeed needs: its own product of batch, accumulation and ranks would not come out
    # for 10 over 4.
    assert sorted(plan.engine_config) == [
        "bf16",
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
    ]


def test_keys_without_effect_are_said_and_dropped(tmp_path: Path) -> None:
    plan = load(
        tmp_path, {"steps_per_print": 10, **zero(reduce_bucket_size=5e8), "aio": {"block_size": 1}}
    )
    assert plan.notes == (
        "aio has no effect without zero_optimization.offload_param.device nvme",
        (
            "accepted without effect here (docs/reference/deepspeed.md says why): steps_per_print, "
            "zero_optimization.reduce_bucket_size"
        ),
    )
    assert plan.engine_config["zero_optimization"] == {"stage": 3}
    assert "aio" not in plan.engine_config


def test_stage_two_replicates(tmp_path: Path) -> None:
    plan = load(tmp_path, {"zero_optimization": {"stage": 2, "overlap_comm": True}})
    assert plan.engine_config["zero_optimization"] == {"stage": 2}
    assert plan.notes[0] == "stage 2: each rank has a copy of the base and of what trains"
    assert plan.notes[1].endswith(": zero_optimization.overlap_comm")


def test_switched_off_sections_pass(tmp_path: Path) -> None:
    off: dict[str, Any] = {
        name: {"enabled": False} for name in ("fp16", "torch_autocast", "flops_profiler", "wandb")
    }
    off |= zero(offload_optimizer={"device": "none"}, zero_quantized_gradients=False)
    plan = load(tmp_path, off)
    assert plan.engine_config["zero_optimization"] == {"stage": 3}
    assert plan.notes == ()


# --- misuse

PRECISION = "precision is owned by model.base_bits of the YAML; the trainables are always fp32"
MISUSES: list[tuple[dict[str, Any], str]] = [
    ({"float16": {}}, "float16: unknown key; did you mean 'fp16'?"),
    (
        {"train_micro_batch_size_per_gpu ": 4},
        (
            "train_micro_batch_size_per_gpu : unknown key; did you mean"
            " 'train_micro_batch_size_per_gpu'?"
        ),
    ),
    (
        {"zero_optimisation": {}},
        "zero_optimisation: unknown key; did you mean 'zero_optimization'?",
    ),
    (
        zero(overlap_com=True),
        "zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
    ),
    (
        zero(prefetch_bucket_size=1),
        (
            "zero_optimization.prefetch_bucket_size: unknown key; did you mean"
            " 'stage3_prefetch_bucket_size'?"
        ),
    ),
    (
        zero(offload_param={"device": "cpu", "pin_memroy": True}),
        "zero_optimization.offload_param.pin_memroy: unknown key; did you mean 'pin_memory'?",
    ),
    ({"overlap_comm": True}, "overlap_comm: unknown key; it belongs in zero_optimization"),
    (
        {"train_batch_size": "32"},
        'train_batch_size: expected a whole number of 0 or more, got "32"',
    ),
    (
        {"train_batch_size": True},
        "train_batch_size: expected a whole number of 0 or more, got true",
    ),
    ({"zero_optimization": True}, "zero_optimization: expected an object {...}, got true"),
    (zero(overlap_comm=1), "zero_optimization.overlap_comm: expected true or false, got 1"),
    (
        zero(stage3_max_live_parameters=1.5),
        (
            "zero_optimization.stage3_max_live_parameters: expected a whole number"
            " of 0 or more, got 1.5"
        ),
    ),
    (
        zero(offload_param={"device": "disk"}),
        'zero_optimization.offload_param.device: expected "none" or "cpu" or "nvme", got "disk"',
    ),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        (
            "zero_optimization.offload_param: stage 2 ignores it; set zero_optimization.stage to 3,"
            " or remove it"
        ),
    ),
    (
        zero(offload_optimizer={"device": "cpu"}),
        (
            "zero_optimization.offload_optimizer: DeepSpeed holds no optimizer here: the"
            " trainables' Adam states (0.0 MB) stay with them on each rank; remove it"
        ),
    ),
    (
        {"optimizer": {"type": "AdamW"}},
        "optimizer: the optimizer is owned by the `optim` section of the YAML; remove it",
    ),
    (
        {"scheduler": {"type": "WarmupLR"}},
        "scheduler: the schedule is owned by optim.schedule and optim.warmup_steps; remove it",
    ),
    (
        {"fp16": {"enabled": True}},
        "fp16: fp16 is not supported: frozen bases run in bf16 or fp32 (model.base_bits)",
    ),
    (
        {"bf16": {"enabled": False}},
        (
            'bf16.enabled: got false, but model.base_bits of the YAML makes it true; write "auto"'
            " or change the YAML"
        ),
    ),
    (
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        (
            "torch_autocast: autocast computes the fp32 trainables in 16 bits (gradients 10 to 42"
            f" % off); {PRECISION}"
        ),
    ),
    (
        {"train_batch_size": 64},
        (
            'train_batch_size: got 64, but train.global_batch of the YAML makes it 32; write "auto"'
            " or change the YAML"
        ),
    ),
    (
        {"train_micro_batch_size_per_gpu": 1},
        (
            "train_micro_batch_size_per_gpu: got 1, but train.micro_batch of the YAML makes it 4;"
            ' write "auto" or change the YAML'
        ),
    ),
    (
        {"gradient_accumulation_steps": 1},
        (
            "gradient_accumulation_steps: got 1, but train.global_batch, train.micro_batch and the"
            ' number of ranks of the YAML makes it 4 (2 ranks); write "auto" or change the YAML'
        ),
    ),
    (
        {"gradient_clipping": 0.1},
        (
            'gradient_clipping: got 0.1, but optim.clip_norm of the YAML makes it 1.0; write "auto"'
            " or change the YAML"
        ),
    ),
    (
        zero(zero_hpz_partition_size=3),
        (
            "zero_optimization.zero_hpz_partition_size: 3 does not divide the 2 ranks; give the"
            ' number of ranks per host, or "auto"'
        ),
    ),
    (
        zero(zero_quantized_weights=True),
        (
            "zero_optimization.zero_quantized_weights: DeepSpeed's quantiser has no CPU version,"
            ' it needs a CUDA device; set it to false or "auto"'
        ),
    ),
    (
        zero(zero_quantized_gradients=True),
        (
            "zero_optimization.zero_quantized_gradients: DeepSpeed holds no gradient here: those of"
            " the trainables are reduced in fp32 without it; remove it"
        ),
    ),
    ({"pipeline": {"stages": 2}}, "pipeline: pipeline parallelism is not used; remove it"),
    ({"amp": {"enabled": True}}, f"amp: removed from DeepSpeed {DEEPSPEED_VERSION}"),
    (
        zero(cpu_offload_param=True),
        'zero_optimization.cpu_offload_param: deprecated; write "offload_param": {"device": "cpu"}',
    ),
]


@pytest.mark.parametrize(
    ("tree", "message"), MISUSES, ids=[message.split(":")[0] for _, message in MISUSES]
)
def test_misuse_is_named(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    assert problems(tmp_path, tree) == [message]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    tree = {
        "amp": {},
        "train_batch_size": 64,
        **zero(stag=3),
        "fp16": {"enabled": True, "los_scale": 1},
    }
    found = problems(tmp_path, tree)
    assert [line.split(":")[0] for line in found] == [
        "amp",
        "train_batch_size",
        "zero_optimization.stag",
        "fp16.los_scale",
        "fp16",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": 1\n "b": 2}', "ds.json:3: not valid JSON (column 2): Expecting ',' delimiter"),
        ("[]", "ds.json:1: expected an object of sections, got list"),
        (
            '{"aio": {}, "bf16": {}, "aio": {}}',
            "ds.json:1: not valid JSON (column 25): key 'aio' is given twice",
        ),
        (
            '{"gradient_clipping": NaN}',
            "ds.json:1: not valid JSON (column 23): NaN is no JSON number",
        ),
        (
            '{"gradient_clipping": Infinity}',
            "ds.json:1: not valid JSON (column 23): Infinity is no JSON number",
        ),
        ("[" * 500, "ds.json:1: not valid JSON (column 65): nested deeper than 64 levels"),
    ],
)
def test_malformed_text(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).endswith(message)


def test_infinite_number_is_no_whole_number(tmp_path: Path) -> None:
    assert problems(tmp_path, '{"steps_per_print": 1e999}') == [
        "steps_per_print: expected a whole number of 0 or more, got Infinity"
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none\.json: cannot read the DeepSpeed file: No such file"
    ):
        plan_of_file(str(tmp_path / "none.json"), Config(), sizes(), 2)
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"ds\.json: not UTF-8 text \(byte 7\)"):
        plan_of_file(str(tmp_path / "ds.json"), Config(), sizes(), 2)


def test_adam_states_are_named_in_mb(tmp_path: Path) -> None:
    cfg = config(prompts={"count": 4, "tokens": 50})
    tree = zero(offload_optimizer={"device": "cpu"})
    found = problems(tmp_path, tree, cfg, shape=sizes(hidden=1000))
    # 8 bytes for each of 4 * 50 * 1000 numbers of the bank and 2 * 1000 * 1001 of the retriever
    assert "the trainables' Adam states (17.6 MB) stay with them" in found[0]
