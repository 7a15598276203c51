"""Training against perturbations: rounds, kept perturbations, what is counted, and that nothing stays on the model."""

import pytest
import torch

from temper.core.errors import NumericsError
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.latent import EMBEDDINGS, Ball
from temper.ops.latent_objective import (
    LatentItem,
    LatentObjective,
    Search,
    attack_figures,
    attack_items,
    attacked_columns,
    mean_bad_loss,
    rounds,
    scored_count,
    train_rounds,
)
from temper.ops.objectives import SumCount
from temper.ops.toward_away import mean_rows, toward_tokens
from temper.ops.train import TrainSettings


def row(*ids, start):
    return Example(list(ids), [place >= start for place in range(len(ids))])


ITEMS = [
    LatentItem(
        row(5, 6, 7, 8, 9, start=3), row(5, 6, 7, 20, start=3), (row(30, 31, 32, 33, 34, 35, start=2),)
    ),
    LatentItem(row(11, 12, 13, start=2), row(11, 12, 40, 41, start=2), (row(50, 51, start=1),)),
    LatentItem(row(60, 61, 62, start=2), row(60, 61, 63, start=2), (row(70, 71, start=1),)),
]


class Plain:
    """Toward the good reply, benign rows kept."""

    attack_reads = ("bad",)
    defence_reads = ("bad", "good")
    captures = ()

    def __init__(self):
        self.weights = {"good": 1.0, "benign": 0.5}
        self.seen = []

    def counts(self, items):
        benign = [row for item in items for row in item.benign]
        return {"good": float(len(items)), "benign": scored_count(benign)}

    def attack_loss(self, scores, items):
        return mean_bad_loss(scores)

    def reference(self, model, items, found):
        self.seen.append(found)

    def terms(self, seen, items, reference):
        good, benign = seen.scores["good"], seen.scores["benign"]
        return {
            "good": SumCount(mean_rows(toward_tokens(good), good).sum(), len(items)),
            "benign": SumCount(toward_tokens(benign).sum(), len(benign.logp_S)),
        }


def objective_of(eps=0.5, num_repeats=1, num_steps=3, step="adamw"):
    search = Search({EMBEDDINGS: Ball(eps, 32, 0.1), "layers.1.output": Ball(eps, 32, 0.1)}, num_steps, step)
    return LatentObjective(Plain(), search, pad_id=3, device="cpu", num_repeats=num_repeats)


def fit(system, objective, *, batch_tokens=4096, checkpointing=False, **changes):
    settings = TrainSettings(lr=1e-2, batch_rows=3, max_steps=4, gradient_checkpointing=checkpointing)
    run = Run(seed=1, batch_tokens=batch_tokens)
    model = system.model
    log = train_rounds(model, model.parameters(), lambda epoch: ITEMS, objective, settings, run, **changes)
    return log, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_positions_that_may_be_perturbed():
    assert attacked_columns(ITEMS[:2], "prompt", 5).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert attacked_columns(ITEMS[:2], "prompt+reply", 5).int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert attacked_columns(ITEMS[:2], "scored", 5).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]


def test_rounds_repeat_whole_batches_and_fill_the_last():
    order = rounds(ITEMS, 2, 3, seed=0, epoch=0)
    assert len(order) == 12
    for start in (0, 6):
        batches = [order[at : at + 2] for at in range(start, start + 6, 2)]
        assert batches[0] == batches[1] == batches[2]
        assert [item.place for item in batches[0]] == [0, 1]
    assert {tuple(item.bad.ids) for item in order} == {tuple(item.bad.ids) for item in ITEMS}
    assert order == rounds(ITEMS, 2, 3, seed=0, epoch=0)


def test_one_perturbation_serves_all_steps_of_a_round(lively):
    objective = objective_of(num_repeats=2)
    log, _ = fit(lively("llama"), objective)
    first, second, third, fourth = objective.game.seen
    assert first is second
    assert third is fourth
    assert third is not first
    assert log.terms["attack_after"][0] < log.terms["attack_before"][0]
    # 4 attack passes of one row and 3 backward ones, then the three rows of each item; the second step only those.
    assert log.terms["forward_passes"][:2] == [4 + 3, 3]
    assert log.terms["backward_passes"][:2] == [3 + 3, 3]


def test_radius_zero_is_training_without_an_attack(lively):
    _, zero = fit(lively("llama"), objective_of(eps=0.0))
    _, none = fit(lively("llama"), objective_of(num_steps=0))
    _, some = fit(lively("llama"), objective_of())
    assert torch.allclose(zero, none, atol=1e-6)
    assert not torch.allclose(some, none, atol=1e-4)


