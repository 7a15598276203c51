"""Rows laid end to end in one: no padding, one pass for all, and a beginning that several rows share computed once.

Everything but attention works token by token and does not care where a row ends. Attention gets a `Layout`: which
spans of the line each span sees. Shapes: S tokens of the line, H query heads, J key heads, D width of a head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from temper.systems.local import PROBE_ERRORS

__all__ = ["Layout", "Line", "PackedAttention", "Segment", "can_pack", "pack", "packed_forward"]

NAME = "temper_packed"
BLOCK = 128
"""Queries of one block: it sees the keys up to its own end, so half of the square is never computed."""
CALLS = 8192
"""Scores a head that take as long as the calls of one product: blocks go side by side while padding adds fewer."""


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
    """Causal attention within segments, in few plain products; equals `_by_torch` up to rounding.

    On a CPU the flash kernel's two passes cost two to three times as much for rows of a few hundred tokens.
    Scores and softmax are float32; probabilities are kept in the inputs' dtype for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HSD: Tensor, k_JSD: Tensor, v_JSD: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        num_groups, dtype = len(k_JSD), _score_dtype(k_JSD)
        out_SHD = q_HSD.new_empty(q_HSD.shape[1], q_HSD.shape[0], v_JSD.shape[-1])
        kept = []
        for bundle in _bundles(layout, q_HSD.device):
            queries, keys, values = (
                bundle.of_queries(q_HSD, num_groups),
                bundle.of_keys(k_JSD),
                bundle.of_keys(v_JSD),
            )
            scores = torch.bmm(queries.to(dtype), keys.to(dtype).transpose(1, 2)).mul_(scale)
            bundle.hide(scores)
            prob = torch.softmax(scores, -1).to(keys.dtype)
            out_SHD.index_copy_(0, bundle.real_N, bundle.by_token(torch.bmm(prob, values)))
            kept += [queries, keys, values, prob]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (q_HSD.shape, k_JSD.shape, v_JSD.shape)
        return out_SHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, (q_shape, *shapes), dtype = iter(ctx.saved_tensors), ctx.shapes, grad_SHD.dtype
        q_grad_SHD = grad_SHD.new_empty(q_shape[1], q_shape[0], q_shape[2])
        k_grad, v_grad = (grad_SHD.new_zeros(shape, dtype=_score_dtype(grad_SHD)) for shape in shapes)
        for bundle in _bundles(ctx.layout, grad_SHD.device):
            queries, keys, values, prob = (next(kept) for _ in range(4))
            grad = bundle.by_query(grad_SHD, len(k_grad))
            slope = torch.bmm(grad, values.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, prob, -1, prob.dtype).mul_(ctx.scale)
            q_grad_SHD.index_copy_(0, bundle.real_N, bundle.by_token(torch.bmm(slope, keys)))
            bundle.add_keys(k_grad, torch.bmm(slope.transpose(1, 2), queries))
            bundle.add_keys(v_grad, torch.bmm(prob.transpose(1, 2), grad))
        return q_grad_SHD.transpose(0, 1), k_grad.to(dtype), v_grad.to(dtype), None, None


class _Block(NamedTuple):
    """Queries `start` to `stop`, which see the span `before` and the line from `first` up to themselves."""

    start: int
    stop: int
    first: int
    before: tuple[int, int]

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.before[1] - self.before[0] + self.stop - self.first


