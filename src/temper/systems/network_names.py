"""Names of the small networks that are trained from scratch, understood without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from temper.core.errors import ConfigError, nearest

__all__ = ["MODEL_TYPE", "NETWORKS", "Architecture", "check_network", "parse_network"]

MODEL_TYPE = "temper-network"
"""`model_type` in the config.json of a saved one."""
NETWORKS: Mapping[str, int] = {"mlp": 256, "cnn3": 16, "cnn7": 64, "resnet8": 32}
"""Each network's first width, unless its name gives another: NETWORK[-wWIDTH][-bn], e.g. cnn7-w16-bn."""
FORM = re.compile(r"(?P<base>[a-z0-9]+)(-w(?P<width>[1-9][0-9]{0,3}))?(?P<norms>-bn)?")


class Architecture(NamedTuple):
    """A network's name, taken apart."""

    base: str
    """A name of NETWORKS."""
    width: int
    """Channels of the first layer; the others are multiples of it."""
    has_norms: bool
    """Whether batch norm follows every hidden layer."""


def parse_network(name: str) -> Architecture:
    """What a network's name says; raises ConfigError with the nearest names for an unknown one."""
    found = FORM.fullmatch(name)
    if found is None or found["base"] not in NETWORKS:
        known = [*NETWORKS, *(f"{base}-bn" for base in NETWORKS)]
        raise ConfigError(
            f"There is no network {name!r}",
            cure=f"{nearest(name, known)} A width stands as in cnn7-w16-bn.",
        )
    return Architecture(found["base"], int(found["width"] or NETWORKS[found["base"]]), bool(found["norms"]))


def check_network(name: str, shape: Sequence[int], num_classes: int) -> Architecture:
    """`parse_network`, after a look at the input's shape, (channels, height, width); an mlp takes any shape."""
    parsed = parse_network(name)
    if not shape or min(shape) < 1 or (parsed.base != "mlp" and len(shape) != 3):
        raise ConfigError(
            f"{name} takes no inputs of shape {tuple(shape)}",
            cure="Give CHANNELSxHEIGHTxWIDTH, e.g. 1x28x28.",
        )
    if num_classes < 2:
        raise ConfigError(f"A classifier needs at least 2 classes, not {num_classes}")
    return parsed
