"""Products in FP8: against float64, row by row, and what they do to the loss of a real base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spt_ds import dist
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.data.loader import eval_batches
from spt_ds.data.sampler import MicroSize
from spt_ds.engine.engine import Engine
from spt_ds.engine.session import open_split, open_untrained
from spt_ds.errors import ConfigError, ModelError
from spt_ds.model.fp8 import Fp8Linear, multiply_in_fp8, product, scaled
from tests.distributed.scenes import windows

IN, OUT, ROWS = 96, 160, 40
BF16 = 2.0**-8  # of a number, rounded once
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def layer(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(IN, OUT, bias=bias).to(torch.bfloat16).requires_grad_(False)
    made.weight[3] *= 50  # rows of unlike sizes
    return made


def rows(seed: int = 1) -> torch.Tensor:
    drawn = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(seed))
    drawn[5] *= 1000
    drawn[6] = 0
    return drawn.to(torch.bfloat16)


def twin(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float64 of numbers that are rounded to e4m3, each row at its own scale."""

    def rounded(each: torch.Tensor) -> torch.Tensor:
        scale = each.double().abs().amax(dim=1, keepdim=True).float() / 448
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return (each.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()

    return rounded(x) @ rounded(weight).T


def distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Gap of each row, relative to its norm."""
    norms = expected.norm(dim=1).clamp_min(1e-30)
    return (found.double() - expected).norm(dim=1) / norms


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    plain, x = layer(bias=False), rows()
    found = Fp8Linear(plain)(x)
    assert found.dtype == torch.bfloat16
    assert distances(found, twin(x, plain.weight)).max() < BF16
    off = distances(found, x.double() @ plain.weight.double().T).median()
    assert 0.01 < off < 0.05  # three bits of mantissa


def test_gradients_go_through_the_transpose() -> None:
    plain, x = layer(), rows().requires_grad_()
    slope = rows(seed=2)[:, :1].repeat(1, OUT) + torch.randn(ROWS, OUT).to(torch.bfloat16)
    replaced = Fp8Linear(plain)
    replaced(x).backward(slope)
    assert x.grad is not None
    assert distances(x.grad, twin(slope, plain.weight.T)).max() < BF16
    assert all(parameter.grad is None for parameter in replaced.parameters())


def test_a_row_does_not_know_its_companions() -> None:
    x, weight = rows(), scaled(layer().weight)
    together = product(x, weight)
    for n in (0, 5, 7):
        assert torch.equal(product(x[n : n + 1], weight)[0], together[n])
    assert torch.equal(together[6], torch.zeros_like(together[6]))


def test_a_layer_takes_the_bytes_of_16_bits() -> None:
    plain = layer()
    bytes_of = [
        sum(p.numel() * p.element_size() for p in module.parameters())
        for module in (plain, Fp8Linear(plain))
    ]
    assert bytes_of[1] == bytes_of[0] + 4 * (IN + OUT)  # the scales


def test_layers_that_do_not_fit_stay() -> None:
    base = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 50), nn.Embedding(4, 32))
    multiply_in_fp8(base, CPU)
    assert [type(module) for module in base] == [Fp8Linear, nn.Linear, nn.Embedding]
    with pytest.raises(ModelError, match="no linear layer whose sizes are multiples of 16"):
        multiply_in_fp8(nn.Sequential(nn.Linear(10, 10)), CPU)


def test_an_older_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ModelError, match=r"capability 8\.9 or more, got 8\.0"):
        multiply_in_fp8(nn.Sequential(layer()), torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["model.base_bits=4"], "base_matmul is fp8, .* and base_bits is 4; set base_bits: 16"),
        (
            [
                *("method.type=lora", "prompts.count=1", "prompts.tokens=0", "losses.fusion=0"),
                *("losses.selection=0", "losses.contrastive=0"),
            ],
            "method.type: lora trains weights of the base, and model.base_matmul is fp8",
        ),
    ],
)
def test_what_does_not_go_together_is_named(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("demo", ["model.base_bits=16", "model.base_matmul=fp8", *options])


def test_a_sharded_base_is_refused() -> None:
    config = load_config("demo", ["model.base_bits=16", "model.base_matmul=fp8"])
    with pytest.raises(ConfigError, match="needs the whole base on each rank, and this run shards"):
        open_untrained(config, str(ROOT / "ds_configs" / "zero3.json"), dist.init(60))


def losses_of(config: Config) -> tuple[float, torch.Tensor]:
    """Validation nll of the small base, and the gradient of a first step."""
    session = open_untrained(config, None, dist.init(60))
    engine = Engine(session)
    batches = eval_batches(open_split(session, "valid"), MicroSize.of(config), 1, 0)
    valid = engine.evaluate(batches)
    engine.train_window(next(windows(config, session, session.world).windows(0)), 0, 2, (0.0, 0.0))
    return float(valid["nll"]), engine.gradients.double().clone()


@pytest.mark.parametrize("position", ["before_text", "before_reply"])
def test_the_loss_of_the_small_base_stays(position: str) -> None:
    """The nll within 1 %, and the gradient in nearly the same direction."""
    shared = ["model.base_bits=16", "data.max_valid_examples=32", f"prompts.position={position}"]
    exact, slope = losses_of(load_config("demo", shared))
    found, other = losses_of(load_config("demo", [*shared, "model.base_matmul=fp8"]))
    assert found != exact
    assert abs(found - exact) < 0.01 * exact
    assert float(torch.dot(slope, other) / slope.norm() / other.norm()) > 0.98
