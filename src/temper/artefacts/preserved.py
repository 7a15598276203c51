"""A model put back exactly as it was: tensors, modules, hooks, flags, config."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["preserved", "replace_tensor"]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """On leaving, also after an error, the model is bit-identical to what it was on entering.

    Keeps references, not copies: inside, tensors are replaced (`replace_tensor`, `p.data = ...`) and
    never written in place. Modules, parameter identity (ties), hooks, flags, training mode and
    config attributes all come back. Contexts over one model are left in reverse order.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    tensors = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    try:
        yield
    finally:
        for module, saved in modules:
            _restore(vars(module), saved)
        for parameter, data, requires_grad, grad in tensors:
            parameter.grad = None  # its shape may belong to the replaced data
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for config, saved in configs:
            _restore(vars(config), saved)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; its containers of modules, tensors and hooks are copied one level deep."""
    # A subclass, like the frozen config of diffusers, may refuse to be filled again.
    plain = (dict, OrderedDict)
    return {k: _Contents(v) if type(v) in plain else v for k, v in vars(module).items()}


class _Contents:
    """What a dict held, and the dict itself: hook handles hold on to its identity."""

    def __init__(self, home: dict[Any, Any]) -> None:
        self.home, self.items = home, list(home.items())

    def back(self) -> dict[Any, Any]:
        self.home.clear()
        self.home.update(self.items)
        return self.home


def _restore(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in attributes.keys() - saved.keys():
        del attributes[name]
    for name, value in saved.items():
        attributes[name] = value.back() if isinstance(value, _Contents) else value


def _configs(model: nn.Module) -> list[Any]:
    """The model's config and, for models of several parts, its text config."""
    config = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]


def replace_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the named parameter or buffer new content, in its own dtype and on its own device.

    The Parameter object stays, so whatever is tied to it follows. Only inside `preserved`.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if leaf in owner._buffers:
        buffer = owner._buffers[leaf]
        assert buffer is not None
        owner._buffers[leaf] = value.to(buffer)
        return
    parameter = owner.get_parameter(leaf)
    parameter.data = value.to(parameter.data)
