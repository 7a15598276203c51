"""Inner loops: the gradient is the training loop's, weights come back bit for bit, optimisers do not outlive a loop."""

from typing import ClassVar

import pytest
import torch

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.inner_loop import Gradient, add_scaled, gradient, inner_loop, restored
from temper.ops.objectives import SumCount
from temper.ops.optim import adamw
from temper.ops.train import SftObjective, TrainSettings, train


def rows(*lengths):
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 512, (length,), generator=draw).tolist() for length in lengths]
    return [Example(row, [False] + [True] * (len(row) - 1)) for row in ids]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def size(row):
    return len(row.ids)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("budget", [4096, 8])
def test_the_gradient_is_that_of_a_plain_backward_pass(lively, kind, budget):
    model, items = lively(kind, "eager" if kind == "gemma2" else "sdpa").model, rows(5, 9, 3)
    parameters = list(model.parameters())
    found = gradient(model, parameters, SftObjective(3), items, Run(batch_tokens=budget), length=size)
    assert all(parameter.grad is None for parameter in parameters)
    total = 0.0
    for row in items:
        logits_TV = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].float()
        target_T = torch.tensor(row.ids[1:])
        total = total + torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum")
    (total / 14).backward()
    assert float(found.loss) == pytest.approx(float(total.detach()) / 14, rel=1e-5)
    for parameter, grad in zip(parameters, found.grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)


class Spread:
    """The variance of a step's losses: items are compared, so a part of them says something else."""

    weights: ClassVar = {"spread": 1.0}
    unsplittable = True

    def counts(self, items):
        return {"spread": 1.0}

    def __call__(self, model, items):
        losses = [SftObjective(3)(model, [item])["nll"].total for item in items]
        return {"spread": SumCount(torch.stack(losses).var(), 1.0)}


def test_what_compares_items_is_not_split_here_either(lively):
    model = lively("llama").model
    parameters = list(model.parameters())
    with pytest.raises(ConfigError, match="cannot be split"):
        gradient(model, parameters, Spread(), rows(5, 9), Run(batch_tokens=8), length=size)
    assert float(gradient(model, parameters, Spread(), rows(5, 9), Run(), length=size).loss) > 0


class Halting(SftObjective):
    """Rows of three tokens ask nothing of the model."""

    def __call__(self, model, items):
        if len(items[0].ids) == 3:
            return {"nll": SumCount(torch.zeros(()), 2.0)}
        return super().__call__(model, items)


def test_a_part_that_reaches_no_parameter_adds_nothing(lively):
    model = lively("llama").model
    parameters = list(model.parameters())
    run = Run(batch_tokens=4)
    both = gradient(model, parameters, Halting(3), rows(5, 3), run, length=size)
    alone = gradient(model, parameters, Halting(3), rows(5), run, length=size)
    torch.testing.assert_close(both.grads, [grad * 4 / 6 for grad in alone.grads])


def test_one_inner_step_is_one_training_step(lively):
    ours, theirs, items = lively("llama"), lively("llama"), rows(5, 9)
    settings = TrainSettings(lr=1e-2, max_steps=1, batch_rows=2, clip_norm=0.0, weight_decay=0.1)
    train(
        theirs.model,
        theirs.model.parameters(),
        lambda epoch: items,
        SftObjective(3),
        settings,
        Run(),
        length=size,
    )
    seen = []
    parameters = list(ours.model.parameters())
    inner_loop(
        parameters,
        1,
        lambda step: gradient(ours.model, parameters, SftObjective(3), items, Run(), length=size),
        lambda chosen: adamw(chosen, 1e-2, 0.1, (0.9, 0.999), 1e-8),
        lambda step, loss: seen.extend(p.detach().clone() for p in parameters),
    )
    for mine, other in zip(seen, theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_values_and_gradients_come_back_bit_for_bit():
    odd = torch.tensor([0.1, -0.0, 1e-42, float("inf")])
    parameters = [torch.nn.Parameter(odd.clone()), torch.nn.Parameter(torch.ones(2))]
    held = parameters[1].grad = torch.tensor([3.0, 4.0])
    with restored(parameters):
        parameters[0].data.add_(1)
        parameters[1].grad = None
    assert torch.equal(parameters[0].data.view(torch.int32), odd.view(torch.int32))
    assert parameters[1].grad is held
    assert parameters[0].grad is None
    with pytest.raises(ZeroDivisionError), restored(parameters):
        parameters[0].data.zero_().add_(1 / len([]))
    assert torch.equal(parameters[0].data.view(torch.int32), odd.view(torch.int32))


def test_an_inner_loop_leaves_nothing_behind_and_begins_anew():
    """Two loops alike give the same looks: neither weights nor moments of the first reach the second."""
    weight, built = torch.nn.Parameter(torch.tensor([1.0, -2.0])), []

    def build(chosen):
        built.append(adamw(chosen, 0.1, 0.0, (0.9, 0.999), 1e-8))
        return built[-1]

    def once():
        looks = []
        inner_loop(
            [weight],
            3,
            lambda step: Gradient((weight**2).sum().detach(), [2 * weight.detach()]),
            build,
            lambda step, loss: looks.append((step, float(loss), weight.detach().clone())),
        )
        return looks

    first, second = once(), once()
    assert torch.equal(weight.detach(), torch.tensor([1.0, -2.0]))
    assert weight.grad is None
    assert [step for step, _, _ in first] == [0, 1, 2]
    assert first[0][1] == 5.0
    assert all(torch.equal(one[2], other[2]) for one, other in zip(first, second, strict=True))
    assert first[0][2].tolist() == pytest.approx([0.9, -1.9])
    assert built[0] is not built[1]


def test_no_steps_change_nothing():
    weight = torch.nn.Parameter(torch.ones(2))
    inner_loop([weight], 0, lambda step: pytest.fail("a step"), sgd, lambda step, loss: pytest.fail("a look"))
    assert torch.equal(weight.detach(), torch.ones(2))


def test_gathering_by_hand():
    into = [None, torch.tensor([1.0]), None]
    given = torch.tensor([2.0])
    add_scaled(into, [given, torch.tensor([4.0]), None], 0.5)
    assert into[0].tolist() == [1.0]
    assert into[1].tolist() == [3.0]
    assert into[2] is None
    whole = [None]
    add_scaled(whole, [given], 1.0)
    whole[0].add_(1)
    assert given.tolist() == [2.0]
