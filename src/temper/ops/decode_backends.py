"""The two ways a model is run while it writes: rows together in slots, or one row after another.

`SlotBackend` prefills several prompts at once and decodes all rows in one forward pass. It is used
when the model's cache is keys and values by position and a short probe on the model itself gives
the same logits as its plain forward pass. `RowBackend` keeps the model's own cache, one row a
forward pass: for every other cache, and for exact mode, where a row's numbers may not depend on
its neighbours even in the last bit. It reads all weights once a row and token, so a step of B
rows costs about B steps of one row.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from temper.ops.decode_cache import SlotCache, attend_by_spans
from temper.ops.rows import Rows, publish_rows
from temper.systems.local import PROBE_ERRORS

__all__ = [
    "Backend",
    "Prefilled",
    "PromptRow",
    "RowBackend",
    "SlotBackend",
    "additive_mask",
    "cache_by_position",
    "last_positions",
    "slots_work",
    "without_hooks",
]

logger = logging.getLogger(__name__)


class PromptRow(NamedTuple):
    """A prompt and its number among those given."""

    number: int
    ids: list[int]


class Prefilled(NamedTuple):
    """A prompt whose keys and values are known, and the logits of its first reply token."""

    prompt: PromptRow
    cache: Any
    row: int
    logits_V: Tensor


class Backend(Protocol):
    """Rows are numbered 0..n-1; `drop` fills the hole with the last one.

    A row that steps or reads a block at an earlier position forgets what stood there and beyond.
    """

    def prefill(self, prompts: Sequence[PromptRow]) -> list[Prefilled]: ...
    def load(self, slot: int, prefilled: Prefilled) -> None: ...
    def step(self, prompts: list[PromptRow], tokens: list[int], positions: list[int]) -> Tensor: ...
    def block(self, prompts: list[PromptRow], blocks: list[list[int]], starts: list[int]) -> list[Tensor]: ...
    def drop(self, slot: int, last: int, last_length: int) -> None: ...


class RowBackend:
    """One row a forward pass, with the model's own cache, or none where it has none or is not to `keep` it.

    Only a cache of keys and values by position can forget tokens again.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, keep: bool = True) -> None:
        self.model, self.device, self.keep = model, device, keep
        self.caches: list[Any] = []

    def prefill(self, prompts: Sequence[PromptRow]) -> list[Prefilled]:
        """Each prompt on its own."""
        out = []
        for prompt in prompts:
            logits_TV, cache = self._forward(prompt, prompt.ids, 0, None)
            known = list(prompt.ids) if cache is None or not self.keep else cache
            out.append(Prefilled(prompt, known, 0, logits_TV[-1]))
        return out

    def load(self, slot: int, prefilled: Prefilled) -> None:
        """A forward pass changes its cache in place, so each row gets a copy."""
        assert slot == len(self.caches)
        self.caches.append(copy.deepcopy(prefilled.cache))

    def step(self, prompts: list[PromptRow], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits of the next token, (B, V)."""
        rows = zip(range(len(prompts)), prompts, [[token] for token in tokens], positions, strict=True)
        return torch.stack([self._read(*row)[-1] for row in rows])

    def block(self, prompts: list[PromptRow], blocks: list[list[int]], starts: list[int]) -> list[Tensor]:
        """Logits after each token of each row's block, (T, V) a row."""
        rows = zip(range(len(prompts)), prompts, blocks, starts, strict=True)
        return [self._read(*row, num_last=len(row[2])) for row in rows]

    def _read(self, slot: int, prompt: PromptRow, ids: list[int], start: int, num_last: int = 1) -> Tensor:
        cache = self.caches[slot]
        if isinstance(cache, list):
            cache[start:] = ids
            return self._forward(prompt, cache, 0, None, num_last)[0]
        if (extra := cache.get_seq_length() - start) > 0:
            cache.crop(-extra)  # a negative number is how many to forget
        logits_TV, self.caches[slot] = self._forward(prompt, ids, start, cache, num_last)
        return logits_TV

    def drop(self, slot: int, last: int, last_length: int) -> None:
        """Forget a row; the last one takes its place."""
        self.caches[slot] = self.caches[last]
        self.caches.pop()

    def _forward(
        self, prompt: PromptRow, ids: list[int], start: int, cache: Any, num_last: int = 1
    ) -> tuple[Tensor, Any]:
        rows = Rows([prompt.number], [prompt.ids], [start], [len(ids)], start + len(ids))
        input_BT = torch.tensor([ids], device=self.device)
        known = {} if cache is None else {"past_key_values": cache}
        last_B = torch.tensor([len(ids) - 1]) if num_last == 1 else None
        with publish_rows(rows), last_positions(self.model, last_B):
            out = self.model(input_ids=input_BT, use_cache=True, **known)
        return out.logits[0, -num_last:].float(), getattr(out, "past_key_values", None)


class SlotBackend:
    """All rows in one forward pass, each in its slot of a `SlotCache`."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, width: int, prefix: Sequence[int] = ()
    ) -> None:
        self.model, self.device, self.width = model, device, width
        self.prefix = list(prefix)
        self._prefix_cache: DynamicCache | None = None
        self._slots: SlotCache | None = None

    def prefill(self, prompts: Sequence[PromptRow]) -> list[Prefilled]:
        """The prompts side by side, padded on the right: under a causal mask no token sees padding."""
        skip = len(self.prefix)
        lengths = [len(prompt.ids) - skip for prompt in prompts]
        tails = [torch.tensor(prompt.ids[skip:]) for prompt in prompts]
        input_BT = pad_sequence(tails, batch_first=True).to(self.device)
        cache = self._expanded_prefix(len(prompts))
        rows = Rows(*_named(prompts), [skip] * len(prompts), lengths, skip + input_BT.shape[1])
        logits_BV = self._forward(rows, input_BT, cache, torch.tensor(lengths, device=self.device) - 1)
        return [Prefilled(prompt, cache, row, logits_BV[row]) for row, prompt in enumerate(prompts)]

    def _expanded_prefix(self, num_rows: int) -> DynamicCache:
        cache = DynamicCache()
        if not self.prefix:
            return cache
        if self._prefix_cache is None:
            self._prefix_cache = DynamicCache()
            rows = Rows([-1], [self.prefix], [0], [len(self.prefix)], len(self.prefix))
            input_BT = torch.tensor([self.prefix], device=self.device)
            self._forward(rows, input_BT, self._prefix_cache, torch.zeros(1, dtype=torch.long))
        layers: list[Any] = list(self._prefix_cache.layers)
        for number, layer in enumerate(layers):
            shape = (num_rows, -1, -1, -1)
            cache.update(layer.keys.expand(shape), layer.values.expand(shape), number)
        return cache

    def load(self, slot: int, prefilled: Prefilled) -> None:
        """Copy a prefilled prompt's keys and values into a slot."""
        layers, length = prefilled.cache.layers, len(prefilled.prompt.ids)
        if self._slots is None:
            self._slots = SlotCache(len(layers), self.width)
        keys_L = [layer.keys[prefilled.row, :, :length] for layer in layers]
        values_L = [layer.values[prefilled.row, :, :length] for layer in layers]
        self._slots.load(slot, keys_L, values_L)

    def step(self, prompts: list[PromptRow], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits of the next token, (B, V), after writing each row's last token at its position."""
        assert self._slots is not None
        position_B1 = self._slots.begin_pass([[position] for position in positions], self.device)
        mask = None
        if min(positions) != max(positions):
            seen_BK = torch.arange(max(positions) + 1, device=self.device) <= position_B1
            mask = additive_mask(self.model, seen_BK)[:, None, None]
        rows = Rows(*_named(prompts), positions, [1] * len(prompts), max(positions) + 1)
        input_B1 = torch.tensor(tokens, device=self.device)[:, None]
        with attend_by_spans(self.model, positions):
            return self._forward(
                rows, input_B1, self._slots, None, position_ids=position_B1, attention_mask=mask
            )

    def block(self, prompts: list[PromptRow], blocks: list[list[int]], starts: list[int]) -> list[Tensor]:
        """Logits after each token of each row's block, (T, V) a row, in one forward pass."""
        assert self._slots is not None
        longest = max(map(len, blocks))
        # A row with fewer tokens writes its last one again where it stands.
        at_BT = [[min(t, len(block) - 1) for t in range(longest)] for block in blocks]
        ids_BT = [[block[t] for t in at_T] for block, at_T in zip(blocks, at_BT, strict=True)]
        positions = [[start + t for t in at_T] for start, at_T in zip(starts, at_BT, strict=True)]
        position_BT = self._slots.begin_pass(positions, self.device)
        key_len = self._slots.plan.key_len
        seen_BTK = torch.arange(key_len, device=self.device) <= position_BT[:, :, None]
        with publish_rows(Rows(*_named(prompts), starts, list(map(len, blocks)), key_len)):
            out = self.model(
                input_ids=torch.tensor(ids_BT, device=self.device),
                past_key_values=self._slots,
                use_cache=True,
                position_ids=position_BT,
                attention_mask=additive_mask(self.model, seen_BTK)[:, None],
            )
        return [out.logits[row, : len(block)].float() for row, block in enumerate(blocks)]

    def drop(self, slot: int, last: int, last_length: int) -> None:
        """Forget a row; the last one moves into its slot."""
        if slot != last and self._slots is not None:
            self._slots.move(last, slot, last_length)

    def _forward(
        self, rows: Rows, input_BT: Tensor, cache: Any, last_B: Tensor | None, **kwargs: Any
    ) -> Tensor:
        with publish_rows(rows), last_positions(self.model, last_B):
            out = self.model(input_ids=input_BT, past_key_values=cache, use_cache=True, **kwargs)
        return out.logits[:, -1].float()


def additive_mask(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """0 where a key is seen and the least number elsewhere, in the model's type; any attention takes it."""
    # Under autocast queries change their type on the way; a bool mask fits any.
    if torch.is_autocast_enabled(seen.device.type):
        return seen
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(model.dtype).min
    )


def _named(prompts: Sequence[PromptRow]) -> tuple[list[int], list[list[int]]]:
    return [prompt.number for prompt in prompts], [prompt.ids for prompt in prompts]


@contextmanager
def last_positions(model: PreTrainedModel, last_B: Tensor | None) -> Iterator[None]:
    """Inside the block only column `last_B[b]` of row b reaches the vocabulary projection."""
    if last_B is None:
        yield
        return

    def cut(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        return (hidden_BTD[rows_B, last_B.to(hidden_BTD.device)][:, None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


_PROBED: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def slots_work(model: PreTrainedModel, device: torch.device, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can share forward passes; probed once a model."""
    if not cache_by_position(model, longest):
        return False
    key = (
        model.config._attn_implementation,
        model.dtype,
        str(device),
        torch.is_autocast_enabled(device.type),
    )
    known = _PROBED.setdefault(model, {})
    if key not in known:
        with without_hooks(model):
            known[key] = _probe(model, device)
        if not known[key]:
            logger.warning("%s decodes one row at a time (batched decoding differs)", type(model).__name__)
    return known[key]


def cache_by_position(model: PreTrainedModel, longest: int) -> bool:
    """Whether the model's cache is keys and values, all of them kept for rows of up to `longest` tokens."""
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if windows and longest > min(windows):
        return False
    return getattr(model.config, "_attn_implementation", "") in ("sdpa", "eager")


@contextmanager
def without_hooks(model: PreTrainedModel) -> Iterator[None]:
    """The bare model: a hook may count its calls, or know only the prompts it was made for."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for module, _, _ in kept:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


@torch.no_grad()
def _probe(model: PreTrainedModel, device: torch.device) -> bool:
    """Two rows of unequal length, prefilled and stepped in slots, against plain forward passes."""
    size = model.config.get_text_config().vocab_size
    texts = [[(7 * i + 3) % size for i in range(5)], [(5 * i + 1) % size for i in range(3)]]
    prompts = [PromptRow(number, ids[:-1]) for number, ids in enumerate(texts)]
    try:
        backend = SlotBackend(model, device, len(prompts))
        for slot, prefilled in enumerate(backend.prefill(prompts)):
            backend.load(slot, prefilled)
        got_BV = backend.step(prompts, [ids[-1] for ids in texts], [len(ids) - 1 for ids in texts])
        plain = [model(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in texts]
    except PROBE_ERRORS as error:
        logger.warning("batched decoding fails on %s: %s", type(model).__name__, error)
        return False
    want_BV = torch.stack([out.logits[0, -1].float() for out in plain])
    half = model.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    tolerance = (5e-2 if half else 1e-4) * float(want_BV.abs().max().clamp(min=1e-6))
    return bool((got_BV - want_BV).abs().max() <= tolerance)