class _Bundle(NamedTuple):
    """Blocks side by side in one product, padded: R blocks of T queries and K keys; N queries are real.

    Padding points at the line's first token. What it gives is dropped and what it gets is nothing.
    """

    query_RT: Tensor
    key_RK: Tensor
    hidden_RTK: Tensor
    """0 where a query sees a key, minus infinity elsewhere; a query of padding sees something too."""
    place_N: Tensor
    """Places in R x T of the real queries."""
    real_N: Tensor
    """Places of the same in the line."""

    def of_queries(self, line_HSD: Tensor, num_groups: int) -> Tensor:
        """The query heads of a key head under one another, (R x J, H/J x T, D)."""
        num_blocks, size = self.query_RT.shape
        rows = line_HSD.index_select(1, self.query_RT.flatten())
        rows = rows.view(num_groups, -1, num_blocks, size, rows.shape[-1]).permute(2, 0, 1, 3, 4)
        return rows.reshape(num_blocks * num_groups, -1, rows.shape[-1])

    def of_keys(self, line_JSD: Tensor) -> Tensor:
        """Keys or values, (R x J, K, D)."""
        num_blocks, size = self.key_RK.shape
        rows = line_JSD.index_select(1, self.key_RK.flatten()).view(len(line_JSD), num_blocks, size, -1)
        return rows.transpose(0, 1).reshape(-1, size, rows.shape[-1])

    def hide(self, scores: Tensor) -> None:
        """Take out, in place, what a query does not see."""
        num_blocks, size, num_keys = self.hidden_RTK.shape
        scores.view(num_blocks, -1, size, num_keys).add_(self.hidden_RTK[:, None])

    def by_token(self, rows: Tensor) -> Tensor:
        """From the shape of `of_queries` to the real queries' (N, H, D)."""
        num_blocks, size = self.query_RT.shape
        rows = rows.view(num_blocks, -1, size, rows.shape[-1]).transpose(1, 2)
        return rows.reshape(num_blocks * size, -1, rows.shape[-1]).index_select(0, self.place_N)

    def by_query(self, line_SHD: Tensor, num_groups: int) -> Tensor:
        """The inverse of `by_token`, zero for padding."""
        num_blocks, size = self.query_RT.shape
        rows = line_SHD.new_zeros(num_blocks * size, *line_SHD.shape[1:])
        rows.index_copy_(0, self.place_N, line_SHD.index_select(0, self.real_N))
        rows = rows.view(num_blocks, size, num_groups, -1, rows.shape[-1]).permute(0, 2, 3, 1, 4)
        return rows.reshape(num_blocks * num_groups, -1, rows.shape[-1])

    def add_keys(self, total_JSD: Tensor, rows: Tensor) -> None:
        """Add what keys or values get back, where they came from."""
        num_blocks, size = self.key_RK.shape
        rows = (
            rows.view(num_blocks, -1, size, rows.shape[-1])
            .transpose(0, 1)
            .reshape(len(total_JSD), -1, rows.shape[-1])
        )
        total_JSD.index_add_(1, self.key_RK.flatten(), rows.to(total_JSD.dtype))


@lru_cache(maxsize=4)
def _bundles(layout: Layout, device: torch.device) -> tuple[_Bundle, ...]:
    """The layout's blocks, those of about one size together; every layer of a pass asks for the same."""
    blocks = [
        _Block(start, min(start + BLOCK, segment.stop), segment.start, segment.before)
        for segment in layout
        for start in range(segment.start, segment.stop, BLOCK)
    ]
    together: list[list[_Block]] = []
    for block in sorted(blocks, key=lambda block: (block.num_keys, block.num_queries)):
        if together and _cost([*together[-1], block]) <= _cost(together[-1]) + _cost([block]):
            together[-1].append(block)
        else:
            together.append([block])
    return tuple(_bundle(group, device) for group in together)


def _cost(blocks: Sequence[_Block]) -> int:
    """What one padded product of the blocks costs, in scores."""
    size, num_keys = max(block.num_queries for block in blocks), max(block.num_keys for block in blocks)
    return CALLS + len(blocks) * size * num_keys


def _bundle(blocks: Sequence[_Block], device: torch.device) -> _Bundle:
    size, num_keys = max(block.num_queries for block in blocks), max(block.num_keys for block in blocks)
    queries, keys = (
        torch.zeros(len(blocks), size, dtype=torch.long),
        torch.zeros(len(blocks), num_keys, dtype=torch.long),
    )
    own = torch.tensor([block.num_keys - block.num_queries for block in blocks])
    for row, block in enumerate(blocks):
        queries[row, : block.num_queries] = torch.arange(block.start, block.stop)
        seen = [torch.arange(*block.before), torch.arange(block.first, block.stop)]
        keys[row, : block.num_keys] = torch.cat(seen)
    last_RT = own[:, None] + torch.arange(size)
    hidden = torch.zeros(len(blocks), size, num_keys).masked_fill_(
        torch.arange(num_keys) > last_RT[..., None], -math.inf
    )
    places = torch.cat([row * size + torch.arange(block.num_queries) for row, block in enumerate(blocks)])
    return _Bundle(*(t.to(device) for t in (queries, keys, hidden, places, queries.flatten()[places])))


def _score_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
        except (_CannotPackError, UserWarning, *PROBE_ERRORS):
            return False
        alone = [model(input_ids=torch.tensor([second + end], device=device)).logits[0] for end in ends]
    seen = [torch.cat([logits[5:8], logits[8:10]]), torch.cat([logits[5:8], logits[10:]])]
    gaps = [float((one - two).abs().mean()) for one, two in zip(seen, alone, strict=True)]
    tolerance = 0.1 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-4
    apart = torch.equal(logits[5:10], after[5:10])
    return apart and max(gaps) <= tolerance * float(logits.std()) and not torch.equal(logits[5:], shifted[5:])
