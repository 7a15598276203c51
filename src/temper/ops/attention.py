"""Biasing attention towards chosen keys, and reading attention weights of chosen layers.

Both work on whatever the model runs, eager or sdpa, by giving the attention module the mask it
should have: the additive one, built from a bool mask or, where the model gave none, from causality.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.ops.rows import Rows, current_rows
from temper.ops.seen_padding import Pass, past_length, watch_padding
from temper.systems import anchors

__all__ = ["BiasProvider", "attention_bias", "attention_weights"]

BiasProvider = Callable[[Rows], Tensor]
"""Bias over key positions, (B, K) with K at most `rows.key_len`, for the rows of a forward pass."""


@contextmanager
def attention_bias(
    model: nn.Module,
    bias: Tensor | BiasProvider,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Adds a bias over key positions to the attention logits of every query, before the softmax.

    bias     (K,) or (B, K), or a function of the pass's `Rows` that gives one. Column k is the
             row's k-th real token, also under left padding; keys beyond its end get 0.
    layers, heads   where; all by default.

    Adding log(w) makes the weights w * Att / Z: the softmax renormalises. In `generate` rows come
    and go, so a bias that differs by row must be a function; it finds each row's prompt in
    `rows.prompt_ids_B` and its number in `rows.index_B`.
    """
    modules = _attention_modules(model, layers)
    num_heads = model.config.get_text_config().num_attention_heads  # type: ignore[operator,union-attr]
    chosen = None if heads is None else _in_range(heads, num_heads, "head")
    with ExitStack() as stack:
        adder = _Adder(stack.enter_context(watch_padding(model)), bias, chosen, num_heads)
        for module in modules:
            stack.callback(_on_mask(module, adder.add).remove)
        yield


class _Adder:
    """Adds the pass's bias to masks; layers that share a mask share the sum."""

    def __init__(
        self, seen: Pass, bias: Tensor | BiasProvider, heads: list[int] | None, num_heads: int
    ) -> None:
        self.seen, self.bias, self.heads, self.num_heads = seen, bias, heads, num_heads
        self._number = -1
        self._bias_BHK = torch.zeros(0)
        self._sums: list[tuple[Tensor | None, Tensor]] = []

    def add(self, mask: Tensor | None, hidden_BTD: Tensor, key_len: int) -> Tensor:
        if self._number != self.seen.number:
            self._number, self._sums = self.seen.number, []
            self._bias_BHK = self._of_this_pass(hidden_BTD)
        for known, total in self._sums:
            if known is mask:
                return total
        total = _additive(mask, hidden_BTD, key_len) + self._bias_BHK[:, :, None].to(hidden_BTD.dtype)
        self._sums.append((mask, total))
        return total

    def _of_this_pass(self, hidden_BTD: Tensor) -> Tensor:
        rows = self.seen.rows
        assert rows is not None
        num_rows = hidden_BTD.shape[0]
        given = torch.atleast_2d(self.bias if isinstance(self.bias, Tensor) else self.bias(rows))
        if given.shape[0] not in (1, num_rows):
            raise ConfigError(
                f"The attention bias has {given.shape[0]} rows, the batch {num_rows}",
                cure="Give one row, one a batch row, or a function of the rows.",
            )
        given = given.to(hidden_BTD.device, torch.float32).expand(num_rows, -1)
        bias_BK = given.new_zeros(num_rows, rows.key_len)
        for row, pad in enumerate(self.seen.pad_B):
            length = min(given.shape[1], rows.key_len - pad)
            bias_BK[row, pad : pad + length] = given[row, :length]
        if self.heads is None:
            return bias_BK[:, None]
        bias_BHK = given.new_zeros(num_rows, self.num_heads, rows.key_len)
        bias_BHK[:, self.heads] = bias_BK[:, None]
        return bias_BHK


