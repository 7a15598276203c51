"""What the tests begin with: a gate and logits written by hand, rows, quick settings, and one fit on a tiny random model."""

from __future__ import annotations

import pytest
import torch

from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.gate import RefusalGate
from temper.methods.refusal.refusal_tokens.method import fit
from temper.systems.loading import load_base

NAMES = ("human", "incomplete", "indet", "safety", "unsupported")


def gate(
    names: tuple[str, ...] = ("refuse",), mode: str = "gate", selected: tuple[str, ...] = (), **values: float
) -> RefusalGate:
    ids = {name: index for index, name in enumerate(names)} | {"respond": len(names)}
    return RefusalGate(
        {"token_ids": ids, "mode": mode, "temperature": 1.0, "thresholds": values, "selected": list(selected)}
    )


def two_tokens(refuse: float = 1.0, respond: float = 2.0) -> torch.Tensor:
    return torch.tensor([[refuse, respond, -torch.inf, -torch.inf]])


def emitted(rule: RefusalGate, logits_BV: torch.Tensor) -> int:
    return int(rule(logits_BV, [0], [rule.start([])])[0].argmax())


@pytest.fixture(scope="module")
def tiny():  # type: ignore[no-untyped-def]
    return load_base("tiny:llama")


def dialogue(*texts: str, category: str | None = None, kind: str = "ordinary") -> Dialogue:
    roles = ("user", "assistant") * len(texts)
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    return Dialogue(messages, id=texts[0], extra={"refusal_category": category, "kind": kind})


def small(**changes: object) -> Config:
    return Config(mode="lora", rank=2, lr=3e-2, batch_rows=8, num_epochs=3, **changes)  # type: ignore[arg-type]


def rows(category: str | None, num: int, kind: str = "ordinary") -> list[Dialogue]:
    return [
        dialogue(f"ask {category} {n}", f"reply {category} {n}", category=category, kind=kind)
        for n in range(num)
    ]


@pytest.fixture(scope="module")
def fitted(tiny):  # type: ignore[no-untyped-def]
    both = rows("a", 8) + rows("b", 8) + rows(None, 12)
    return fit(tiny, Data({"train": both, "calibration": both}), small(), Run())
