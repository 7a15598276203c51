"""Losses and gradients of a slot's ids: every candidate scored exactly, at the price of its changed end.

Ids: before (P tokens) | slot (N) | after | target (M). A candidate that differs from the current slot first at position
f has the current slot's keys and values up to P + f, so only the tokens from there on run:

    position     0 .. P-1 | P .. P+f-1 | P+f .. P+N-1 | after | target[:-1]
                 kept: `before`, once   kept: this step,    run, for every candidate
                           from the gradient
    predicted by the last M of these positions: target[0] .. target[M-1]

Candidates are sorted by f and scored in batches. Where the model's attention can be ours, a batch is packed: every row
has its own f and no token is run in vain; elsewhere a batch starts at the least f of its rows. Only the target's
positions (and the slot's own, when its fluency counts) reach the vocabulary projection. The slow twin is
`reuse_prefix=False`: whole rows from position 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from temper.core.errors import NeedsError
from temper.core.types import Run
from temper.ops.decode_backends import cache_by_position
from temper.ops.hooks import is_hooked
from temper.ops.precision import autocast, eval_mode, float32_products
from temper.ops.prefix_cache import PrefixCache, packed, read_once
from temper.ops.projection import CHUNK_LOGITS, head_is_plain, head_of, selected_logits, wanted_hidden
from temper.ops.search import embedding_table, project_on_tokens
from temper.ops.search_prompt import SlotPrompt
from temper.systems.local import PROBE_ERRORS

__all__ = ["Scores", "SlotLoss", "SlotScorer", "mean_nll", "mellowmax"]

logger = logging.getLogger(__name__)

FILL_TOKENS = 512
"""On a CPU a batch of this many tokens is as fast per token as any larger one."""
Reading = Literal["packed", "once", "copies"]
"""How kept keys and values are read: by packed rows, by rows of one length, or copied to each row."""
HALF_SCALE = 2.0**-10
"""What a half-precision loss is scaled by when its gradient overflows."""


class Scores(NamedTuple):
    """Each candidate's loss, float32, and whether the target is the likeliest token at each of its positions."""

    loss_K: Tensor
    hit_K: Tensor


def mean_nll(logits_BMV: Tensor, target_BM: Tensor) -> Tensor:
    """-(1/M) sum_i log p(target_i), (B,), in nats per token."""
    return (logits_BMV.logsumexp(-1) - logits_BMV.gather(-1, target_BM[..., None])[..., 0]).mean(-1)


def mellowmax(logits_BMV: Tensor, target_BM: Tensor, alpha: float) -> Tensor:
    """(1/alpha) [logsumexp_i(alpha z_i) - log M], z_i = minus the target's raw logit, (B,)."""
    z_BM = -logits_BMV.gather(-1, target_BM[..., None])[..., 0]
    count = torch.tensor(float(z_BM.shape[-1]), device=z_BM.device)
    return ((alpha * z_BM).logsumexp(-1) - count.log()) / alpha


@dataclass(frozen=True, kw_only=True)
class SlotLoss:
    """What a slot is scored by; the control term, the slot's own mean NLL, is not in the gradient."""

    kind: Literal["nll", "mellowmax"] = "nll"
    alpha: float = 1.0
    target_weight: float = 1.0
    control_weight: float = 0.0

    def of_target(self, logits_BMV: Tensor, target_BM: Tensor) -> Tensor:
        """The target's loss, (B,)."""
        if self.kind == "mellowmax":
            return mellowmax(logits_BMV, target_BM, self.alpha)
        return mean_nll(logits_BMV, target_BM)


