"""Tuning: what is trained, what it leaves, and a base that is bit-identical afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from temper.artefacts import Adapter, Tune, Tuning, Weights, tuning
from temper.core.errors import ConfigError, ModelError
from temper.core.types import Run

from .conftest import IDS, logits, record


def train(t: Tuning, ids: torch.Tensor = IDS, steps: int = 3, lr: float = 0.05) -> None:
    optimiser = torch.optim.AdamW(t.parameters().values(), lr=lr)
    for _ in range(steps):
        out = t.system.model(input_ids=ids, labels=ids)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()


MODES = {
    "lora": Tune(r=4, alpha=8),
    "bf16": Tune(r=4, frozen_dtype="bf16", dropout=0.1),
    "tokens": Tune(r=4, new_tokens=("[REFUSE]", "[RESPOND]"), reuse_ids=(2,)),
    "full": Tune(mode="full"),
    "full-tokens": Tune(mode="full", new_tokens=("[a]", "[b]", "[c]", "[d]", "[e]", "[f]")),
}


@pytest.mark.parametrize("mode", MODES)
def test_base_is_bit_identical_afterwards(system: Any, run: Run, mode: str) -> None:
    system.model.train()
    next(system.model.parameters()).requires_grad_(False)
    before = record(system)
    with tuning(system, MODES[mode], run) as t:
        train(t)
        artefact = t.finish("made-up")
    assert record(system) == before
    with pytest.raises(RuntimeError, match="on purpose"), tuning(system, MODES[mode], run) as t:
        train(t)
        raise RuntimeError("on purpose")
    assert record(system) == before
    with pytest.raises(RuntimeError, match="on purpose"), artefact.apply(system, 0.7) as changed:
        assert not torch.equal(logits(changed)[..., :200], logits_of(before))
        raise RuntimeError("on purpose")
    assert record(system) == before


def logits_of(before: dict[str, Any]) -> torch.Tensor:
    dtype, shape, raw = before["outputs"]
    return torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)[..., :200]


@pytest.mark.parametrize("mode", ["lora", "tokens", "full", "full-tokens"])
def test_applied_artefact_answers_as_the_trained_model(system: Any, run: Run, mode: str) -> None:
    with tuning(system, MODES[mode], run) as t:
        train(t)
        wanted = logits(t.system)
        artefact = t.finish("made-up")
    assert isinstance(artefact, Weights if mode.startswith("full") else Adapter)
    assert artefact.base == system.fingerprint
    with artefact.apply(system) as changed:
        torch.testing.assert_close(logits(changed), wanted, atol=1e-5, rtol=1e-5)
        assert changed.model.config.vocab_size == wanted.shape[-1]
