"""The gradients of a linear head, chunk by chunk, against autograd and by hand."""

import math

import pytest
import torch

from temper.ops import projection


@pytest.mark.parametrize("rows_a_chunk", [2, 5, 100])
@pytest.mark.parametrize("block", [7, 8192])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_gradients_of_a_head_are_autograds(monkeypatch, rows_a_chunk, block, trained):
    monkeypatch.setattr(projection, "CHUNK_LOGITS", rows_a_chunk * 30)
    monkeypatch.setattr(projection, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    head = torch.nn.Linear(6, 30, dtype=torch.float64)
    target = torch.randint(30, (11,), generator=generator)
    chosen = {"hidden": [hidden], "weight": [head.weight], "bias": [head.bias]}
    chosen["all"] = [hidden, head.weight, head.bias]
    for tensor in chosen["all"]:
        tensor.requires_grad_(any(tensor is one for one in chosen[trained]))
    weights = torch.randn(11, generator=generator, dtype=torch.float64)
    plain = head(hidden).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    ours = projection.token_logprobs(head, hidden, target, 30)
    torch.testing.assert_close(ours, plain)
    want = torch.autograd.grad((weights * plain).sum(), chosen[trained])
    got = torch.autograd.grad((weights * ours).sum(), chosen[trained])
    torch.testing.assert_close(got, want)


def test_no_rows_leave_a_head_without_slope():
    head = torch.nn.Linear(6, 30)
    logp = projection.token_logprobs(head, torch.zeros(0, 6, requires_grad=True), torch.zeros(0).long(), 30)
    (grad,) = torch.autograd.grad(logp.sum(), head.weight)
    assert not grad.any()


def test_certain_tokens_keep_their_small_slopes_in_bf16():
    """p rounds to 1 in bf16 here; 1 - p must not be 0."""
    head = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[7.0], [0.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logp = projection.token_logprobs(head, hidden, torch.tensor([0]), 2)
    left = 1 / (1 + math.exp(7.0))
    d_hidden, d_weight = torch.autograd.grad(logp.sum(), [hidden, head.weight])
    assert d_hidden.item() == pytest.approx(7 * left, rel=0.02)
    assert d_weight.flatten().tolist() == pytest.approx([left, -left], rel=0.02)
