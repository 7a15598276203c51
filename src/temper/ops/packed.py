"""Rows laid end to end in one: no padding, one pass for all, and a beginning that several rows share computed once.

Everything but attention works token by token and does not care where a row ends. Attention gets a `Layout`: which
spans of the line each span sees. Shapes: S tokens of the line, H query heads, J key heads, D width of a head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Layout", "Line", "PackedAttention", "Segment", "can_pack", "pack", "packed_forward"]

NAME = "temper_packed"
BLOCK = 128
"""Queries of one product: a block sees the keys up to its own end, so half of the square is never computed."""


class Segment(NamedTuple):
    """Tokens `start` to `stop` of the line: each sees the span `before` and those of its own up to itself."""

    start: int
    stop: int
    before: tuple[int, int] = (0, 0)


Layout = tuple[Segment, ...]

_USABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Line(NamedTuple):
    """The ids of a packed line, (1, S), each token's position in its own row, and what sees what."""

    ids_1S: Tensor
    positions_1S: Tensor
    layout: Layout


def pack(rows: Sequence[Sequence[Sequence[int]]], device: str | torch.device = "cpu") -> Line:
    """Rows end to end. A row is its beginning and the ends that continue it, each blind to the others."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for beginning, *ends in rows:
        before = (len(ids), len(ids) + len(beginning))
        for part, offset, seen in [(beginning, 0, (0, 0)), *((end, len(beginning), before) for end in ends)]:
            segments.append(Segment(len(ids), len(ids) + len(part), seen))
            ids += part
            positions += range(offset, offset + len(part))
    layout = tuple(segment for segment in segments if segment.stop > segment.start)
    return Line(torch.tensor([ids], device=device), torch.tensor([positions], device=device), layout)


def can_pack(model: nn.Module) -> bool:
    """Whether the model gives packed rows what it gives each alone; tried once, on a few tokens.

    Not while hooks wait for activations of the usual shape, or activations are computed again.
    """
    for part in model.modules():
        if part._forward_hooks or part._forward_pre_hooks or getattr(part, "gradient_checkpointing", False):
            return False
    if model not in _USABLE:
        _USABLE[model] = _probe(model)
    return _USABLE[model]


def packed_forward(model: nn.Module, line: Line) -> Any:
    """The model's output on a packed line; only for models that `can_pack`."""
    with _attending(model):
        return model(
            input_ids=line.ids_1S, position_ids=line.positions_1S, packed_layout=line.layout, use_cache=False
        )


@contextmanager
def _attending(model: nn.Module) -> Iterator[None]:
    """The model's layers call `_attention` here."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    found: dict[int, Any] = {id(p.config): p.config for p in model.modules() if hasattr(p, "config")}
    before = [(config, config._attn_implementation_internal) for config in found.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, kind in before:
            config._attn_implementation_internal = kind


class _CannotPackError(Exception):
    """The attention does more than a packed line can ask of it."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (1, H, S, D) in, (1, S, H, D) out."""
    foreign = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")
    if (
        not packed_layout
        or attention_mask is not None
        or any(options.get(name) is not None for name in foreign)
    ):
        raise _CannotPackError
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if dropout or query.device.type != "cpu":
        return _by_torch(query, key, value, packed_layout, scale, dropout), None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        parts = [part[0].to(dtype) for part in (query, key, value)]
        return PackedAttention.apply(*parts, packed_layout, scale)[None], None


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
) -> Tensor:
    """The same by torch's own attention, a call for each segment; also the slow twin."""
    outs = []
    for segment in layout:
        span, (first, last) = slice(segment.start, segment.stop), segment.before
        keys, values = (torch.cat([t[:, :, first:last], t[:, :, span]], 2) for t in (key, value))
        size = segment.stop - segment.start
        mask = torch.ones(size, last - first + size, dtype=torch.bool, device=query.device).tril(last - first)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, span],
                keys,
                values,
                attn_mask=mask if last > first else None,
                is_causal=last == first,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
        )
    return torch.cat(outs, 1)


