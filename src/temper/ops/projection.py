"""The vocabulary projection at chosen positions only: hidden states that reach the head, log-probabilities in chunks.

The projection of every position is a quarter of a small model's work and most of its memory, and nearly all of it is
thrown away. Here the head sees the wanted positions only, and no more than a chunk of logits exists at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from temper.core.errors import ModelError
from temper.ops.packed import Line, can_pack, pack, packed_forward
from temper.ops.precision import eval_mode

__all__ = [
    "CHUNK_LOGITS",
    "Hidden",
    "gather_logprobs",
    "head_is_plain",
    "head_of",
    "packed_hidden",
    "selected_logits",
    "token_logprobs",
    "wanted_hidden",
]

CHUNK_LOGITS = 2**24
"""Logits that exist at once in one chunk (64 MiB in float32)."""

BLOCK = 8192
"""Ids whose rows of the head's gradient are computed at a time."""
LEAST_SHARED = 8
"""Tokens of a beginning that is worth a line of its own."""

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head_of(model: nn.Module) -> nn.Module:
    """The module that projects to the vocabulary; raises ModelError for a model without one."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no vocabulary projection", cure="Use a causal language model."
        )
    return head


@contextmanager
def _head_input(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    handle = head_of(model).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Hidden(NamedTuple):
    """What the head gets at the chosen positions, row by row, and how many ids it gives logits for."""

    hidden_SD: Tensor
    num_ids: int


def wanted_hidden(model: nn.Module, inputs: dict[str, Tensor], at_BT: Tensor) -> Hidden:
    """The hidden states that reach the head at the chosen positions; the head itself runs on none.

    Ids alone are rows padded on the right. To train on them, a CPU reads them end to end, each up to its last position.
    """
    ids_BT = inputs.get("input_ids")
    packs = (
        torch.is_grad_enabled() and len(inputs) == 1 and ids_BT is not None and ids_BT.device.type == "cpu"
    )
    if packs and len(at_BT) and can_pack(model):
        line, at_1S = _line(inputs["input_ids"].tolist(), at_BT)
        return packed_hidden(model, line, at_1S)
    return _caught(model, lambda: model(**inputs, use_cache=False), at_BT)


def _line(rows: list[list[int]], at_BT: Tensor) -> tuple[Line, Tensor]:
    """Rows end to end, each up to its last wanted position; what all begin with before the first such is read once."""
    used_B = (at_BT * torch.arange(1, at_BT.shape[1] + 1)).amax(1).tolist()
    cut = [row[:used] for row, used in zip(rows, used_B, strict=True)]
    num_shared = 0
    if len(cut) > 1:
        alike = takewhile(lambda column: len(set(column)) == 1, zip(*cut, strict=False))
        num_shared = min(sum(1 for _ in alike), int(at_BT.any(0).int().argmax()))
    if num_shared < LEAST_SHARED:
        num_shared = 0
    ats = [at_T[num_shared:used] for at_T, used in zip(at_BT, used_B, strict=True)]
    at_1S = torch.cat([at_BT.new_zeros(num_shared), *ats])[None]
    ends = [row[num_shared:] for row in cut]
    return pack([[cut[0][:num_shared], *ends]] if num_shared else [[end] for end in ends]), at_1S


def packed_hidden(model: nn.Module, line: Line, at_1S: Tensor) -> Hidden:
    """`wanted_hidden` of a packed line."""
    return _caught(model, lambda: packed_forward(model, line), at_1S)


def _caught(model: nn.Module, forward: Callable[[], Any], at_BT: Tensor) -> Hidden:
    caught: list[Tensor] = []

    def catch(hidden_BTD: Tensor) -> Tensor:
        caught.append(_select(hidden_BTD, at_BT))
        return hidden_BTD[:1, :0]

    with _head_input(model, catch):
        logits = forward().logits
    return Hidden(caught[0], logits.shape[-1])


def selected_logits(model: nn.Module, inputs: dict[str, Tensor], at_BT: Tensor) -> Tensor:
    """The model's own logits at the chosen positions, (S, V), with whatever it does to them after the head."""
    with _head_input(model, lambda hidden_BTD: _select(hidden_BTD, at_BT)[None]):
        return model(**inputs, use_cache=False).logits[0]


def _select(hidden_BTD: Tensor, at_BT: Tensor) -> Tensor:
    # Virtual tokens of a soft prompt stand before the row's own.
    return hidden_BTD[:, hidden_BTD.shape[1] - at_BT.shape[1] :][at_BT]


def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are its head's output, neither capped nor scaled; found out once by one token."""
    if model not in _PLAIN:
        _PLAIN[model] = _probe(model)
    return _PLAIN[model]


def _probe(model: nn.Module) -> bool:
    ramp: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        # Far from 0, where a cap or a factor shows whatever the weights are.
        ramp.append(
            torch.linspace(-100, 100, logits.shape[-1], device=logits.device)
            .expand_as(logits)
            .to(logits.dtype)
        )
        return ramp[0]

    handle = head_of(model).register_forward_hook(replace)
    try:
        with eval_mode(model), torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
            logits = model(input_ids=token, use_cache=False).logits
    finally:
        handle.remove()
    return torch.equal(logits[:, -1:].float(), ramp[0][:, -1:].float())


