"""DeepSpeed around the frozen base: the only place that calls it. Without ZeRO-3 these are no-ops.

Way (d): the engine wraps the base alone, without an optimizer, so ZeRO-3 shards, gathers and
offloads frozen weights and knows nothing of the trainables. They stay whole, in fp32, on every rank
(see docs/architecture.md).
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spt_ds import dist
from spt_ds.errors import EngineError
from spt_ds.files import STALE_LOCK_S, build_locks
from spt_ds.log import say_once
from spt_ds.model.compiled import layer_classes
from spt_ds.placement.zero_plan import ZeroPlan


class Sharding:
    """Keeps what ZeRO-3 needs alive, from before the base is loaded until the run ends."""

    def __init__(self, plan: ZeroPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        # While it lives `from_pretrained` shards, anywhere in the process.
        self._loading: Any = None
        self._engine: Any = None

    @property
    def on(self) -> bool:
        """True when the base is sharded (ZeRO-3)."""
        return self.plan.stage == 3

    def before_load(self) -> None:
        """Start DeepSpeed's communication; `from_pretrained` shards each weight from now on."""
        if not self.on:
            return
        if self.plan.offload == "nvme":
            dist.agreed(check_build_locks)
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        import deepspeed
        from deepspeed.runtime.zero import utils as zero_utils
        from deepspeed.utils import logger
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        logger.setLevel(logging.WARNING)
        # It calls torch's collectives by their old names.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # It warns of outputs in which it finds no tensors: only the root returns such, and the root
        # owns no weights.
        zero_utils.warned = True
        # Compiled inside init_distributed on a CPU, for minutes, and of no use between processes
        # that gloo connects.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
        self._loading = HfDeepSpeedConfig(self.plan.engine_config)

    def close(self) -> None:
        """Remove what DeepSpeed leaves on an NVMe disk."""
        self.plan.remove_swap_files()

    def shard_function(self) -> Callable[[nn.Module], None] | None:
        """Return a function that shards one module, for bases that are loaded layer by layer."""
        if not self.on:
            return None
        import deepspeed
        from deepspeed.utils import groups

        nvme, swapper = self.plan.offload == "nvme", None

        def shard(module: nn.Module) -> None:
            nonlocal swapper
            if nvme:
                _rename_bytes(module)
            # The groups of a second copy per host can be made once only: the first call makes them.
            # So is the disk's swapper, which empties its folder when it is made.
            made = deepspeed.zero.Init(
                module=module,
                config_dict_or_path=self.plan.engine_config,
                zero_param_parallel_group=groups._ZERO_PARAM_INTRA_PARALLEL_GROUP,
                param_swapper=swapper,
            )
            swapper = made.param_swapper if nvme else None

        return shard

    def wrap(self, root: nn.Module) -> nn.Module:
        """Hand the loaded base to DeepSpeed; calls of the root that is returned gather weights."""
        if not self.on:
            return root.to(self.device)
        import deepspeed

        for module in root.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear
        if self.plan.offload != "nvme":  # its swapper has buffers for a few weights at a time
            _gather_whole_layers(root)
        self._engine = deepspeed.initialize(model=root, config=self.plan.engine_config)[0]
        self._loading = None
        # The engine's own forward refuses a plain `loss.backward()`; the module has the hooks that
        # gather and release.
        wrapped: nn.Module = self._engine.module
        return wrapped


def _gather_whole_layers(root: nn.Module) -> None:
    """Let DeepSpeed gather and release each decoder layer as one.

    Its hooks cost the host time in every module that they are in. A layer has a dozen modules, and
    they all compute together: one gather of all its weights waits no longer than the first of many.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if names := layer_classes(root):
        set_z3_leaf_modules(root, names, raise_if_not_found=False)


def _rename_bytes(module: nn.Module) -> None:
    """Let DeepSpeed see packed bytes as 16-bit numbers; `QuantLinear` reads them as bytes again.

    Its swapper gives back everything in the one dtype of its disk buffers, and would turn each byte
    into a number. The same bits under that dtype's name are only ever copied.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dtype == torch.uint8:
            setattr(module, name, nn.Parameter(parameter.view(torch.bfloat16), requires_grad=False))


class FrozenLinear(nn.Linear):
    """The linear layer of a sharded base: it keeps nothing for the backward pass.

    DeepSpeed replaces `functional.linear` by one that keeps every layer's input, which only a
    weight's gradient needs, and that rounds a 16-bit layer with bias twice. The plain one would
    keep the gathered weight.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _KeepNothing.apply(input, self)
        return out


class _KeepNothing(torch.autograd.Function):
    """ZeRO-3's hooks gather the layer's weight before its backward pass, which reads it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return torch.ops.aten.linear(x, layer.weight, layer.bias)  # what DeepSpeed did not replace

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.weight, None


def local_bytes(root: nn.Module) -> int:
    """Bytes of the base's weights that this rank owns."""
    total = 0
    for parameter in root.parameters():
        owned = getattr(parameter, "ds_tensor", parameter)
        total += owned.numel() * owned.element_size()
    return total


def check_build_locks() -> None:
    """Wait for extensions that another process builds.

    Raises EngineError for a lock that a killed build left: DeepSpeed itself would wait for it for
    ever, without a word.
    """
    from torch.utils.cpp_extension import get_default_build_root

    build_root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    while locks := build_locks(build_root):
        for lock, age_s in locks:
            if age_s > STALE_LOCK_S:
                raise EngineError(
                    f"{lock}: a build lock is {age_s / 60:.0f} minutes old; a killed build left it"
                    " and every start would wait for it without end. Delete the file if no compiler"
                    " is running"
                )
            say_once(
                f"waiting for another process to build {lock.parent.name}, {STALE_LOCK_S / 60:.0f}"
                f" minutes at most; if none is running, delete {lock}",
                logging.WARNING,
            )
        time.sleep(1.0)
