"""FLAT on several architectures, trained both ways, and what its slopes and its blank templates come to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import temper
from temper.core.errors import TemperError
from temper.core.types import Message, Run
from temper.data.loading import load_data
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.flat.card import Config
from temper.methods.unlearning.flat.divergences import DIVERGENCES, flat_loss, mean_probabilities
from temper.methods.unlearning.flat.training import FlatObjective, Pair, templates_of
from temper.ops.batching import Example, encode
from temper.ops.logprobs import Scored, response_logprobs
from temper.systems.loading import load_base

KINDS = ("llama", "gpt2", "qwen2", "gemma", "gemma2")
PLAIN = {
    "tv": lambda e, f: (math.tanh(f) - math.tanh(e)) / 2,
    "kl": lambda e, f: math.exp(f - 1) - e,
    "js": lambda e, f: math.log(1 + math.exp(-e)) - 2 * math.log(2) + f + math.log(1 + math.exp(-f)),
    "pearson": lambda e, f: f * f / 4 + f - e,
    "reverse-kl": lambda e, f: math.exp(-e) + f - 1,
    "hellinger": lambda e, f: math.exp(-e) + math.exp(f) - 2,
    "neyman": lambda e, f: math.exp(-e) + 1 - 2 * math.exp(-f / 2),
    "jeffrey": lambda e, f: f + f**2 / 4 + f**3 / 16 - e,
}
"""-g(P_e) + h(g(P_f)), each worked out once more."""


@pytest.fixture(scope="module")
def people() -> Data:
    return load_data("builtin:people", {"forget": "Dialogue", "retain": "Dialogue"}, limit=4)


def row(prompt: int, reply: int, seed: int) -> Example:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 512, (prompt + reply,), generator=draw).tolist()
    return Example(ids, [False] * prompt + [True] * reply)


def mean_p(model: Any, rows: list[Example]) -> list[float]:
    """One padded batch, softmax over full logits in float64, a loop over tokens."""
    width = max(len(one.ids) for one in rows) + 2
    ids = torch.tensor([one.ids + [3] * (width - len(one.ids)) for one in rows])
    mask = torch.tensor([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in rows])
    with torch.no_grad():
        p = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double().softmax(-1)
    return [
        sum(float(p[b, t - 1, one.ids[t]]) for t in range(1, len(one.ids)) if one.scored[t]) / sum(one.scored)
        for b, one in enumerate(rows)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_equals_a_float64_version_on_padded_batches(kind: str) -> None:
    model: Any = load_base(f"tiny:{kind}").model.double()
    items = [
        Pair(row(*sizes, seed=n), row(sizes[0], 2 + n, seed=n + 9))
        for n, sizes in enumerate(((3, 9), (8, 1), (1, 4)))
    ]
    template = mean_p(model, [pair.template for pair in items])
    forget = mean_p(model, [pair.forget for pair in items])
    for name in DIVERGENCES:
        found = FlatObjective(Config(divergence=name), pad_id=3, device="cpu")(model, items)["flat"]  # type: ignore[arg-type]
        expected = sum(PLAIN[name](e, f) for e, f in zip(template, forget, strict=True)) / 3
        assert float(found.total.detach()) / found.count == pytest.approx(expected, abs=1e-6, rel=1e-6), name


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_forgetting_ends_by_itself_where_the_answer_is_unlikely(name: str) -> None:
    """dp/dlogit holds p (1 - p): bounded in value and, unlike gradient ascent, without a push where p is 0."""
    slopes = []
    for logit in (0.0, -5.0, -12.0):
        logit_1 = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
        scored = Scored(torch.nn.functional.logsigmoid(logit_1), torch.tensor([0]), 1)
        p_B = mean_probabilities(scored)
        flat_loss(torch.tensor([0.5], dtype=torch.float64), p_B, name).sum().backward()
        slopes.append(float(logit_1.grad))  # type: ignore[arg-type]
    assert slopes[0] > slopes[1] > slopes[2] > 0
    assert slopes[2] < 1e-5


def test_blank_templates_are_left_out() -> None:
    record = Dialogue((Message("user", "Who?"), Message("assistant", "Me.")), id="a", extra={})
    assert templates_of(record, ("", "I pass.", " \n")) == ("I pass.",)


def test_an_empty_retain_part_is_refused_and_none_at_all_is_no_obstacle(people: Data) -> None:
    system: Any = load_base("tiny:llama")
    quick = {"mode": "lora", "rank": 2, "lr": 1e-2, "num_epochs": 1, "min_steps": 0, "watch_every": 0}
    with pytest.raises(TemperError, match="'retain' is empty"):
        temper.fit("flat", system, people.with_part("retain", []), **quick)
    temper.fit("flat", system, Data({"forget": people["forget"]}), **quick)
    with pytest.raises(TemperError, match="needs the part 'retain'"):
        list(
            temper.measure("flat", system, Data({"forget": people["forget"]}), **(quick | {"watch_every": 1}))
        )


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_train_work_on_every_architecture(kind: str, mode: str, people: Data) -> None:
    system: Any = load_base(f"tiny:{kind}")
    base = {name: value.clone() for name, value in system.model.state_dict().items()}
    template = "No comment on that."
    data = Data({
        "forget": [
            Dialogue(record.messages, id=record.id, extra={"template": template})  # type: ignore[attr-defined]
            for record in people["forget"]
        ]
    })  # fmt: skip
    pairs = [encode(system, (record.prompt, template)) for record in data.records("forget", Dialogue)]
    before = response_logprobs(system, pairs, run=Run(), reduce="mean").mean()
    settings = {"num_epochs": 15, "min_steps": 0, "batch_rows": 4, "watch_every": 0}
    artefact = temper.fit("flat", system, data, mode=mode, rank=4, lr=2e-2, **settings)
    assert artefact.kind == {"full": "weights", "lora": "adapter"}[mode]
    with artefact.apply(system) as unlearnt:
        assert response_logprobs(unlearnt, pairs, run=Run(), reduce="mean").mean() > before + 0.2
    assert all(torch.equal(value, base[name]) for name, value in system.model.state_dict().items())
