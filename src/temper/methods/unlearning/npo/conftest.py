"""What the tests begin with: a tiny model, a few people, quick settings, and the objective on rows of random tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from temper.data.loading import load_data
from temper.data.schemas import Data
from temper.methods.unlearning.npo import losses
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.objective import Pair, UnlearnObjective
from temper.ops.batching import Example
from temper.ops.objectives import SumCount
from temper.systems.loading import load_base


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def people() -> Data:
    parts = {"forget": "Dialogue", "retain": "Dialogue", "holdout": "Dialogue", "neighbours": "Dialogue"}
    return load_data("builtin:people", {**parts, "world_facts": "Dialogue"}, limit=4)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quick(**settings: Any) -> Config:
    fast = {
        "mode": "lora",
        "rank": 2,
        "lr": 1e-2,
        "batch_rows": 4,
        "num_epochs": 3,
        "min_steps": 0,
        "watch_every": 0,
    }
    return Config(**{**fast, **settings})


def make_pairs(seed: int) -> list[Pair]:
    draw = torch.Generator().manual_seed(seed)

    def row(low: int, high: int) -> Example:
        size = int(torch.randint(low, high, (1,), generator=draw))
        ids = torch.randint(4, 512, (size,), generator=draw).tolist()
        start = int(torch.randint(1, size - 1, (1,), generator=draw))
        return Example(ids, [place >= start for place in range(size)])

    return [Pair(row(5, 30), -20.0 - n, row(5, 12), -15.0 + n, row(5, 40)) for n in range(4)]


def slow_logp(model: Any, row: Example) -> torch.Tensor:
    logits = model(torch.tensor([row.ids]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    return torch.stack([table[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.scored[t]])


def objective_of(system: Any, name: str, **settings: Any) -> UnlearnObjective:
    class Same:
        def __enter__(self) -> Any:
            return system

        def __exit__(self, *error: Any) -> None: ...

    config = Config(loss=name, **settings)
    return UnlearnObjective(losses.parse(name), config, pad_id=3, device="cpu", reference=Same, width=40)


def value_of(objective: UnlearnObjective, model: Any, items: list[Pair]) -> float:
    terms: dict[str, SumCount] = objective(model, items)
    counts = objective.counts(items)
    assert {name: term.count for name, term in terms.items()} == counts
    return sum(
        objective.weights[name] * float(term.total.detach()) / counts[name] for name, term in terms.items()
    )
