"""What hidden states tell: states read at a layer, linear probes on them, and how far they spread.

N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import DataError, NeedsError
from temper.core.types import Run
from temper.ops.batching import plan_batches
from temper.ops.hooks import capture
from temper.ops.precision import autocast, eval_mode

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = ["Probe", "fit_probe", "last_token_states", "total_variance"]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 strengths that a probe chooses from."""
HELD_OUT = 0.2
"""Share of the rows on which they are compared."""


class Probe(NamedTuple):
    """A logistic regression on standardised states, and the inverse L2 strength it was given."""

    model: Any
    strength: float

    def accuracy(self, states_ND: Tensor, labels: Sequence[int]) -> float:
        """Share of rows told right."""
        return float(self.model.score(states_ND.numpy(), np.asarray(labels)))


@torch.no_grad()
def last_token_states(system: CausalLM, rows: Sequence[Sequence[int]], layer: int, run: Run) -> Tensor:
    """The output of a layer at each row's last token, (N, D) in float32 on the CPU; -1 is the last layer.

    Raises ConfigError for a layer that the model lacks, DataError for a row of no tokens.
    """
    if not all(rows):
        raise DataError(
            "A row has no tokens", where=f"row {[len(row) for row in rows].index(0)}", cure="Drop it."
        )
    site = f"layers.{layer}.output"
    found: list[Tensor] = [torch.zeros(0)] * len(rows)
    plan = plan_batches([len(row) for row in rows], run)
    with eval_mode(system.model), autocast(run):
        for batch in run.ticker(plan, total=len(plan), label="states"):
            width = max(len(rows[n]) for n in batch)
            # Under a causal mask no token sees the padding to its right.
            ids_BT = [[*rows[n], *[system.pad_id] * (width - len(rows[n]))] for n in batch]
            last_B = torch.tensor([len(rows[n]) - 1 for n in batch])
            with capture(system.model, [site], last_B) as captured:
                system.model(
                    input_ids=torch.tensor(ids_BT, device=system.device), use_cache=False, logits_to_keep=1
                )
            (states_BD,) = captured.values()
            for n, state_D in zip(batch, states_BD.float().cpu(), strict=True):
                found[n] = state_D
    return torch.stack(found)


def fit_probe(states_ND: Tensor, labels: Sequence[int], seed: int = 0) -> Probe:
    """A linear probe of two or more classes; its L2 strength is the best one on a fifth of the rows, then all are used.

    Raises DataError for a class with fewer than five rows, or for one class alone.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise NeedsError(
            "A linear probe needs scikit-learn", where="temper.ops.probing", cure="pip install scikit-learn"
        ) from None
    states, classes = states_ND.numpy(), np.asarray(labels)
    kinds, counts = np.unique(classes, return_counts=True)
    if len(kinds) < 2 or counts.min() < 5:
        raise DataError(
            f"A probe needs two classes of five rows; there are {dict(zip(kinds.tolist(), counts.tolist(), strict=True))}",
            cure="Give more rows.",
        )

    def fitted(x: Any, y: Any, strength: float) -> Any:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return probe.fit(x, y)

    split = train_test_split(states, classes, test_size=HELD_OUT, random_state=seed, stratify=classes)
    known, held, known_classes, held_classes = split
    # Among equals the strongest penalty.
    best = max(PENALTIES, key=lambda c: (fitted(known, known_classes, c).score(held, held_classes), -c))
    return Probe(fitted(states, classes, best), best)


def total_variance(states_ND: Tensor) -> float:
    """Trace of the covariance over rows. Raises DataError for fewer than two rows."""
    if len(states_ND) < 2:
        raise DataError(f"{len(states_ND)} rows have no variance", cure="Give at least two.")
    return float(states_ND.double().var(dim=0).sum())
