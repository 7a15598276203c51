"""What a `fit` leaves: weights, adapters, steering, prompts, decoders and stacks of them.

Importing this package imports no torch; each name arrives when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from temper.artefacts.adapter import Adapter
    from temper.artefacts.base import ANY_BASE, Artefact, chained
    from temper.artefacts.decoder import Decoder
    from temper.artefacts.loading import load_artefact
    from temper.artefacts.prompt import Prompt
    from temper.artefacts.stack import Stack
    from temper.artefacts.steer import Steer
    from temper.artefacts.training import Tune, Tuning, tuning
    from temper.artefacts.weights import Weights

__all__ = [
    "ANY_BASE",
    "Adapter",
    "Artefact",
    "Decoder",
    "Prompt",
    "Stack",
    "Steer",
    "Tune",
    "Tuning",
    "Weights",
    "chained",
    "load_artefact",
    "tuning",
]

_HOMES = {
    "ANY_BASE": "base",
    "Adapter": "adapter",
    "Artefact": "base",
    "Decoder": "decoder",
    "Prompt": "prompt",
    "Stack": "stack",
    "Steer": "steer",
    "Tune": "training",
    "Tuning": "training",
    "Weights": "weights",
    "chained": "base",
    "load_artefact": "loading",
    "tuning": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
