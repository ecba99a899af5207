"""Every key of a DeepSpeed file (0.19.8) and what it does here, as plain data.

DeepSpeed wraps the frozen base alone (ZeRO-3 sharding and offload). It owns no gradient, optimizer,
schedule, batch or precision: the YAML does. So a key has one of four uses: it `acts`; it repeats a
value of the `yaml`; it is `inert` (accepted and said); or it is `refused`, where passing over it
would mislead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEEPSPEED_VERSION = "0.19.8"

Kind = Literal["bool", "int", "number", "string", "list", "section", "any"]


@dataclass(frozen=True)
class Key:
    """One known key: the type of its value, its use, and the reason or effect in words."""

    kind: Kind
    use: Literal["acts", "yaml", "inert", "refused"]
    why: str = ""
    choices: tuple[str, ...] = ()


Table = dict[str, Key]


def _acts(kind: Kind, why: str = "", choices: tuple[str, ...] = ()) -> Key:
    return Key(kind, "acts", why, choices)


def _yaml(kind: Kind, path: str) -> Key:
    return Key(kind, "yaml", path)


def _inert(kind: Kind, why: str) -> Key:
    return Key(kind, "inert", why)


def _refused(why: str, kind: Kind = "any") -> Key:
    return Key(kind, "refused", why)


NO_GRADIENT = (
    "DeepSpeed holds no gradient here: those of the trainables are reduced in fp32 without it"
)
NO_STEP = "DeepSpeed's own forward and step are not called"
NO_OPTIMIZER = "DeepSpeed holds no optimizer here"
NO_SAVE = "checkpoints hold the trainables only and are written without DeepSpeed"
_MONITOR = (
    "DeepSpeed's monitors write in its own step, which is not called; use the `log` section of the"
    " YAML"
)
_REMOVED = f"removed from DeepSpeed {DEEPSPEED_VERSION}"
_PRECISION = "precision is owned by model.base_bits of the YAML; the trainables are always fp32"
_DEPRECATED = "deprecated; write"

OFFLOAD_PARAM: Table = {
    "device": _acts("string", "where the shards of the base live", ("none", "cpu", "nvme")),
    "nvme_path": _acts(
        "string", "folder on a local disk; auto: $SPT_NVME_PATH, else the temporary folder"
    ),
    "buffer_count": _acts("int", "host buffers for shards on their way from and to disk"),
    "buffer_size": _acts(
        "int", "elements of one buffer; at least the largest shard of one parameter; auto fits it"
    ),
    "max_in_cpu": _inert("int", "DeepSpeed reads it, but nothing in its parameter swapper uses it"),
    "pin_memory": _acts("bool", "page-locked host memory"),
}
OFFLOAD_OPTIMIZER: Table = {
    "device": _acts("string", "", ("none", "cpu", "nvme")),
    **{
        name: _inert("any", NO_OPTIMIZER)
        for name in ("nvme_path", "buffer_count", "pin_memory", "pipeline_read")
    },
    **{
        name: _inert("any", NO_OPTIMIZER)
        for name in ("pipeline_write", "fast_init", "ratio", "super_offload")
    },
    "cpuadam_cores_perc": _inert("any", NO_OPTIMIZER),
}
ZERO: Table = {
    "stage": _acts("int", "0 to 2: a copy of the base on each rank; 3: shards"),
    "overlap_comm": _acts("bool", "gather on a stream of its own"),
    "offload_param": _acts("section", "shards in host memory or on disk"),
    "stage3_prefetch_bucket_size": _acts("int", "elements gathered ahead of use"),
    "stage3_param_persistence_threshold": _acts(
        "int", "parameters with fewer elements are not sharded"
    ),
    "stage3_model_persistence_threshold": _acts(
        "int", "upper bound of all elements that are not sharded"
    ),
    "stage3_max_live_parameters": _acts("int", "gathered elements kept before release"),
    "stage3_max_reuse_distance": _acts(
        "int", "a parameter used again within so many elements stays gathered"
    ),
    "stage3_module_granularity_threshold": _acts("int", "modules of fine grain are gathered whole"),
    "stage3_use_all_reduce_for_fetch_params": _acts("bool", "gather by all-reduce"),
    "stage3_allgather_sequential": _acts("bool", "gather parameter by parameter"),
    "zero_hpz_partition_size": _acts(
        "int",
        "ranks that hold a second sharded copy; auto, the default: those of a host, if it fits",
    ),
    "zero_quantized_weights": _acts(
        "bool", "gather in int8; CUDA only, 16-bit bases only; auto: where it works"
    ),
    "memory_efficient_linear": _acts("bool", "linear layers that save no gathered weight"),
    "override_module_apply": _acts("bool", "Module.apply gathers"),
    "log_trace_cache_warnings": _acts("bool", "say when the prefetch trace is rebuilt"),
    "enable_sanity_checks": _acts("bool", "DeepSpeed's own checks"),
    "leaf_module": _acts("section", "modules that are gathered whole"),
    "offload_optimizer": _refused(NO_OPTIMIZER, "section"),
    "zero_quantized_nontrainable_weights": _refused(
        "DeepSpeed makes the int8 shards in its ZeRO-3 optimizer, and holds none here; remove it"
        " and use model.base_bits 8 or 4",
        "bool",
    ),
    "zero_quantized_gradients": _refused(NO_GRADIENT + "; remove it", "bool"),
    "zenflow": _refused(NO_OPTIMIZER + "; remove it"),
    "cpu_offload": _refused(f"{_DEPRECATED} offload_optimizer, which has no effect here either"),
    "cpu_offload_param": _refused(f'{_DEPRECATED} "offload_param": {{"device": "cpu"}}'),
    "cpu_offload_use_pin_memory": _refused(f"{_DEPRECATED} pin_memory inside offload_param"),
    "stage3_gather_fp16_weights_on_model_save": _refused(f"{_DEPRECATED} nothing: {NO_SAVE}"),
    "mics_shard_size": _refused(_REMOVED),
    "mics_hierarchical_params_gather": _refused(_REMOVED),
    "zeropp_loco_param": _refused(_REMOVED),
    **{
        name: _inert("bool", NO_GRADIENT)
        for name in ("contiguous_gradients", "reduce_scatter", "compute_grad_norm")
    },
    "use_multi_rank_bucket_allreduce": _inert("bool", NO_GRADIENT),
    "reduce_bucket_size": _inert("int", NO_GRADIENT),
    "round_robin_gradients": _inert("bool", NO_GRADIENT),
    "ignore_unused_parameters": _inert("bool", NO_GRADIENT),
    "allgather_partitions": _inert("bool", NO_OPTIMIZER),
    "allgather_bucket_size": _inert("int", NO_OPTIMIZER),
    "sub_group_size": _inert("int", NO_OPTIMIZER),
    "legacy_stage1": _inert("bool", NO_OPTIMIZER),
    "parameter_alignment": _inert("bool", NO_OPTIMIZER),
    "save_muon_momentum_buffer_in_memory": _inert("bool", NO_OPTIMIZER),
    "load_from_fp32_weights": _inert("bool", NO_SAVE),
    "elastic_checkpoint": _inert("bool", NO_SAVE),
    "pipeline_loading_checkpoint": _inert("bool", NO_SAVE),
    "stage3_gather_16bit_weights_on_model_save": _inert("bool", NO_SAVE),
}
TOP: Table = {
    "zero_optimization": _acts("section", "sharding and offload of the frozen base"),
    "aio": _acts("section", "disk requests of NVMe offload"),
    "comms_logger": _acts("section", "with verbose: print DeepSpeed's collectives"),
    "dump_state": _acts("bool", "print the resolved DeepSpeed configuration"),
    "log_level": _acts(
        "string", "level of DeepSpeed's logger", ("debug", "info", "warning", "error", "critical")
    ),
    "disable_python_gc": _acts("bool", "stop Python's garbage collector in this process"),
    "bf16": _yaml("section", "model.base_bits"),
    "train_batch_size": _yaml("int", "train.global_batch"),
    "train_micro_batch_size_per_gpu": _yaml("int", "train.micro_batch"),
    "gradient_accumulation_steps": _yaml(
        "int", "train.global_batch, train.micro_batch and the number of ranks"
    ),
    "gradient_clipping": _yaml("number", "optim.clip_norm"),
    "fp16": _refused(
        "fp16 is not supported: frozen bases run in bf16 or fp32 (model.base_bits)", "section"
    ),
    "torch_autocast": _refused(
        "autocast computes the fp32 trainables in 16 bits (gradients 10 to 42 % off); "
        + _PRECISION,
        "section",
    ),
    "data_types": _refused(_PRECISION, "section"),
    "optimizer": _refused(
        "the optimizer is owned by the `optim` section of the YAML; remove it", "section"
    ),
    "scheduler": _refused(
        "the schedule is owned by optim.schedule and optim.warmup_steps; remove it", "section"
    ),
    "activation_checkpointing": _refused(
        "DeepSpeed's checkpointing is not used; set model.activation_checkpointing"
    ),
    "flops_profiler": _refused(NO_STEP + ", so it would profile nothing; remove it"),
    "checkpoint": _refused(NO_SAVE + "; see the `checkpoint` section of the YAML"),
    "datastates_ckpt": _refused(NO_SAVE + "; remove it"),
    "data_efficiency": _refused(
        "DeepSpeed's data sampling is not used; see the `data` section of the YAML"
    ),
    "tensor_parallel": _refused("the base is sharded by ZeRO only; remove it"),
    "expert_parallel": _refused("mixture-of-experts placement is not used; remove it"),
    "use_data_before_expert_parallelism": _refused(
        "mixture-of-experts placement is not used; remove it"
    ),
    "pipeline": _refused("pipeline parallelism is not used; remove it"),
    "sequence_parallel_size": _refused("sequence parallelism is not used; remove it"),
    "hybrid_engine": _refused("generation runs through the training engine; remove it"),
    "weight_quantization": _refused(
        "the base is quantised by model.base_bits and model.quant; remove it"
    ),
    "compile": _refused("DeepCompile is not used; remove it"),
    "autotuning": _refused("the autotuner starts runs of its own; use `spt-ds plan` for placement"),
    **{name: _refused(_MONITOR) for name in ("tensorboard", "wandb", "csv_monitor", "comet")},
    **{
        name: _refused(_REMOVED)
        for name in ("nebula", "compression_training", "amp", "quantize_training")
    },
    **{
        name: _refused(_REMOVED)
        for name in ("sparse_gradients", "eigenvalue", "sparse_attention", "elasticity")
    },
    **{
        name: _refused(_REMOVED)
        for name in ("graph_harvesting", "curriculum_learning", "progressive_layer_drop")
    },
    "steps_per_print": _inert("int", NO_STEP),
    "wall_clock_breakdown": _inert("bool", NO_STEP),
    "memory_breakdown": _inert("bool", NO_STEP),
    "timers": _inert("any", NO_STEP),
    "managed_gradient_accumulation": _inert("bool", NO_STEP),
    "dataloader_drop_last": _inert("bool", "batches are made without DeepSpeed"),
    "vocabulary_size": _inert("int", "DeepSpeed only warns by it"),
    "communication_data_type": _inert("string", NO_GRADIENT),
    "seq_parallel_communication_data_type": _inert("string", NO_GRADIENT),
    "prescale_gradients": _inert("bool", NO_GRADIENT),
    "gradient_predivide_factor": _inert("number", NO_GRADIENT),
    "gradient_allreduce_op": _inert("string", NO_GRADIENT),
    "disable_allgather": _inert("bool", NO_GRADIENT),
    "zero_allow_untested_optimizer": _inert("bool", NO_OPTIMIZER),
    "zero_force_ds_cpu_optimizer": _inert("bool", NO_OPTIMIZER),
}
SECTIONS: dict[str, Table] = {
    "": TOP,
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "zero_optimization.leaf_module": {
        name: _acts("list") for name in ("classes", "names", "name_suffixes")
    },
    "aio": {
        "block_size": _acts("int", "bytes of one request"),
        "queue_depth": _acts("int", "requests in flight"),
        "intra_op_parallelism": _acts("int", "threads of one read or write"),
        "single_submit": _acts("bool", "submit requests one by one"),
        "overlap_events": _acts("bool", "submit while others finish"),
        "use_gds": _acts("bool", "GPU-direct storage; CUDA only"),
    },
    "comms_logger": {
        **{name: _acts("bool") for name in ("enabled", "prof_all", "verbose", "debug")},
        "prof_ops": _acts("list"),
    },
    "bf16": {
        "enabled": _yaml("bool", "model.base_bits"),
        "immediate_grad_update": _inert("bool", NO_GRADIENT),
        "check_grad_overflow": _inert("bool", NO_GRADIENT),
        "bf16_master_weights_and_grads": _inert("bool", NO_OPTIMIZER),
        "bf16_optimizer_states": _inert("bool", NO_OPTIMIZER),
    },
    "fp16": {
        "enabled": _acts("bool"),
        **{
            name: _inert("any", NO_GRADIENT)
            for name in ("auto_cast", "loss_scale", "initial_scale_power")
        },
        **{
            name: _inert("any", NO_GRADIENT)
            for name in ("loss_scale_window", "hysteresis", "min_loss_scale")
        },
        **{
            name: _inert("any", NO_GRADIENT)
            for name in ("consecutive_hysteresis", "fp16_master_weights_and_grads")
        },
    },
    "torch_autocast": {
        "enabled": _acts("bool"),
        **{name: _inert("any", NO_GRADIENT) for name in ("dtype", "lower_precision_safe_modules")},
    },
}
# Names that people carry over from elsewhere and that no spelling distance would find.
OTHER_NAMES = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "zero": "zero_optimization",
    "batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "nvme_dir": "nvme_path",
}
