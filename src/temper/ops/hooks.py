"""Reading and changing what flows through a model, by names that mean the same in every architecture.

A site is `embeddings.output`, `layers.5.input`, `layers.5.output`, `layers.5.attention.output`,
`layers.5.mlp.input`, `final_norm.output`, `head.input`...; `layers.-1` counts from the end,
`layers.*` means every layer. `embeddings` alone is its output. All names are resolved before the
first hook, hooks leave with the block also after an error, and the model is then as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, ModelError, nearest
from temper.ops.attention import attention_bias, attention_weights
from temper.ops.rows import Rows, current_rows
from temper.ops.seen_padding import watch_padding
from temper.systems import anchors

__all__ = [
    "Captured",
    "Rows",
    "Site",
    "attention_bias",
    "attention_weights",
    "capture",
    "current_rows",
    "edit",
    "is_hooked",
    "resolve_site",
    "site_names",
]

Edit = Callable[[Tensor], Tensor | None]
"""Hidden states in, hidden states out; None leaves them as they are."""

Positions = None | Literal["last"] | int | Sequence[int] | Tensor


TRANSFORMERS_OWN = "transformers.utils.output_capturing"
"""Hooks that transformers leaves behind once hidden states or attentions were asked for; idle until asked again."""


def is_hooked(model: nn.Module) -> bool:
    """Whether anybody looks into the forward pass; then what a prefix does may depend on what follows it."""
    return any(
        hook.__module__ != TRANSFORMERS_OWN
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


class Site(NamedTuple):
    """A place in a model: a module's input or its output."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]


def site_names(model: nn.Module) -> list[str]:
    """Every site name of a model."""
    count = len(anchors.layers(model))
    parts = ["embeddings", "final_norm", "head"]
    for number in range(count):
        parts += [f"layers.{number}{inner}" for inner in ("", ".attention", ".mlp")]
    return [f"{part}.{side}" for part in parts for side in ("input", "output")]


def resolve_site(model: nn.Module, name: str) -> list[Site]:
    """The places a name stands for, `*` giving one a layer; raises ConfigError with the nearest names."""
    wanted = f"{name}.output" if name == "embeddings" else name
    match = re.fullmatch(r"layers\.(\*|-?\d+)((?:\.attention|\.mlp)?)\.(input|output)", wanted)
    if match:
        where, inner, side = match.groups()
        count = len(anchors.layers(model))
        numbers = range(count) if where == "*" else [int(where) + count if int(where) < 0 else int(where)]
        if all(0 <= number < count for number in numbers):
            return [_layer_site(model, number, inner, side) for number in numbers]
    else:
        found = re.fullmatch(r"(embeddings|final_norm|head)\.(input|output)", wanted)
        if found:
            module = getattr(anchors, found[1])(model)
            return [Site(wanted, module, "input" if found[2] == "input" else "output")]
    raise ConfigError(
        f"There is no site {name!r}",
        where=f"{type(model).__name__} with {len(anchors.layers(model))} layers",
        cure=nearest(name, site_names(model)),
    )


def _layer_site(model: nn.Module, number: int, inner: str, side: str) -> Site:
    module = anchors.layers(model)[number]
    if inner == ".attention":
        module = anchors.attention(module)
    elif inner == ".mlp":
        module = anchors.mlp(module)
    return Site(f"layers.{number}{inner}.{side}", module, "input" if side == "input" else "output")


def _resolve_all(model: nn.Module, names: Sequence[str]) -> list[Site]:
    if not names:
        raise ConfigError("No site was named", cure='Name at least one, e.g. "layers.5.output".')
    sites = [site for name in names for site in resolve_site(model, name)]
    twice = {site.name for site in sites if [other.name for other in sites].count(site.name) > 1}
    if twice:
        raise ConfigError(f"A site is named twice: {', '.join(sorted(twice))}", cure="Keep one.")
    return sites


class Captured(Mapping[str, Tensor]):
    """Captured hidden states by site: `captured[site]` joins forward passes along the batch."""

    def __init__(self, names: Sequence[str]) -> None:
        self.passes: dict[str, list[Tensor]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.passes:
            raise ConfigError(f"{name!r} was not captured", cure=nearest(name, self.passes))
        found = self.passes[name]
        if not found:
            raise ModelError(f"{name!r} saw no forward pass", cure="Run the model inside the block.")
        if len({tensor.shape[1:] for tensor in found}) > 1:
            raise ModelError(
                f"Forward passes of {name!r} differ in shape",
                cure="Read `.passes`, or capture chosen positions.",
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


@contextmanager
def capture(
    model: nn.Module, sites: Sequence[str], positions: Positions = None, *, grad: bool = False
) -> Iterator[Captured]:
    """Keeps the hidden states of every forward pass in the block at `sites`.

    positions   None: all, (B, T, D); "last": each row's last real token, (B, D); one index: (B, D);
                a list: (B, len, D); a tensor (B,): one position a row, (B, D). They are columns of
                the pass at hand.
    grad        keep the graph; otherwise states are detached. They are copies only where chosen.
    """
    places = _resolve_all(model, [sites] if isinstance(sites, str) else sites)
    captured = Captured([site.name for site in places])
    with ExitStack() as stack:
        last = stack.enter_context(watch_padding(model)) if positions == "last" else None
        for site in places:
            keep = captured.passes[site.name]

            def take(hidden_BTD: Tensor, keep: list[Tensor] = keep) -> None:
                chosen = _choose(hidden_BTD, positions, last.last_column if last else None)
                keep.append(chosen if grad else chosen.detach())

            stack.callback(_hook(site, take).remove)
        yield captured


def _choose(
    hidden_BTD: Tensor, positions: Positions, last_column: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if positions is None:
        return hidden_BTD
    if last_column is not None:
        positions = last_column(hidden_BTD)
    if isinstance(positions, Tensor):
        rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        return hidden_BTD[rows_B, positions.to(hidden_BTD.device)]
    columns: Any = positions
    return hidden_BTD[:, columns].clone()


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Every forward pass in the block goes on with what the functions return.

    Works in plain forward passes and in `generate`, where `current_rows()` tells which prompts the
    rows belong to and at which positions they stand. A name with `*` applies its function at every layer.
    """
    named = [(site, change) for name, change in edits.items() for site in resolve_site(model, name)]
    _resolve_all(model, list(edits))
    with ExitStack() as stack:
        for site, change in named:
            stack.callback(_hook(site, change).remove)
        yield


def _hook(site: Site, function: Edit) -> Any:
    """Registers `function` on a site's hidden states; what it returns replaces them."""

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = function(hidden)
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": changed}

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = function(hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    if site.side == "input":
        return site.module.register_forward_pre_hook(on_input, with_kwargs=True)
    return site.module.register_forward_hook(on_output)
