"""The ReLU that keeps a mask: the values and gradients of torch's own, and nothing but a byte per
element kept.
"""

from __future__ import annotations

import torch
from torch import nn

from spt_ds.model.activations import MaskedRelu
from tests.helpers.tiny import tiny_backbone


def test_values_and_gradients_are_those_of_relu() -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0], [3.0, -0.0, -4.0]], dtype=torch.float64)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected = torch.relu(leaves[0] * 2)
    doubled = (
        leaves[1] * 2
    )  # a product with a number keeps nothing: all that is noted is the activation's
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = MaskedRelu()(doubled)
    assert torch.equal(found, expected)
    assert [tensor.dtype for tensor in kept] == [torch.bool]
    for out in (expected, found):
        out.backward(torch.full_like(out, 5.0))
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[1].grad, leaves[0].grad)


def test_a_masked_gradient_may_be_infinite() -> None:
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    MaskedRelu()(x * 1).backward(torch.tensor([float("inf"), 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0]


def test_an_input_that_needs_no_gradient_is_left_as_it_was() -> None:
    x = torch.tensor([-1.0, 1.0])
    assert MaskedRelu()(x).tolist() == [0.0, 1.0]
    assert x.tolist() == [-1.0, 1.0]


def test_only_the_relu_of_opt_is_replaced() -> None:
    relu = tiny_backbone("opt", activation_function="relu")
    assert sum(isinstance(module, MaskedRelu) for module in relu.modules()) == 2
    assert not any(type(module) is nn.ReLU for module in relu.modules())
    for other in (tiny_backbone("opt"), tiny_backbone("llama")):
        assert not any(isinstance(module, MaskedRelu) for module in other.modules())
