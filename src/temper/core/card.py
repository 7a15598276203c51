"""What a method says of itself, as data: its card and its claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CAPABILITIES", "PRODUCTS", "VERBS", "Card", "Claim", "Product", "Verb"]

Verb = Literal["fit", "attack", "make", "measure"]
VERBS: tuple[Verb, ...] = ("fit", "attack", "make", "measure")

Product = Literal["weights", "adapter", "steer", "prompt", "decoder"]
PRODUCTS: tuple[Product, ...] = ("weights", "adapter", "steer", "prompt", "decoder")

CAPABILITIES: dict[str, str] = {
    "generate": "writes text after a prompt",
    "logprobs": "gives log-probabilities of chosen tokens",
    "hidden": "lets hidden states be read and changed",
    "attention": "lets attention weights be read and masks be added",
    "grads": "gives gradients with respect to weights or inputs",
    "embed": "gives one vector a text or image",
    "classify": "gives class scores",
    "see": "takes images",
    "draw": "makes images",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the paper that rows can show or contradict.

    The verdict compares `metric` of `arm` with `baseline` (another arm, or a number), paired over
    seeds and items. `margin` moves the comparison away from 0, in the metric's unit: with
    `direction="higher"` the claim is `arm - baseline > margin`.
    """

    id: str
    sentence: str
    metric: str
    arm: str
    baseline: str | float
    direction: Literal["higher", "lower"]
    margin: float = 0.0
    paper: str = ""
    """The paper's own figures for it, or how they are known."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A method's title, paper, verbs, settings, needs, inputs, product and claims."""

    title: str
    paper: str
    verbs: tuple[Verb, ...]
    config: type
    needs: frozenset[str]
    data: Mapping[str, Mapping[str, str]]
    """verb -> {part: schema name}; a part ending in "?" may be missing, e.g.
    `{"fit": {"forget": "Dialogue", "retain?": "Dialogue"}}`."""
    kinds: tuple[str, ...] = ("CausalLM",)
    """Classes of System it runs on; "Remote" where an endpoint is enough."""
    produces: tuple[Product, ...] = ()
    """What `fit` leaves, in order."""
    extras: tuple[str, ...] = ()
    """Optional dependencies it imports when run."""
    claims: tuple[Claim, ...] = field(default=())