def token_logprobs(head: nn.Module, hidden_SD: Tensor, target_S: Tensor, num_ids: int) -> Tensor:
    """Log-probability of each target under softmax(head(hidden)), (S,), float32, with gradient to hidden and head.

    `num_ids` is the vocabulary's size. At any chunk size it equals
    `head(hidden_SD).float().log_softmax(-1).gather(-1, target_S[:, None])[:, 0]`.
    """
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        dtype = _compute_dtype(hidden_SD)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if not torch.is_grad_enabled():
            # A function of its own is told what requires a gradient, not whether one is taken.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return _LinearLogprobs.apply(hidden_SD.to(dtype), weight, bias, target_S, dtype)  # type: ignore[no-any-return]
    size = _chunk_rows(num_ids)
    parts = zip(hidden_SD.split(size), target_S.split(size), strict=True)
    return torch.cat([_module_chunk(head, hidden, target) for hidden, target in parts])


def _chunk_rows(num_ids: int) -> int:
    return max(1, CHUNK_LOGITS // num_ids)


def _compute_dtype(hidden_SD: Tensor) -> torch.dtype:
    device = hidden_SD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_SD.dtype


def _module_chunk(head: nn.Module, hidden_SD: Tensor, target_S: Tensor) -> Tensor:
    """A chunk through any head (wrapped, quantised, adapted), its logits computed again in the backward pass."""

    def chunk(hidden: Tensor) -> Tensor:
        return gather_logprobs(head(hidden), target_S)

    if not torch.is_grad_enabled():
        return chunk(hidden_SD)
    return checkpoint(chunk, hidden_SD, use_reentrant=False)  # type: ignore[no-any-return]


def gather_logprobs(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """Log-probability of each target, (S,), in float32."""
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    return logits_SV.gather(-1, target_S[:, None])[:, 0] - logits_SV.logsumexp(-1)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of a linear head, chunk by chunk, its products in `dtype`.

    d log p(y) / d logits = onehot(y) - p. Times W that is the hidden states' gradient, kept from the forward pass, (S, D):
    a frozen head never projects twice. A trained head needs it again, times the hidden states: it is kept where one
    chunk holds all rows, and else computed from the logits anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_S: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_hidden, *head = ctx.needs_input_grad[:3]
        low_VD, low_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        kept = torch.empty_like(hidden_SD) if needs_hidden else None
        logp, slope = [torch.zeros(0, device=hidden_SD.device)], None
        parts = _parts(len(hidden_SD), len(weight_VD))
        with torch.autocast(hidden_SD.device.type, enabled=False):
            for part in parts:
                logits = _logits(hidden_SD[part], low_VD, low_V)
                lse = logits.logsumexp(-1)
                logp.append(logits.gather(-1, target_S[part, None])[:, 0] - lse)
                if needs_hidden or any(head):
                    slope = _slope(logits, lse, target_S[part], dtype)
                    if kept is not None:
                        torch.mm(slope, low_VD, out=kept[part])
        whole = slope if len(parts) == 1 else None
        ctx.save_for_backward(kept, *((hidden_SD, low_VD, low_V, target_S, whole) if any(head) else ()))
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return torch.cat(logp[1:] or logp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, *rest = ctx.saved_tensors
        with torch.autocast(grad_S.device.type, enabled=False):
            d_hidden = None if kept is None else kept * grad_S[:, None].to(kept.dtype)
            d_weight, d_bias = _head_gradients(ctx, grad_S, *rest) if rest else (None, None)
        return d_hidden, d_weight, d_bias, None, None


def _parts(num_rows: int, num_ids: int) -> list[slice]:
    size = _chunk_rows(num_ids)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _logits(hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden_SD, weight_VD, bias_V)
    return logits if logits.dtype == torch.float64 else logits.float()


def _slope(logits_SV: Tensor, lse_S: Tensor, target_S: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient, onehot(y) - p, in `dtype`, over the logits; rounded after the subtraction, as near p = 1 little is left."""
    slope_SV = logits_SV.sub_(lse_S[:, None]).exp_().neg_()
    slope_SV[torch.arange(len(slope_SV), device=slope_SV.device), target_S] += 1
    return slope_SV.to(dtype)


def _head_gradients(
    ctx: Any,
    grad_S: Tensor,
    hidden_SD: Tensor,
    low_VD: Tensor,
    low_V: Tensor | None,
    target_S: Tensor,
    whole_SV: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the head's weight and bias, summed over chunks in the incoming gradient's precision."""
    needs_weight, needs_bias = ctx.needs_input_grad[1:3]
    weight_dtype, bias_dtype = ctx.dtypes
    new = grad_S.new_empty if len(grad_S) else grad_S.new_zeros
    d_weight = new(low_VD.shape) if needs_weight else None
    d_bias = grad_S.new_zeros(len(low_VD)) if needs_bias else None
    scaled_SD = hidden_SD * grad_S[:, None].to(hidden_SD.dtype)
    for part in _parts(len(hidden_SD), len(low_VD)):
        slope_SV = whole_SV
        if slope_SV is None:
            logits = _logits(hidden_SD[part], low_VD, low_V)
            slope_SV = _slope(logits, logits.logsumexp(-1), target_S[part], low_VD.dtype)
        if d_weight is not None:
            for rows in _blocks(len(d_weight)):
                product = slope_SV[:, rows].T @ scaled_SD[part]
                d_weight[rows] = product if not part.start else d_weight[rows] + product
        if d_bias is not None:
            d_bias += grad_S[part] @ slope_SV.to(grad_S.dtype)
    return _to(d_weight, weight_dtype), _to(d_bias, bias_dtype)


def _blocks(num_ids: int) -> list[slice]:
    """Rows of the head's gradient whose product is not worth more memory than a processor's cache."""
    return [slice(start, start + BLOCK) for start in range(0, num_ids, BLOCK)]


def _to(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if grad is None or dtype is None else grad.to(dtype)
