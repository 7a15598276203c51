import pytest
import torch
from torch import nn

from temper.ops.checkpoint import pack_optimizer, unpack_optimizer
from temper.ops.optim import adamw, lamb, lr_factor, set_lr


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


def test_lamb_by_hand():
    """First step, one weight of length 5: mean 0.1 g, square 0.001 g^2, so Adam's step is 0.1 / sqrt(0.001) = 3.1623 each."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = lamb([weight], lr=0.1, weight_decay=0.0, eps=0.0)
    weight.grad = torch.tensor([[2.0, -1.0]])
    optimizer.step()
    reach = 5 / 2**0.5 * 0.1  # length of the tensor, spread over two equal steps, times lr
    assert weight.tolist() == [pytest.approx([3 - reach, 4 + reach], abs=1e-5)]


def test_lamb_clamps_long_tensors_and_moves_zeros():
    long, zero = nn.Parameter(torch.full((1, 1), 1000.0)), nn.Parameter(torch.zeros(1, 1))
    optimizer = lamb([long, zero], lr=0.1, weight_decay=0.0, eps=0.0)
    long.grad, zero.grad = torch.ones(1, 1), torch.ones(1, 1)
    optimizer.step()
    assert long.item() == pytest.approx(999.0), "10 at most, not 1000"
    assert zero.item() == pytest.approx(-0.1 * 0.1 / 0.001**0.5), "Adam's own step"


def test_lamb_decays_matrices_only_and_resumes():
    def made():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]
        return parameters, lamb(parameters, lr=0.01, weight_decay=0.5)

    def step(parameters, optimizer):
        for parameter in parameters:
            parameter.grad = parameter.detach() * 2 + 1
        optimizer.step()

    parameters, optimizer = made()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    step(parameters, optimizer)
    tensors, facts = pack_optimizer(optimizer)
    others, resumed = made()
    for mine, theirs in zip(others, parameters, strict=True):
        mine.data = theirs.detach().clone()
    unpack_optimizer(resumed, {name: tensor.clone() for name, tensor in tensors.items()}, facts)
    step(parameters, optimizer)
    step(others, resumed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
