"""One fused step for a linear layer with a low-rank adapter, in place of PEFT's while a model is trained.

PEFT casts, scales and adds in passes of their own, which on a CPU cost as much as the products. Here the adapter's
products accumulate into the layer's. Same values as PEFT's forward up to rounding; a test holds them side by side.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["LowRankLinear", "fuse"]


class LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T; W is frozen, A (r, in) and B (out, r) are trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low, high = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = flat @ low.t()
        out = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, high.t())
        ctx.save_for_backward(flat, inner, weight, low, high)
        ctx.scale = scale
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, inner, weight, low, high = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        inner_grad = flat_grad @ high
        x_grad = a_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (flat_grad @ weight).addmm_(inner_grad, low).view(*grad.shape[:-1], weight.shape[1])
        # Attacks freeze the adapters too.
        if ctx.needs_input_grad[3]:
            a_grad = (inner_grad.t() @ flat).float()
        if ctx.needs_input_grad[4]:
            b_grad = (flat_grad.t() @ inner).float() * ctx.scale
        return x_grad, None, None, a_grad, b_grad, None


def fuse(model: nn.Module) -> int:
    """Give every plain LoRA layer of the model the fused step; returns how many. PEFT's stays for all others.

    Layers are replaced by `preserved` on leaving, and with them what is set here.
    """
    from peft.tuners.lora.layer import Linear

    plain = [module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)]
    for module in plain:
        module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    return len(plain)


def _is_plain(module: Any) -> bool:
    name = module.active_adapters[0]
    return (
        type(module.base_layer) is nn.Linear
        and len(module.active_adapters) == 1
        and not module.base_layer.weight.requires_grad
        and not module.fan_in_fan_out
        and isinstance(module.lora_dropout[name], nn.Identity)
        and not getattr(module, "use_dora", {}).get(name, False)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
    )


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, name = module.base_layer, module.active_adapters[0]
    kind = x.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if module.disable_adapters or module.merged or base.weight.dtype != wanted or args or kwargs:
        return type(module).forward(module, x, *args, **kwargs)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    with torch.autocast(kind, enabled=False):
        return LowRankLinear.apply(x.to(wanted), base.weight, base.bias, a, b, float(module.scaling[name]))
