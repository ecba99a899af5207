"""What trains in the place of soft prompts: adapters in the base, all of the base, or nothing.

LoRA is Hu et al. 2021. To losses, rows and decoding a baseline is a bank of one empty prompt that
always answers: nothing else of the method knows of it. Legend: D embedding size, B examples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from spt_ds.config.method import LoraConfig
from spt_ds.config.schema import Config
from spt_ds.errors import ModelError
from spt_ds.model.backbone import Backbone
from spt_ds.model.prompt_bank import PromptBank
from spt_ds.model.spt import Trainables


class BaseTrainables(Trainables):
    """Those parameters of the base that train, under the names they have there."""

    def __init__(self, backbone: Backbone) -> None:
        device = backbone.lm.get_input_embeddings().weight.device
        bank = PromptBank(torch.zeros(1, 0, backbone.embed_size, device=device))
        super().__init__(bank, OnlyPrompt())
        # nn.Module does not register what a dict holds: the base stays the child of its own root.
        self._trained = {
            name: weight for name, weight in backbone.lm.named_parameters() if weight.requires_grad
        }

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains; the empty prompt, which holds no numbers, is left out."""
        for name, parameter in self._trained.items():
            yield f"{prefix}.{name}" if prefix else name, parameter


class OnlyPrompt(nn.Module):
    """The retriever of a bank of one prompt."""

    def forward(self, bank: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """pooled [B, D] -> scores [1, B] of 1: a fusion by them leaves the logits as they are."""
        return pooled.new_ones(1, len(pooled))


def build_base_trainables(config: Config, backbone: Backbone, seed: int) -> BaseTrainables:
    """Make the weights of `method.type` trainable in a base that is whole, alike on all ranks.

    Raises ModelError where the adapters do not fit the base or peft is missing.
    """
    kind = config.method.type
    if kind == "full":
        backbone.lm.requires_grad_(True)
    elif kind == "lora":
        add_adapters(backbone.lm, config.method.lora, torch.Generator().manual_seed(seed))
    return BaseTrainables(backbone)


def add_adapters(lm: nn.Module, settings: LoraConfig, generator: torch.Generator) -> None:
    """Put peft's adapters into the linear layers of `lm`, in fp32.

    A is drawn as peft draws it, but from `generator`; B is zero.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise ModelError(
            f"method.type: lora needs the peft package, which cannot be imported ({error}); install"
            " the extra `baselines`, or choose another method.type"
        ) from error
    asked = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets) or None,
        lora_dropout=0.0,
    )
    inner = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear)]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in inner}))
    try:
        inject_adapter_in_model(asked, lm)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"method.lora.targets: {list(settings.targets) or 'peft has no choice of its own'} does"
            f" not fit {type(lm).__name__} ({str(error).splitlines()[0]}); its linear layers are"
            f" {kinds}"
        ) from error
    for name, module in lm.named_modules():
        if isinstance(module, Linear):
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
            bound = first.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
            drawn = torch.empty(first.shape).uniform_(-bound, bound, generator=generator)
            # `.data`, because peft made them in the dtype of the base: fp32 is another dtype.
            first.data = drawn.to(first.device)
            second.data = torch.zeros_like(second, dtype=torch.float32)
        elif hasattr(module, "lora_A"):
            raise ModelError(
                f"method.lora.targets: {name} is no plain linear layer; choose among {kinds}"
            )