def test_micro_batches_and_recomputed_activations_change_nothing(lively):
    # One AdamW step of a delta turns rounding into a sign where a gradient is near 0, so signs are not compared.
    _, whole = fit(lively("llama"), objective_of(num_steps=1))
    _, split = fit(lively("llama"), objective_of(num_steps=1), batch_tokens=16)
    _, again = fit(lively("llama"), objective_of(num_steps=1), checkpointing=True)
    assert (whole - split).abs().mean() < 1e-4
    assert (whole - again).abs().mean() < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_a_perturbation_are_the_same_when_recomputed(lively, checkpointing):
    system = lively("llama")
    objective = objective_of()
    if checkpointing:
        system.model.train()
        system.model.activation_checkpointing_enable({"use_reentrant": False})
    with objective:
        objective(system.model, ITEMS)["good"].total.backward()
    found = [p.grad.clone() for p in system.model.parameters()]
    plain = lively("llama")
    with objective_of() as other:
        other(plain.model, ITEMS)["good"].total.backward()
    for one, two in zip(found, plain.model.parameters(), strict=True):
        assert torch.allclose(one, two.grad, atol=1e-4)


def test_nothing_stays_on_the_model_also_after_an_error(lively):
    system = lively("llama")
    ids = torch.tensor([[5, 6, 7]])
    calm = system.model(input_ids=ids).logits.detach().clone()
    with objective_of() as objective:
        objective(system.model, ITEMS)
        assert any(part._forward_hooks for part in system.model.modules())
    assert torch.equal(system.model(input_ids=ids).logits, calm)
    with torch.no_grad():
        system.model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(NumericsError):
        fit(system, objective_of())
    assert not any(part._forward_hooks for part in system.model.modules())


def test_a_restarted_optimizer_takes_another_way(lively):
    _, kept = fit(lively("llama"), objective_of(num_repeats=2))
    _, restarted = fit(lively("llama"), objective_of(num_repeats=2), restart_optimizer=True)
    assert not torch.allclose(kept, restarted, atol=1e-5)


def test_a_resumed_run_is_one_never_stopped(lively, tmp_path):
    settings = TrainSettings(lr=1e-2, batch_rows=3, max_steps=6)

    def go(system, steps_until_error=None, resume=False):
        objective = objective_of(num_repeats=2)
        calls = iter(range(100))
        attack_loss = objective.game.attack_loss

        def failing(scores, items):
            if steps_until_error is not None and next(calls) >= steps_until_error:
                raise ZeroDivisionError
            return attack_loss(scores, items)

        objective.game.attack_loss = failing
        run = Run(seed=1, folder=tmp_path / "run", checkpoint_every=1, resume=resume)
        train_rounds(system.model, system.model.parameters(), lambda epoch: ITEMS, objective, settings, run)
        return torch.cat([p.detach().flatten() for p in system.model.parameters()])

    straight = go(lively("llama"))
    with pytest.raises(ZeroDivisionError):
        go(lively("llama"), steps_until_error=9)  # in the third round: checkpoints stand at steps 2 and 4
    assert torch.equal(go(lively("llama"), resume=True), straight)


def test_attacks_on_items_in_any_batches_and_the_figures(lively):
    system = lively("llama")
    together = attack_items(system.model, ITEMS, objective_of(), Run())
    alone = attack_items(system.model, ITEMS, objective_of(), Run(batch_tokens=1))
    assert torch.allclose(together.after_N, alone.after_N, atol=1e-3)
    assert torch.allclose(together.before_N, alone.before_N, atol=1e-5)
    assert (together.after_N < together.before_N).all()
    log, _ = fit(system, objective_of())
    curves = attack_figures(log)["curves"]
    assert len(curves["Attack loss"]["lines"]["attacked"]["y"]) == 4


def test_attention_is_chosen_by_the_longest_row_and_not_by_all_of_an_item(lively, monkeypatch):
    """Many short rows stand side by side: together they are no long row."""
    from temper.ops import micro_batch

    asked, real = [], micro_batch.short_attention

    def watched(device, longest):
        asked.append(longest)
        return real(device, longest)

    monkeypatch.setattr(micro_batch, "short_attention", watched)
    assert [item.longest for item in ITEMS] == [6, 4, 3]
    fit(lively("llama"), objective_of())
    assert set(asked) == {6}
    assert max(item.num_tokens for item in ITEMS) == 15