@contextmanager
def attention_weights(
    model: nn.Module,
    layers: Sequence[int],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    grad: bool = False,
) -> Iterator[dict[int, list[Tensor]]]:
    """Attention probabilities of chosen layers, one tensor (B, H, T, K) a forward pass of the block.

    `reduce` is applied at once, so that only what it returns is kept. The chosen layers alone run
    the model's eager attention inside the block; its result may differ from sdpa's by rounding.
    """
    count = len(anchors.layers(model))
    numbers = _in_range(layers, count, "layer")
    modules = _attention_modules(model, numbers)
    kept: dict[int, list[Tensor]] = {number: [] for number in numbers}
    with ExitStack() as stack:
        for number, module in zip(numbers, modules, strict=True):
            stack.enter_context(_eager(module))
            stack.callback(_on_mask(module, _additive).remove)

            def keep(_: nn.Module, args: Any, output: Any, store: list[Tensor] = kept[number]) -> None:
                weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if weights is None:
                    raise ModelError("An attention layer gives no weights", where=type(_).__name__)
                weights = weights if grad else weights.detach()
                store.append(weights if reduce is None else reduce(weights))

            stack.callback(module.register_forward_hook(keep).remove)
        yield kept


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """The module alone believes that the model runs eager attention."""
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError("An attention layer does not know its config", where=type(module).__name__)
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        module.config = config


def _attention_modules(model: Any, layers: Sequence[int] | None) -> list[nn.Module]:
    kind = getattr(model.config, "_attn_implementation", "eager")
    if kind not in ("eager", "sdpa"):
        raise NeedsError(
            f"Attention runs {kind!r}, which takes no additive mask",
            cure='Load the model with attention="sdpa".',
        )
    all_layers = anchors.layers(model)
    numbers = range(len(all_layers)) if layers is None else _in_range(layers, len(all_layers), "layer")
    return [anchors.attention(all_layers[number]) for number in numbers]


def _in_range(numbers: Sequence[int], count: int, what: str) -> list[int]:
    wanted = [number + count if number < 0 else number for number in numbers]
    wrong = [n for n, w in zip(numbers, wanted, strict=True) if not 0 <= w < count]
    if wrong or not wanted:
        raise ConfigError(
            f"There is no {what} {', '.join(map(str, wrong))}" if wrong else f"No {what} was named",
            cure=f"{what.capitalize()}s go from 0 to {count - 1}.",
        )
    return sorted(set(wanted))


def _on_mask(module: nn.Module, change: Callable[[Tensor | None, Tensor, int], Tensor]) -> Any:
    """Registers `change(mask, hidden_BTD, key_len)` as what the attention module gets for its mask."""
    names = list(inspect.signature(module.forward).parameters)
    if "attention_mask" not in names:
        raise ModelError("An attention layer takes no attention_mask", where=type(module).__name__)
    place = names.index("attention_mask")

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        positional = place < len(args)
        mask = args[place] if positional else kwargs.get("attention_mask")
        published = current_rows()
        past = past_length([*args[1:], *kwargs.values()], getattr(module, "layer_idx", 0))
        key_len = published.key_len if published else past + hidden_BTD.shape[1]
        mask = change(mask, hidden_BTD, key_len)
        if positional:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, kwargs | {"attention_mask": mask}

    return module.register_forward_pre_hook(replace, with_kwargs=True)


def _additive(mask: Tensor | None, hidden_BTD: Tensor, key_len: int) -> Tensor:
    """The float mask, (B or 1, heads or 1, T, K), that says what `mask` says; None means causal."""
    if mask is not None and mask.dtype != torch.bool:
        return mask
    if mask is None:
        num_queries = hidden_BTD.shape[1]
        key_K = torch.arange(key_len, device=hidden_BTD.device)
        query_T1 = torch.arange(key_len - num_queries, key_len, device=hidden_BTD.device)[:, None]
        mask = (key_K <= query_T1)[None, None]
    lowest = torch.finfo(hidden_BTD.dtype).min
    return torch.zeros(mask.shape, dtype=hidden_BTD.dtype, device=mask.device).masked_fill_(~mask, lowest)
