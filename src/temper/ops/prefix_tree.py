"""Rows that begin alike, run through a model once where they agree.

Sorted by their ids, each row shares its first tokens with the row before it. A *pack* is one sequence of a batch that
holds several rows: the first one whole, of each later one the tokens that it does not share. A token stands at its
place in its own row, and the mask shows it its own row's tokens alone:

    rows  a b c d     pack      a b c d | e f | g     f sees a b e f
          a b e f     position  0 1 2 3 | 2 3 | 1
          a g

What too many tokens for a pack have in common is kept as keys and values (a `PrefixCache`) in front of many packs.
Rows with nothing in common are packs of their own and need no mask. Shape letters: P tokens of the kept prefix,
S chosen positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from temper.core.errors import NeedsError
from temper.core.types import Run
from temper.ops.batching import CPU_TOKENS, pad_id, plan_batches
from temper.ops.decode_backends import additive_mask, cache_by_position, without_hooks
from temper.ops.hooks import is_hooked
from temper.ops.packed_linear import packed_linears
from temper.ops.precision import autocast, eval_mode
from temper.ops.prefix_cache import PrefixCache
from temper.systems.local import PROBE_ERRORS

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = ["TreePass", "reading", "tree_passes", "tree_works"]

logger = logging.getLogger(__name__)

PACK_TOKENS = 512
"""A pack is not larger: the mask lets attention skip nothing, so its cost grows with the square."""
MIN_SHARED = 4
"""Fewer tokens in common are computed again, row by row, without a mask."""
MIN_KEPT = 16
"""Fewer tokens in common are not worth a forward pass of their own."""
COPY_COST = 4
"""Kept tokens, copied in front of each pack of a batch, that take up the room of one new token."""
REPACK_FROM_TOKENS = 4096
"""So many tokens in all repay laying out the layers' weights for oneDNN."""
REPACK_HEAD_FROM = 1024
"""So many positions repay laying out the head beside the embedding, whose rows it shares in many models."""


class TreePass(NamedTuple):
    """The arguments of one forward pass, the positions wanted of it, and where in them each row's stand.

    `node_S` numbers the chosen positions of `at_BT` in reading order; rows that agree share numbers.
    """

    inputs: dict[str, Any]
    at_BT: Tensor
    rows: list[int]
    node_S: list[Tensor]


@contextmanager
def reading(system: CausalLM, run: Run, num_tokens: int, num_wanted: int) -> Iterator[None]:
    """Inside: no gradient, no dropout, the run's precision, and fast float32 products.

    Weights that few go through stay as they are: `num_tokens` for the layers, `num_wanted` positions for the head.
    """
    with eval_mode(system.model), torch.no_grad(), autocast(run):
        if run.exact or run.precision != "float32" or num_tokens < REPACK_FROM_TOKENS:
            yield
            return
        head = system.model.get_output_embeddings() if num_wanted < REPACK_HEAD_FROM else None
        with packed_linears(system.model, min(run.batch_tokens, CPU_TOKENS), but=head):
            yield


def tree_passes(
    system: CausalLM, rows: Sequence[Sequence[int]], at: Sequence[Sequence[int]], run: Run, label: str
) -> Iterator[TreePass]:
    """Forward passes that together reach the positions `at[n]`, growing, of every row n; to be run inside `reading`.

    Tokens after a row's last such position are left out. In exact mode, under hooks, and where a probe shows that
    the model cannot do it, nothing is shared; in exact mode every row runs alone.
    """
    if torch.device(system.device).type == "cpu":
        run = replace(run, batch_tokens=min(run.batch_tokens, CPU_TOKENS))
    order = sorted(range(len(rows)), key=lambda row: list(rows[row][: at[row][-1] + 1]))
    tree = _Tree([list(rows[row][: at[row][-1] + 1]) for row in order], [list(at[row]) for row in order])
    longest = max(map(len, tree.rows), default=0)
    shared = not run.exact and not is_hooked(system.model) and tree_works(system, longest)
    nodes = tree.plan() if shared else [_Node(0, len(rows), 0, spans=[(n, n + 1) for n in range(len(rows))])]
    work = [(node, batch) for node in nodes for batch in _batches(tree, node, run)]
    kept = _Kept(system, tree.rows)
    for node, batch in run.ticker(work, total=len(work), label=label):
        one = _forward_pass(system, [tree.pack(span, node.depth) for span in batch], kept.of(node))
        yield one._replace(rows=[order[row] for span in batch for row in range(*span)])


