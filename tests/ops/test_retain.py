"""Retain losses: the hidden states are those that transformers lists, distances by hand, first positions left out."""

import math
from contextlib import nullcontext

import pytest
import torch

from temper.core.types import Run
from temper.ops.batching import Example, collate
from temper.ops.inner_loop import gradient
from temper.ops.retain import RetainObjective, hidden_states, mean_distance, num_positions, read_positions


def row(ids):
    return Example(ids, [False] + [True] * (len(ids) - 1))


ROWS = [row([5, 6, 7, 8, 9]), row([10, 11, 12])]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "qwen2"])
def test_hidden_states_are_the_models_own(lively, kind):
    system = lively(kind)
    batch = collate(ROWS, 3)
    out = system.model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT.long(),
        output_hidden_states=True,
        use_cache=False,
    )
    found = hidden_states(system.model, batch)
    assert len(found) == len(out.hidden_states)
    for mine, theirs in zip(found[1:], out.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[batch.mask_BT], theirs.detach()[batch.mask_BT], rtol=1e-4, atol=1e-5)
    assert not any(state.requires_grad for state in found)


def test_distance_by_hand():
    """A plain L2 norm a token, a mean over the hidden states."""
    one, other = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert mean_distance([one, one], [other, one]).tolist() == [[2.5, 0.0]]


def test_positions():
    batch = collate(ROWS, 3)
    assert read_positions(batch, 0).tolist() == batch.mask_BT.tolist()
    assert read_positions(batch, 1).sum() == num_positions(ROWS, 1) == 6
    assert num_positions([row([5])], 3) == 0


def test_an_untouched_model_is_at_distance_0_with_a_finite_gradient(lively):
    system = lively("llama")
    objective = RetainObjective(lambda: nullcontext(system), 3)
    terms = objective(system.model, ROWS)
    assert float(terms["hidden"].total.detach()) == 0.0
    counts = objective.counts(ROWS)
    assert {name: term.count for name, term in terms.items()} == counts == {"retain": 6.0, "hidden": 6.0}
    parameters = list(system.model.parameters())
    found = gradient(system.model, parameters, objective, ROWS, Run(), length=lambda one: len(one.ids))
    assert all(bool(torch.isfinite(grad).all()) for grad in found.grads if grad is not None)


def test_position_0_counts_only_if_asked(lively):
    """A change of the first token's embedding alone is seen at later positions through attention, and at the first itself."""
    before, after = lively("llama"), lively("llama", seed=1)
    batch = collate(ROWS, 3)
    distance = mean_distance(hidden_states(after.model, batch), hidden_states(before.model, batch))
    for skipped in (0, 1, 2):
        objective = RetainObjective(lambda: nullcontext(before), 3, num_skipped=skipped)
        found = float(objective(after.model, ROWS)["hidden"].total.detach())
        wanted = float(distance[0, skipped:5].sum() + distance[1, skipped:3].sum())
        assert found == pytest.approx(wanted, rel=1e-5)
        assert math.isfinite(found)