class PackedAttention(torch.autograd.Function):
    """Causal attention within segments, in blocks of plain products; equals `_by_torch` up to rounding.

    On a CPU the flash kernel's two passes cost two to three times as much for rows of a few hundred tokens.
    Scores and softmax are float32; probabilities are kept in the inputs' dtype for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HSD: Tensor, k_JSD: Tensor, v_JSD: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        num_groups = len(k_JSD)
        out_SHD = q_HSD.new_empty(q_HSD.shape[1], q_HSD.shape[0], v_JSD.shape[-1])
        probs = []
        for segment in layout:
            keys, values = _seen(k_JSD, segment), _seen(v_JSD, segment)
            exact = keys.to(_score_dtype(keys)).transpose(1, 2)
            for block in _blocks(segment):
                queries = _grouped(q_HSD[:, block.start : block.stop], num_groups)
                scores = torch.bmm(queries.to(exact.dtype), exact[:, :, : block.num_keys]).mul_(scale)
                size = block.stop - block.start
                square = scores.view(num_groups, -1, size, block.num_keys)[..., block.num_keys - size :]
                square.add_(_causal(size, scores.dtype))
                prob = torch.softmax(scores, -1).to(keys.dtype)
                out = torch.bmm(prob, values[:, : block.num_keys])
                out_SHD[block.start : block.stop] = out.view(-1, size, out.shape[-1]).transpose(0, 1)
                probs.append(prob)
        ctx.save_for_backward(q_HSD, k_JSD, v_JSD, *probs)
        ctx.layout, ctx.scale = layout, scale
        return out_SHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_HSD, k_JSD, v_JSD, *probs = ctx.saved_tensors
        num_groups, kept = len(k_JSD), iter(probs)
        q_grad = torch.empty_like(q_HSD)
        k_grad = torch.zeros_like(k_JSD, dtype=_score_dtype(k_JSD))
        v_grad = torch.zeros_like(v_JSD, dtype=_score_dtype(v_JSD))
        for segment in ctx.layout:
            keys, values = _seen(k_JSD, segment), _seen(v_JSD, segment)
            k_part, v_part = (torch.zeros_like(t, dtype=k_grad.dtype) for t in (keys, values))
            for block in _blocks(segment):
                prob, span = next(kept), slice(block.start, block.stop)
                queries = _grouped(q_HSD[:, span], num_groups)
                grad = _grouped(grad_SHD[span].transpose(0, 1), num_groups)
                slope = torch.bmm(grad, values[:, : block.num_keys].transpose(1, 2))
                slope = torch._softmax_backward_data(slope, prob, -1, prob.dtype).mul_(ctx.scale)
                back = torch.bmm(slope, keys[:, : block.num_keys])
                q_grad[:, span] = back.view(len(q_HSD), -1, back.shape[-1])
                k_part[:, : block.num_keys] += torch.bmm(slope.transpose(1, 2), queries)
                v_part[:, : block.num_keys] += torch.bmm(prob.transpose(1, 2), grad)
            _give_back(k_grad, k_part, segment)
            _give_back(v_grad, v_part, segment)
        return q_grad, k_grad.to(k_JSD.dtype), v_grad.to(v_JSD.dtype), None, None


class _Block(NamedTuple):
    start: int
    stop: int
    num_keys: int


def _blocks(segment: Segment) -> Iterator[_Block]:
    """The segment's queries, `BLOCK` at a time, and how many of the keys it sees each block needs."""
    shared = segment.before[1] - segment.before[0]
    for start in range(segment.start, segment.stop, BLOCK):
        stop = min(start + BLOCK, segment.stop)
        yield _Block(start, stop, shared + stop - segment.start)


def _seen(line_JSD: Tensor, segment: Segment) -> Tensor:
    """The keys or values that the segment sees, in one piece."""
    own, (first, last) = line_JSD[:, segment.start : segment.stop], segment.before
    return torch.cat([line_JSD[:, first:last], own], 1) if last > first else own.contiguous()


def _give_back(total_JSD: Tensor, part: Tensor, segment: Segment) -> None:
    """Add a segment's gradient where its keys or values came from."""
    first, last = segment.before
    total_JSD[:, first:last] += part[:, : last - first]
    total_JSD[:, segment.start : segment.stop] += part[:, last - first :]


def _grouped(part_HTD: Tensor, num_groups: int) -> Tensor:
    """The query heads of a key head under one another, (J, H/J x T, D)."""
    return part_HTD.reshape(num_groups, -1, part_HTD.shape[-1])


def _score_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@cache
def _causal(size: int, dtype: torch.dtype) -> Tensor:
    """Minus infinity above the diagonal."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)


def _probe(model: nn.Module) -> bool:
    """Whether the model takes a layout, honours positions, keeps rows apart, and gives what it gives them alone."""
    from temper.ops.precision import eval_mode

    # Ids from all over the vocabulary: the lowest are control tokens, whose activations are extreme.
    step = model.get_input_embeddings().num_embeddings // 17  # type: ignore[operator]
    ids = [step * place for place in range(1, 14)]
    first, second, ends = ids[:5], ids[5:8], [ids[8:10], ids[10:]]
    device = next(model.parameters()).device
    whole = pack([[first], [second, *ends]], device)
    other = pack([[first[::-1]], [second, ends[0], ends[1][::-1]]], device)
    moved = whole._replace(positions_1S=whole.positions_1S.flip(1))
    with eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        # A soft prompt takes no positions, and says so.
        warnings.filterwarnings("error", message="Position ids")
        try:
            logits, after, shifted = (packed_forward(model, line).logits[0] for line in (whole, other, moved))
        except (_CannotPackError, TypeError, ValueError, RuntimeError, AttributeError, UserWarning):
            return False
        alone = [model(input_ids=torch.tensor([second + end], device=device)).logits[0] for end in ends]
    seen = [torch.cat([logits[5:8], logits[8:10]]), torch.cat([logits[5:8], logits[10:]])]
    gaps = [float((one - two).abs().mean()) for one, two in zip(seen, alone, strict=True)]
    tolerance = 0.1 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-4
    apart = torch.equal(logits[5:10], after[5:10])
    return apart and max(gaps) <= tolerance * float(logits.std()) and not torch.equal(logits[5:], shifted[5:])