def _batches(tree: _Tree, node: _Node, run: Run) -> list[list[tuple[int, int]]]:
    sizes = [tree.size(span, node.depth) + node.depth // COPY_COST for span in node.spans]
    return [[node.spans[index] for index in batch] for batch in plan_batches(sizes, run)]


@dataclass
class _Node:
    """Rows lo..hi-1 of the sorted order, whose first `depth` tokens are kept, and the packs right behind them."""

    lo: int
    hi: int
    depth: int
    before: _Node | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)


class _Pack(NamedTuple):
    """One sequence: `parts` are (first column, number of columns, columns of the tokens before), a row each."""

    ids: list[int]
    position: list[int]
    parts: list[tuple[int, int, list[int]]]
    wanted: list[list[int]]
    """Columns, a list for each row."""


class _Tree:
    """Sorted rows; `agree[n]` is how many first tokens row n shares with row n - 1."""

    def __init__(self, rows: list[list[int]], at: list[list[int]]) -> None:
        self.rows, self.at = rows, at
        self.agree = [0] + [_agreement(rows[n - 1], rows[n]) for n in range(1, len(rows))]

    def size(self, span: tuple[int, int], depth: int) -> int:
        """Tokens of a pack."""
        lo, hi = span
        return sum(map(len, self.rows[lo:hi])) - sum(self.agree[lo + 1 : hi]) - depth

    def plan(self) -> list[_Node]:
        """Every row in one pack; a node stands behind the one that its kept tokens continue."""
        nodes = [_Node(0, len(self.rows), 0)]
        todo = [(0, len(self.rows), nodes[0])] if self.rows else []
        while todo:
            lo, hi, node = todo.pop()
            common = min(self.agree[lo + 1 : hi], default=len(self.rows[lo]))
            keep = min(common, *(first[0] for first in self.at[lo:hi]))
            if hi - lo > 1 and common - node.depth < MIN_SHARED:
                cuts = [lo, *(n for n in range(lo + 1, hi) if self.agree[n] <= common), hi]
                todo += [(*pair, node) for pair in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]
            elif hi - lo == 1 or self.size((lo, hi), node.depth) <= PACK_TOKENS:
                self._add((lo, hi), node)
            elif keep - node.depth >= MIN_KEPT:
                nodes.append(_Node(lo, hi, keep, node))
                todo.append((lo, hi, nodes[-1]))
            else:
                for n in range(lo, hi):
                    self._add((n, n + 1), node, PACK_TOKENS)
        return nodes

    def _add(self, span: tuple[int, int], node: _Node, most: int = 0) -> None:
        """A pack of its own, unless it fits into the last one: behind a long prefix, copying that costs more."""
        joined = (node.spans[-1][0], span[1]) if node.spans and node.spans[-1][1] == span[0] else None
        if joined and self.size(joined, node.depth) <= (most or min(node.depth, PACK_TOKENS)):
            node.spans[-1] = joined
        else:
            node.spans.append(span)

    def pack(self, span: tuple[int, int], depth: int) -> _Pack:
        pack = _Pack([], [], [], [])
        path: list[int] = []  # columns of the row under way, from `depth` on
        for n in range(*span):
            start = depth if n == span[0] else self.agree[n]
            own, column = self.rows[n][start:], len(pack.ids)
            del path[start - depth :]
            if own:
                pack.parts.append((column, len(own), list(path)))
            path += range(column, column + len(own))
            pack.ids.extend(own)
            pack.position.extend(range(start, start + len(own)))
            pack.wanted.append([path[place - depth] for place in self.at[n]])
        return pack


def _agreement(left: list[int], right: list[int]) -> int:
    """How many first tokens are the same."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(n for n in range(size) if left[n] != right[n])


class _Kept:
    """The prefix caches of a node and of those that it continues; others are let go."""

    def __init__(self, system: CausalLM, rows: list[list[int]]) -> None:
        self.model, self.rows = system.model, rows
        self.stack: list[tuple[_Node, PrefixCache]] = []

    def of(self, node: _Node) -> PrefixCache | None:
        """The node's kept tokens; None where there are none."""
        if node.before is None:
            return None
        while self.stack and not (self.stack[-1][0].lo <= node.lo < self.stack[-1][0].hi):
            self.stack.pop()
        if not self.stack or self.stack[-1][0] is not node:
            before = self.of(node.before) or PrefixCache.empty(self.model)
            ids = self.rows[node.lo][before.num_tokens : node.depth]
            self.stack.append((node, before.extended(self.model, ids)))
        return self.stack[-1][1]


