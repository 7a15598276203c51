"""temper: adapt open-weight models, attack them, and show what then holds.

Importing this package costs nothing; the verbs arrive on first use:

    import temper
    system = temper.load_system("smollm2-135m")
    data = temper.load_data("builtin:noncompliance")
    artefact = temper.fit("refusal-tokens", system, data)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "fit": "temper.run.verbs",
    "attack": "temper.run.verbs",
    "make": "temper.run.verbs",
    "measure": "temper.run.verbs",
    "load_system": "temper.run.resolve",
    "load_data": "temper.data.loading",
    "load_artefact": "temper.artefacts",
    "run_recipe": "temper.run.execute",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'temper' has no attribute {name!r}")
