"""The contrastive loss by hand, and the chunked objective beside the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.artefacts import Tune, tuning
from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.ops.contrast import (
    Contrasted,
    ContrastObjective,
    contrastive_loss,
    num_tokens,
    pairwise_loss,
    similarities,
)
from temper.ops.train import TrainSettings, train
from temper.systems.loading import load_base

TEXTS = [
    ("the fox", "a fox went to read in the valley"),
    ("the old mill", "the mill stood beside the stream and the children went there in the summer"),
    ("one and one", "two"),
    ("a story", "please write a short story about a lighthouse , a fox and a small boat"),
    ("the weather", "tell me about the weather in the valley"),
]


def items_of(system, *, num_hard=0):
    queries, positives = (system.ids(list(texts)) for texts in zip(*TEXTS, strict=True))
    return [
        Contrasted(
            query, (positive, *[positives[(place + step + 2) % len(TEXTS)] for step in range(num_hard)])
        )
        for place, (query, positive) in enumerate(zip(queries, positives, strict=True))
    ]


def all_of(shape):
    return torch.ones(shape, dtype=torch.bool)


def test_by_hand():
    scores_BK = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    found = contrastive_loss(scores_BK, torch.tensor([0, 1]), all_of((2, 2)), temperature=0.5)
    assert found.count == 2
    assert float(found.total) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2))


def test_a_known_positive_in_the_batch_is_no_negative():
    scores_BK = torch.tensor([[1.0, 9.0], [0.0, 1.0]], requires_grad=True)
    counts_BK = torch.tensor([[True, False], [True, True]])
    found = contrastive_loss(scores_BK, torch.tensor([0, 1]), counts_BK, temperature=1.0)
    assert found.total.item() == pytest.approx(math.log(1 + math.exp(-1)))
    (grad_BK,) = torch.autograd.grad(found.total, scores_BK)
    assert torch.isfinite(grad_BK).all()
    assert grad_BK[0].tolist() == [0.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(
    num_queries=st.integers(1, 6),
    extra=st.integers(0, 5),
    temperature=st.floats(0.01, 2),
    seed=st.integers(0, 999),
)
def test_equals_the_formula_in_float64(num_queries, extra, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    query_BD = torch.randn(num_queries, 7, generator=generator, dtype=torch.float64)
    candidate_KD = torch.randn(num_queries + extra, 7, generator=generator, dtype=torch.float64)
    scores_BK = similarities(query_BD, candidate_KD)
    place_B = torch.arange(num_queries)
    found = contrastive_loss(scores_BK, place_B, all_of(scores_BK.shape), temperature=temperature)
    slow = 0.0
    for row in range(num_queries):
        cosines = [
            float(query_BD[row] @ other / query_BD[row].norm() / other.norm()) / temperature
            for other in candidate_KD
        ]
        top = max(cosines)
        slow += top + math.log(sum(math.exp(value - top) for value in cosines)) - cosines[row]
    assert float(found.total) == pytest.approx(slow, rel=1e-9, abs=1e-9)


def gradients(system, items, chunk_tokens, **changes):
    objective = ContrastObjective(system, chunk_tokens, **changes)
    loss = objective(system.model, items)["contrast"]
    system.model.zero_grad()
    loss.total.backward()
    return loss.total.item(), {
        n: p.grad.clone() for n, p in system.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("num_hard", [0, 2])
def test_chunks_give_the_gradient_of_the_whole_batch(kind, num_hard):
    system = load_base(f"tiny:{kind}", dtype="float64")
    items = items_of(system, num_hard=num_hard)
    whole = gradients(system, items, 10_000)
    for chunk_tokens in (1, 25, 60):
        chunked = gradients(system, items, chunk_tokens)
        assert chunked[0] == pytest.approx(whole[0], rel=1e-12)
        assert chunked[1].keys() == whole[1].keys()
        for name, grad in chunked[1].items():
            torch.testing.assert_close(grad, whole[1][name], atol=1e-12, rtol=1e-9)


def test_dropout_is_the_same_when_a_chunk_is_computed_again():
    """The gradient belongs to the loss that was reported: a finite difference under the same seeds agrees."""
    system = load_base("tiny:bert", dtype="float64")
    system.model.train()
    items = items_of(system)
    bias = system.model.encoder.layer[0].output.dense.bias
    torch.manual_seed(3)
    _, grads = gradients(system, items, 25)
    step, losses = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * step
        torch.manual_seed(3)
        losses.append(float(ContrastObjective(system, 25)(system.model, items)["contrast"].total.detach()))
        with torch.no_grad():
            bias[0] -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(grads["encoder.layer.0.output.dense.bias"][0]) == pytest.approx(slope, rel=1e-4)


def test_names_spare_false_negatives():
    system = load_base("tiny:bert")
    first, second, *_ = items_of(system)
    named = [
        first._replace(names=("p0",), relevant=frozenset({"p0", "p1"})),
        second._replace(names=("p1",), relevant=frozenset({"p1"})),
    ]
    objective = ContrastObjective(system)
    spared = objective(system.model, named)["contrast"].total
    alone = objective(system.model, [second, first])["contrast"].total
    assert 0 < spared.item() < alone.item()
    both = [item._replace(relevant=frozenset({"p0", "p1"})) for item in named]
    assert objective(system.model, both)["contrast"].total.item() == 0.0


def train_with(budget, run=None):
    system = load_base("tiny:bert")
    with tuning(system, Tune(mode="full"), Run()) as tuned:
        items = items_of(tuned.system)
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: items,
            ContrastObjective(tuned.system, budget),
            TrainSettings(lr=1e-3, num_epochs=6, batch_rows=5),
            Run(batch_tokens=budget),
            length=num_tokens,
        )
        return log, tuned.finish("test")


def test_training_learns_and_small_budgets_change_nothing():
    wide, artefact = train_with(4096)
    narrow, other = train_with(30)
    assert wide.loss[-1] < 0.7 * wide.loss[0]
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-3)
    assert artefact.tensors.keys() == other.tensors.keys()


def test_bad_items_are_named():
    system = load_base("tiny:bert")
    good = items_of(system)[0]
    with pytest.raises(DataError, match="item 1 of the batch"):
        ContrastObjective(system)(system.model, [good, good._replace(candidates=())])
    with pytest.raises(DataError, match="1 candidates and 2 names"):
        ContrastObjective(system)(system.model, [good._replace(names=("a", "b"))])
    with pytest.raises(ConfigError, match="chunk_tokens is 0"):
        ContrastObjective(system, 0)


def test_pairs_by_hand():
    scores_BK = torch.tensor([[1.0, 0.0, 3.0], [0.5, 0.5, 9.0]])
    counts_BK = torch.tensor([[True, True, True], [True, True, False]])
    found = pairwise_loss(scores_BK, torch.tensor([0, 1]), counts_BK, scale=2.0)
    assert found.count == 3
    by_hand = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(4)) + math.log(2)
    assert float(found.total) == pytest.approx(by_hand)


def test_own_candidates_alone_and_pairs_are_counted():
    system = load_base("tiny:bert", dtype="float64")
    items = items_of(system, num_hard=2)
    seen = []

    def loss(scores_BK, positive_B, counts_BK):
        seen.append(counts_BK)
        return pairwise_loss(scores_BK, positive_B, counts_BK)

    for shared, pairs in ((True, 5 * 14), (False, 5 * 2)):
        objective = ContrastObjective(system, 10_000, per="pair", shared=shared, loss=loss)
        assert objective.counts(items) == {"contrast": pairs}
        assert objective(system.model, items)["contrast"].count == pairs
    assert seen[1].sum(1).tolist() == [3] * 5
    assert seen[1][1].nonzero().flatten().tolist() == [3, 4, 5]