def _forward_pass(system: CausalLM, packs: Sequence[_Pack], kept: PrefixCache | None) -> TreePass:
    device = system.device
    width = max(len(pack.ids) for pack in packs)
    ids_BT = torch.full((len(packs), width), pad_id(system))
    at_BT = torch.zeros(len(packs), width, dtype=torch.bool)
    for b, pack in enumerate(packs):
        ids_BT[b, : len(pack.ids)] = torch.tensor(pack.ids)
        at_BT[b, [column for columns in pack.wanted for column in columns]] = True
    inputs: dict[str, Any] = {"input_ids": ids_BT.to(device)}
    depth = 0
    if kept is not None:
        depth, inputs["past_key_values"] = kept.num_tokens, kept.first(kept.num_tokens)
    if any(len(pack.parts) > 1 for pack in packs):
        position_BT = torch.full((len(packs), width), depth)
        for b, pack in enumerate(packs):
            position_BT[b, : len(pack.ids)] = torch.tensor(pack.position)
        seen_BTK = _ancestors(packs, width, depth).to(device)
        inputs |= {
            "position_ids": position_BT.to(device),
            "attention_mask": additive_mask(system.model, seen_BTK)[:, None],
        }
    number_BT = at_BT.flatten().cumsum(0).view_as(at_BT) - 1
    nodes = [number_BT[b, torch.tensor(columns)] for b, pack in enumerate(packs) for columns in pack.wanted]
    return TreePass(inputs, at_BT.to(device), [], nodes)


def _ancestors(packs: Sequence[_Pack], width: int, depth: int) -> Tensor:
    """Which keys each token sees, (B, T, P + T): the kept prefix, the tokens before it in its row, itself."""
    seen_BTK = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
    for b, pack in enumerate(packs):
        for column, size, before in pack.parts:
            own = slice(column, column + size)
            seen_BTK[b, own, own] = torch.ones(size, size, dtype=torch.bool).tril()
            if before:
                row_K = torch.zeros(width, dtype=torch.bool)
                row_K[torch.tensor(before)] = True
                seen_BTK[b, own] |= row_K
    return torch.nn.functional.pad(seen_BTK, (depth, 0), value=True)


_PROBED: WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def tree_works(system: CausalLM, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can share forward passes as a tree; tried once a model."""
    model: Any = system.model
    if not cache_by_position(model, longest):
        return False
    device = torch.device(system.device)
    key = (
        model.config._attn_implementation,
        model.dtype,
        str(device),
        torch.is_autocast_enabled(device.type),
    )
    known = _PROBED.setdefault(model, {})
    if key not in known:
        with without_hooks(model), eval_mode(model):
            # What low precision would hide shows in the weights' own.
            with torch.autocast(device.type, enabled=False):
                works = _probe(system)
            known[key] = works and (not torch.is_autocast_enabled(device.type) or _probe(system))
        if not known[key]:
            logger.info("%s reads every row from its first token", type(model).__name__)
    return known[key]


@torch.no_grad()
def _probe(system: CausalLM) -> bool:
    """Three rows as a tree, alone and behind a kept prefix, against plain forward passes."""
    model: Any = system.model
    # Ids from all over the vocabulary: the lowest are control tokens, whose activations are extreme.
    step = model.config.get_text_config().vocab_size // 11
    rows = [[step * place for place in (1, 2, 3, *tail)] for tail in ((4, 5, 6), (7, 8), (7, 9, 4))]
    tree = _Tree(sorted(rows), [[len(row) - 1] for row in sorted(rows)])
    try:
        plain = [
            model(input_ids=torch.tensor([row], device=system.device)).logits[0, -1] for row in tree.rows
        ]
        want_NV = torch.stack(plain).float()
        gap = torch.zeros(())
        for depth in (0, 2):
            kept = PrefixCache.empty(model).extended(model, rows[0][:depth]) if depth else None
            one = _forward_pass(system, [tree.pack((0, 3), depth)], kept)
            logits_SV = model(**one.inputs, use_cache=False).logits[one.at_BT].float()
            gap = torch.maximum(gap, (logits_SV[torch.cat(one.node_S)] - want_NV).abs().mean(-1).max().cpu())
    except (NeedsError, *PROBE_ERRORS) as error:
        logger.info("%s does not read rows as a tree: %s", type(model).__name__, error)
        return False
    half = model.dtype != torch.float32 or torch.is_autocast_enabled(torch.device(system.device).type)
    return float(gap) <= (0.1 if half else 1e-4) * float(want_NV.std().clamp(min=1e-6))
