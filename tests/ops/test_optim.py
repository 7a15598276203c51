import pytest
import torch
from torch import nn

from temper.ops.optim import adamw, lr_factor, set_lr


def test_linear_by_hand():
    assert [lr_factor(step, 5, "linear", 0.4) for step in range(5)] == pytest.approx(
        [0.5, 1, 1, 2 / 3, 1 / 3]
    )


def test_cosine_is_half_way_down_in_the_middle():
    factors = [lr_factor(step, 10, "cosine", 0.0) for step in range(10)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)


def test_cosine_and_linear_agree_with_transformers():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer, 0, 8)
        theirs = []
        for _ in range(8):
            theirs.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert [lr_factor(step, 8, name, 0.0) for step in range(8)] == pytest.approx(theirs)


def test_constant_after_warmup():
    assert [lr_factor(step, 4, "constant", 0.5) for step in range(4)] == [0.5, 1, 1, 1]


def test_decay_spares_vectors():
    layer = nn.LayerNorm(3)
    matrix = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        matrix.weight.fill_(1.0)
    optimizer = adamw([layer.weight, matrix.weight], 0.1, 0.5, (0.9, 0.999), 1e-8)
    for parameter in (layer.weight, matrix.weight):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.weight, torch.ones(3))
    torch.testing.assert_close(matrix.weight, torch.full((3, 3), 0.95))


def test_every_group_keeps_its_own_rate():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])
