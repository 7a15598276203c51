import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from temper.core.types import Run
from temper.ops import generate as generate_module
from temper.ops import packed_linear
from temper.ops.generate import Sampling, generate
from temper.ops.packed_linear import packed_linears


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 192), nn.GELU(), nn.Linear(192, 128, bias=False), Doubling(128, 128))


@pytest.mark.parametrize("shape", [(1, 160), (7, 160), (5, 1, 160), (3, 40, 160), (2, 0, 160)])
@torch.no_grad()
def test_packed_products_equal_plain_ones(shape):
    model = build()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    want = model(x)
    with packed_linears(model, 8) as count:
        got = model(x)
    assert count == 2, "subclasses keep their own forward pass"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_afterwards_and_after_an_error_the_model_is_as_it_was():
    model = build()
    x = torch.randn(4, 160)
    want = model(x)
    with packed_linears(model, 4), packed_linears(model, 4) as again:
        assert again == 0
    with pytest.raises(RuntimeError), packed_linears(model, 4):
        model(torch.randn(4, 3))
    assert torch.equal(model(x), want)
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_weights_of_a_file_are_in_memory_once_and_come_back(tmp_path, monkeypatch):
    model, x = build(), torch.randn(4, 160)
    want = model(x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    gone = []
    monkeypatch.setattr(packed_linear.MappedFiles, "let_go", watched(packed_linear.MappedFiles.let_go, gone))
    with packed_linears(model, 4):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(model[0].weight, load_file(tmp_path / "model.safetensors")["0.weight"])
    with pytest.raises(RuntimeError), packed_linears(model, 4):
        model(torch.randn(4, 3))
    assert set(gone) == {sys.platform.startswith("linux")}
    assert torch.equal(model(x), want)


def watched(function, seen):
    def call(*args):
        seen.append(function(*args))
        return seen[-1]

    return call


def test_only_float32_below_the_size_limit_is_packed(monkeypatch):
    with packed_linears(build().to(torch.bfloat16), 4) as count:
        assert count == 0
    monkeypatch.setattr(packed_linear, "MAX_BYTES", 1000)
    with packed_linears(build(), 4) as count:
        assert count == 0


def test_hooks_run_under_packing():
    model = build()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad(), packed_linears(model, 4):
        model(torch.randn(4, 160))
    assert seen == [(4, 192)]


@pytest.mark.parametrize("exact", [False, True])
def test_long_jobs_pack_and_write_the_same_text(monkeypatch, lively, random_prompts, slow_greedy, exact):
    packed = []

    def watch(model, num_rows):
        packed.append(num_rows)
        return packed_linears(model, num_rows)

    monkeypatch.setattr(generate_module, "packed_linears", watch)
    monkeypatch.setattr(packed_linear, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(generate_module, "PACK_FROM_TOKENS", 30)
    system = lively("llama")
    prompts = random_prompts((5, 9, 3, 14))
    replies = generate(system, prompts, Sampling(max_new_tokens=10), Run(exact=exact))
    assert [reply.ids for reply in replies] == [slow_greedy(system, ids, 10) for ids in prompts]
    assert packed == ([] if exact else [4])
    generate(system, prompts, Sampling(max_new_tokens=2), Run())
    assert len(packed) == (0 if exact else 1)


@torch.no_grad()
def test_one_may_be_left_as_it_is():
    model = build()
    x = torch.randn(4, 160)
    want = model(x)
    with packed_linears(model, 4, but=model[2]) as count:
        assert "forward" not in model[2].__dict__
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert count == 1