class SlotScorer:
    """Losses of one prompt's target as a function of the slot's ids.

    `tokens` and `queries` count what was run. `max_rows` is the batch size that fitted, once memory ran out.
    Rows share nothing but the prefix; in exact mode each runs alone.
    """

    def __init__(self, prompt: SlotPrompt, loss: SlotLoss, run: Run, *, reuse_prefix: bool = True) -> None:
        self.prompt, self.loss, self.run = prompt, loss, run
        self.model: Any = prompt.system.model
        self.device = prompt.system.device
        self.tokens = self.queries = 0
        self.max_rows: int | None = None
        self._reuse = reuse_prefix
        self._checked = False
        self._reading: Reading = "packed"
        self._before: PrefixCache | None = None
        self._slot: tuple[list[int], PrefixCache] | None = None
        self._tail = torch.tensor([*prompt.after, *prompt.target[:-1]], dtype=torch.long)
        self._head = torch.tensor(prompt.before, dtype=torch.long)

    @property
    def reuses_prefix(self) -> bool:
        """Whether keys and values are kept; not for models where that was seen to change the losses, nor where a hook
        looks into the forward pass, for what it does may depend on the whole text.
        """
        return self._reuse and not is_hooked(self.model)

    def most_tokens(self, num_rows: int, num_slot: int) -> int:
        """What one call of `losses` with so many candidates can add to `tokens`."""
        before, whole = len(self._head), len(self._head) + num_slot + len(self._tail)
        if not self.reuses_prefix:
            return num_rows * whole
        end = whole - before + bool(self.loss.control_weight)
        kept = before + num_slot
        if self._checked:
            return kept + num_rows * end
        # Two fresh rows, every way to read kept keys and values, and all rows anew where none gives the fresh losses.
        return 2 * whole + len(get_args(Reading)) * (kept + num_rows * end) + num_rows * whole

    def gradient(self, ids_N: Sequence[int]) -> Tensor:
        """dL/dO for the slot's one-hot rows O, (N, V), float32."""
        num = len(ids_N)
        with self._passes():
            cache = self._kept_before().recorder() if self.reuses_prefix and self._checked else None
        start = cache.num_tokens if cache is not None else 0
        row_1T = self._rows(torch.tensor([list(ids_N)]))[:, start:]
        self.tokens += row_1T.shape[1]
        grad_TD = self._embedding_gradient(row_1T, cache, start, num)
        if cache is not None:
            self._slot = list(ids_N), cache.recorded()
        at = len(self.prompt.before) - start
        return project_on_tokens(grad_TD[at : at + num], embedding_table(self.model))

    def _embedding_gradient(self, row_1T: Tensor, cache: PrefixCache | None, start: int, num: int) -> Tensor:
        """Gradient of the target's loss by each token's embedding, (T, D), float32."""
        caught: list[Tensor] = []

        def cut(module: Any, args: Any, out: Tensor) -> Tensor:
            caught.append(out.detach().requires_grad_())
            return caught[0]

        handle = self.model.get_input_embeddings().register_forward_hook(cut)
        try:
            with self._passes(), torch.enable_grad():
                at_1T = self._marks(num, start, row_1T.shape[1], slot=False)[None]
                logits = selected_logits(self.model, self._inputs(row_1T, cache), at_1T)
                loss = self.loss.of_target(logits.float()[None], self._targets(1)).sum()
                half = logits.dtype == torch.float16
                (grad,) = torch.autograd.grad(loss, caught[0], retain_graph=half)
                if half and not bool(torch.isfinite(grad).all()):
                    (grad,) = torch.autograd.grad(loss * HALF_SCALE, caught[0])
                    return grad[0].float() / HALF_SCALE
        finally:
            handle.remove()
        return grad[0].float()

    @torch.no_grad()
    def losses(self, ids_KN: Tensor, current_N: Sequence[int]) -> Scores:
        """The candidates' losses; what they share with the current slot is run once."""
        self.queries += len(ids_KN)
        with self._passes():
            if not self.reuses_prefix:
                return self._whole(ids_KN)
            if self._checked:
                return self._cached(ids_KN, current_N)
            return self._first_time(ids_KN, current_N)

    def _first_time(self, ids_KN: Tensor, current_N: Sequence[int]) -> Scores:
        """Kept keys and values are trusted after they gave the losses of a fresh pass."""
        self._checked = True
        fresh = self._whole(ids_KN[[0, -1]])
        for self._reading in get_args(Reading):
            found = self._if_near(ids_KN, current_N, fresh)
            if found is not None:
                return found
        self._reuse = False
        logger.warning(
            "%s is scored without kept keys and values (they change its losses)", type(self.model).__name__
        )
        return self._whole(ids_KN)

    def _if_near(self, ids_KN: Tensor, current_N: Sequence[int], fresh: Scores) -> Scores | None:
        """The losses on kept keys and values, if the first and the last agree with `fresh`."""
        tolerance = _tolerance(self.prompt.system.dtype, self.run)
        try:
            found = self._cached(ids_KN, current_N)
        except (NeedsError, *PROBE_ERRORS) as error:
            if _is_out_of_memory(error):
                raise
            return None
        near = torch.allclose(found.loss_K[[0, -1]], fresh.loss_K, rtol=tolerance, atol=tolerance)
        return found if near else None

    def _cached(self, ids_KN: Tensor, current_N: Sequence[int]) -> Scores:
        num = ids_KN.shape[1]
        changed_KN = ids_KN != torch.tensor(list(current_N))
        # A candidate equal to the current slot still needs its last position.
        first_K = torch.where(changed_KN.any(1), changed_KN.int().argmax(1), num - 1)
        if self.loss.control_weight:
            first_K = torch.zeros_like(first_K)
        order_K = first_K.argsort(stable=True)
        # In exact mode the kept part may not depend on the other candidates.
        cache = self._kept_slot(list(current_N), num - 1 if self.run.exact else int(first_K.max()))
        shift = len(self.prompt.before) - bool(self.loss.control_weight)
        starts = [max(shift + first, 0) for first in first_K[order_K].tolist()]
        parts = [
            self._score(ids_KN[order_K[rows]], starts[rows], cache)
            for rows in self._batches(starts, len(self._head) + num + len(self._tail))
        ]
        return _in_order(parts, order_K)

    def _whole(self, ids_KN: Tensor) -> Scores:
        """The slow twin: whole rows."""
        size = self._row_limit(len(self._head) + ids_KN.shape[1] + len(self._tail))
        parts = [self._score(ids, [0] * len(ids), None) for ids in ids_KN.split(size)]
        return _in_order(parts, torch.arange(len(ids_KN)))

    def _batches(self, starts: list[int], end: int) -> Iterator[slice]:
        """Consecutive rows for one pass; `starts` ascend."""
        packs = self._packs(end)
        fill = FILL_TOKENS if self.device.type == "cpu" else self.run.batch_tokens
        first = 0
        while first < len(starts):
            limit, last = self._row_limit(end - starts[first]), first + 1
            tokens = end - starts[first]
            while last < len(starts) and last - first < limit:
                if tokens >= fill and (packs or starts[last] != starts[first]):
                    break
                tokens += end - starts[last if packs else first]
                last += 1
            yield slice(first, last)
            first = last

    def _packs(self, num_tokens: int) -> bool:
        """Whether every layer sees all of a row of so many tokens, by the attention that packs."""
        plain = self.model.config.get_text_config()._attn_implementation == "sdpa"
        return self._reading == "packed" and plain and cache_by_position(self.model, num_tokens)

    def _row_limit(self, width: int) -> int:
        """Rows of `width` tokens in one forward pass."""
        if self.run.exact:
            return 1
        size = max(1, self.run.batch_tokens // max(width, 1))
        if not head_is_plain(self.model):  # all their logits exist at once there
            size = min(size, 4 * CHUNK_LOGITS // (width * self.prompt.system.num_embeddings))
        return max(1, min(size, self.max_rows or size))

    def _score(self, ids_BN: Tensor, starts: list[int], cache: PrefixCache | None) -> Scores:
        """One forward pass from positions `starts`; in halves where memory runs out, and from then on."""
        try:
            return self._pass(ids_BN, starts, cache)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if len(ids_BN) == 1:
                raise NeedsError(
                    "Memory ran out with a single candidate",
                    where=f"{self.prompt.system.spec}, {self.device}",
                    cure="Use a smaller model, a shorter prompt, or another device.",
                ) from error
        size = self.max_rows = (len(ids_BN) + 1) // 2
        logger.warning("out of memory: candidates go %d at a time from here on", self.max_rows)
        halves = [
            self._score(ids_BN[:size], starts[:size], cache),
            self._score(ids_BN[size:], starts[size:], cache),
        ]
        return _in_order(halves, torch.arange(len(ids_BN)))

    def _pass(self, ids_BN: Tensor, starts: list[int], cache: PrefixCache | None) -> Scores:
        start, num_rows = starts[0], len(ids_BN)
        rows_BT = self._rows(ids_BN)
        end = rows_BT.shape[1]
        rows_BT = rows_BT[:, start:]
        at_T = self._marks(ids_BN.shape[1], start, end - start, slot=bool(self.loss.control_weight))
        at_BT = at_T.expand(num_rows, -1)
        packs = starts[-1] > start and self._packs(end)
        kept = starts[-1] if packs else start
        cache = cache.first(kept) if cache is not None and kept else None
        inputs, rows = self._inputs(rows_BT, cache), None
        if packs:
            rows = packed(starts, end, self.device)
            at_BT = at_BT.flatten()[rows.place_S][None]
            inputs["input_ids"] = rows_BT.flatten()[rows.place_S][None]
            inputs["position_ids"] = rows.position_S[None]
            inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        once = self._reading != "copies"
        reads = read_once(self.model, cache, rows) if cache is not None and once else nullcontext()
        losses, hits = [], []
        with reads:
            for part, logits_BSV in self._logits(inputs, at_BT, num_rows):
                loss_B, hit_B = self._judged(logits_BSV.float(), ids_BN[part].to(self.device))
                losses.append(loss_B)
                hits.append(hit_B)
        self.tokens += inputs["input_ids"].numel()
        return Scores(torch.cat(losses).cpu(), torch.cat(hits).cpu())

    def _logits(self, inputs: dict[str, Any], at_BT: Tensor, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """The logits at the marked positions, (rows, S, V), a chunk of rows at a time."""
        if not head_is_plain(self.model):
            logits_SV = selected_logits(self.model, inputs, at_BT)
            yield slice(0, num_rows), logits_SV.unflatten(0, (num_rows, -1))
            return
        hidden = wanted_hidden(self.model, inputs, at_BT)
        hidden_BSD = hidden.hidden_SD.unflatten(0, (num_rows, -1))
        size = max(1, CHUNK_LOGITS // (hidden.num_ids * hidden_BSD.shape[1]))
        head = head_of(self.model)
        for first in range(0, num_rows, size):
            part = slice(first, first + size)
            yield part, head(hidden_BSD[part])

    def _judged(self, logits_BSV: Tensor, ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each row, and whether it hits the target."""
        num_target = len(self.prompt.target)
        logits_BMV = logits_BSV[:, -num_target:]
        target_BM = self._targets(len(ids_BN))
        loss_B = self.loss.target_weight * self.loss.of_target(logits_BMV, target_BM)
        if self.loss.control_weight:
            num_slot = logits_BSV.shape[1] - num_target
            loss_B = loss_B + self.loss.control_weight * mean_nll(
                logits_BSV[:, :num_slot], ids_BN[:, -num_slot:]
            )
        best_BM = logits_BMV.amax(-1)
        hit_BM = logits_BMV.gather(-1, target_BM[..., None])[..., 0] >= best_BM
        return loss_B, hit_BM.all(-1)

    def _rows(self, ids_BN: Tensor) -> Tensor:
        """The rows before | slot | after | target[:-1] for each candidate, on the model's device."""
        num = len(ids_BN)
        parts = [self._head.expand(num, -1), ids_BN, self._tail.expand(num, -1)]
        return torch.cat(parts, dim=1).to(self.device)

    def _marks(self, num: int, start: int, width: int, *, slot: bool) -> Tensor:
        """Positions whose next token is scored, (T,): the target's, and with `slot` the slot's own."""
        at_T = torch.zeros(width, dtype=torch.bool, device=self.device)
        at_T[width - len(self.prompt.target) :] = True
        if slot:
            first = max(len(self._head) - 1 - start, 0)
            at_T[first : len(self._head) - 1 - start + num] = True
        return at_T

    def _targets(self, num: int) -> Tensor:
        return torch.tensor(self.prompt.target, device=self.device).expand(num, -1)

    def _inputs(self, rows_BT: Tensor, cache: PrefixCache | None) -> dict[str, Any]:
        return {"input_ids": rows_BT} if cache is None else {"input_ids": rows_BT, "past_key_values": cache}

    def _kept_before(self) -> PrefixCache:
        """Keys and values of what stands before the slot, run once."""
        if self._before is None:
            self._before = PrefixCache.empty(self.model).extended(self.model, self.prompt.before)
            self.tokens += len(self.prompt.before)
        return self._before

    def _kept_slot(self, current_N: list[int], num_tokens: int) -> PrefixCache:
        """Keys and values up to the slot's token `num_tokens`, or beyond where a gradient was taken on this slot."""
        if self._slot is not None and self._slot[0] == current_N:
            return self._slot[1]
        self.tokens += num_tokens
        return self._kept_before().extended(self.model, current_N[:num_tokens])

    @contextmanager
    def _passes(self) -> Iterator[None]:
        with eval_mode(self.model), autocast(self.run), float32_products(self.run):
            yield


def _in_order(parts: Sequence[Scores], order_K: Tensor) -> Scores:
    """Batches of scores as one, each back in its place."""
    loss_K, hit_K = torch.cat([part.loss_K for part in parts]), torch.cat([part.hit_K for part in parts])
    place_K = order_K.argsort()
    return Scores(loss_K[place_K], hit_K[place_K])


def _tolerance(dtype: torch.dtype, run: Run) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) and run.precision == "float32" else 0.1


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
