"""The fused LoRA step beside its slow twin, PEFT's own forward."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from temper.artefacts.lora_linear import LowRankLinear, fuse


def pair(bias: bool, dtype: torch.dtype = torch.float32, **options: object) -> tuple[nn.Module, nn.Module]:
    """The same adapted layer twice: PEFT's and fused."""
    torch.manual_seed(0)
    out = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(7, 5, bias=bias))
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **options), net)
        out.append(net)
    out[1].load_state_dict(out[0].state_dict())
    for net in out:
        nn.init.normal_(net[0].lora_B["default"].weight, generator=torch.Generator().manual_seed(1))
        net[0].base_layer.to(dtype)
        for parameter in net[0].base_layer.parameters():
            parameter.requires_grad_(False)
    assert fuse(out[1]) == 1
    return out[0], out[1]


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_peft(bias: bool) -> None:
    slow, fast = pair(bias)
    x = torch.randn(2, 4, 7)
    results = []
    for net in (slow, fast):
        given = x.clone().requires_grad_()
        out = net(given)
        out.square().sum().backward()
        layer = net[0]
        results.append(
            (out, given.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_stays_near_float32() -> None:
    exact, _ = pair(True)
    _, fast = pair(True, torch.bfloat16)
    x = torch.randn(64, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fast(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(x), rtol=0.05, atol=0.1)


def test_gradcheck_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight, bias = draw(4, 6), draw(4)
    x, a, b = draw(5, 6).requires_grad_(), draw(2, 6).requires_grad_(), draw(4, 2).requires_grad_()
    out = LowRankLinear.apply(x, weight, bias, a, b, 0.7)
    torch.testing.assert_close(out, x @ weight.t() + bias + 0.7 * (x @ a.t()) @ b.t())
    grads = torch.autograd.grad(out.square().sum(), (x, a, b))
    plain = x @ weight.t() + bias + 0.7 * (x @ a.t()) @ b.t()
    wanted = torch.autograd.grad(plain.square().sum(), (x, a, b))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)  # a and b get float32 gradients


def test_layers_it_does_not_know_keep_peft() -> None:
    net = nn.Sequential(nn.Linear(7, 5))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"], lora_dropout=0.5), net)
    net[0].base_layer.weight.requires_grad_(False)
    assert fuse(net) == 0


def test_frozen_adapters_cost_no_gradient_and_leave_that_of_the_input() -> None:
    _, fast = pair(True)
    x = torch.randn(2, 4, 7)
    found = []
    for frozen in (False, True):
        for name, parameter in fast.named_parameters():
            parameter.requires_grad_(not frozen and ".lora_" in name)
            parameter.grad = None
        given = x.clone().requires_grad_()
        fast(given).square().sum().backward()
        found.append(given.grad)
        assert (fast[0].lora_A["default"].weight.grad is None) == frozen
    assert torch.equal(*found)
