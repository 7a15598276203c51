"""Which modules an adapter changes: names resolved before anything is touched; matching nothing is an error."""

from __future__ import annotations

from torch import nn

from temper.core.errors import ConfigError, nearest
from temper.systems.anchors import is_conv1d

__all__ = ["ALL_LINEAR", "suffixes", "target_modules", "target_parameters"]

ALL_LINEAR = "all-linear"


def target_modules(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Full names of the linear modules meant: "all-linear" (all but the vocabulary projection) or names.

    A name stands for every module whose path ends in it: "q_proj", "3.mlp.up_proj". Raises ConfigError
    for one that matches nothing, with the nearest.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head
    ]
    if targets == ALL_LINEAR:
        return linear
    return _matching(targets, linear, "linear module")


def target_parameters(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Names of the parameters that whole-weight training changes: all, or those under the named modules."""
    names = [name for name, _ in model.named_parameters()]
    if targets == ALL_LINEAR:
        return names
    modules = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    chosen = _matching(targets, modules, "module")
    return [name for name in names if any(name.startswith(f"{module}.") for module in chosen)]


def _matching(targets: str | tuple[str, ...], names: list[str], what: str) -> list[str]:
    wanted = (targets,) if isinstance(targets, str) else targets
    if not wanted:
        raise ConfigError("Tune.targets names nothing", cure=f"Write {ALL_LINEAR!r} or module names.")
    chosen: set[str] = set()
    for target in wanted:
        found = {name for name in names if name == target or name.endswith(f".{target}")}
        if not found:
            known = {name.rpartition(".")[2] for name in names}
            raise ConfigError(
                f"Target {target!r} matches no {what}",
                where="Tune.targets",
                cure=nearest(target, {*known, ALL_LINEAR}),
            )
        chosen |= found
    return [name for name in names if name in chosen]


def suffixes(chosen: list[str], model: nn.Module) -> list[str]:
    """The chosen names as PEFT's adapter_config lists them: last parts where these mean the same, else in full."""
    short = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(chosen) else sorted(chosen)
