"""Value vectors: found in every architecture of the table, put back bit for bit, trained alone, refused where unsafe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from temper.core.errors import ModelError, NeedsError
from temper.ops.value_vectors import (
    DOWN_PROJECTIONS,
    Place,
    down_projection,
    num_layers,
    output_embedding,
    replaced,
    top_tokens,
    vectors_at,
    with_vectors,
)
from temper.systems.tiny import build_tiny

IDS = torch.tensor([[5, 17, 9, 200, 33]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "phi", "phi3", "neox"])
def test_a_vector_is_what_its_neuron_adds(kind: str) -> None:
    """The MLP's output with neuron j at 1 and at 0 differs by v_j, whatever way the matrix is kept."""
    model, _ = build_tiny(kind)
    assert num_layers(model) == 2
    module = down_projection(model, 1).module
    inner = down_projection(model, 1).columns().shape[1]
    one = torch.zeros(1, inner)
    one[0, 7] = 1
    with torch.no_grad():
        added = module(one) - module(torch.zeros(1, inner))
    assert torch.allclose(added[0], vectors_at(model, [Place(1, 7)])[0], atol=1e-7)


def test_olmo_by_both_names() -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = OlmoForCausalLM(config)
    assert down_projection(model, 0).columns().shape == (16, 24)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff_out = nn.Linear(24, 16, bias=False)

    # The first release's own code: model.transformer.blocks.{l}.ff_out.
    old = nn.Module()
    old.config = type("Config", (), {"model_type": "hf_olmo"})()
    old.model = nn.Module()
    old.model.transformer = nn.Module()
    old.model.transformer.blocks = nn.ModuleList([Block(), Block()])
    spot = down_projection(old, 1)
    assert spot.name == "model.transformer.blocks.1.ff_out.weight"
    assert spot.columns().shape == (16, 24)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_replaced_changes_one_column_and_leaves_no_trace(kind: str) -> None:
    model, _ = build_tiny(kind)
    before, tensors = logits(model), copy.deepcopy(model.state_dict())
    places = [Place(0, 3), Place(1, 5), Place(1, 6)]
    new = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with replaced(model, places, new):
        assert torch.equal(vectors_at(model, places), new)
        assert torch.equal(vectors_at(model, [Place(1, 4)]), tensors_at(tensors, kind, 1, 4))
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), replaced(model, places, new):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def tensors_at(tensors: dict[str, torch.Tensor], kind: str, layer: int, dim: int) -> torch.Tensor:
    if kind == "gpt2":
        return tensors[f"transformer.h.{layer}.mlp.c_proj.weight"][dim][None]
    return tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, dim][None]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_standalone_vector_gets_the_columns_gradient_and_nobody_else_moves(kind: str) -> None:
    model, _ = build_tiny(kind)
    places = [Place(0, 3), Place(1, 5)]
    new = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with replaced(model, places, new):
        direct = logits(model)
        loss = model(input_ids=IDS).logits.float().logsumexp(-1).sum()
        slow = torch.autograd.grad(loss, [down_projection(model, p.layer).weight for p in places])
    wanted = torch.stack(
        [g[p.dim] if kind == "gpt2" else g[:, p.dim] for g, p in zip(slow, places, strict=True)]
    )
    vectors = nn.Parameter(new.clone())
    with with_vectors(model, places, vectors):
        out = model(input_ids=IDS).logits
        assert torch.allclose(out, direct, atol=1e-5)
        (grad,) = torch.autograd.grad(out.float().logsumexp(-1).sum(), vectors)
    assert torch.allclose(grad, wanted, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_top_tokens_equal_a_full_sort_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build_tiny("llama")
    embedding = output_embedding(model)
    vectors = vectors_at(model, [Place(0, n) for n in range(9)])
    slow = vectors @ embedding.T
    found = top_tokens(vectors, embedding, 20)
    assert torch.equal(found.ids_PK, slow.argsort(1, descending=True)[:, :20])
    assert torch.allclose(found.strength_P, slow.sort(1, descending=True).values[:, :20].mean(1))
    monkeypatch.setattr("temper.ops.value_vectors.CHUNK_LOGITS", 1)
    assert torch.equal(top_tokens(vectors, embedding, 20).ids_PK, found.ids_PK)
    assert top_tokens(vectors, embedding, 9999).ids_PK.shape == (9, len(embedding))


def test_places_that_are_not_there_are_named() -> None:
    model, _ = build_tiny("llama")
    with pytest.raises(ModelError, match="no layer 2.*0 to 1"):
        down_projection(model, 2)
    with pytest.raises(ModelError, match="no layer -1"):
        down_projection(model, -1)
    with pytest.raises(ModelError, match="no column 64.*has 64"):
        vectors_at(model, [Place(0, 64)])


def test_what_has_no_plain_columns_is_refused() -> None:
    model, _ = build_tiny("llama")
    model.config.num_local_experts = 8
    with pytest.raises(NeedsError, match="mixture of experts"):
        num_layers(model)
    model.config.num_local_experts = 1
    model.config.model_type = "mamba"
    with pytest.raises(NeedsError, match="'mamba'.*not known"):
        num_layers(model)
    model.config.model_type = "llama"
    mlp = model.model.layers[0].mlp
    linear = mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(NeedsError, match="int8.*quantised"):
        down_projection(model, 0)
    linear.weight = nn.Parameter(torch.zeros(4, 32, 64))
    with pytest.raises(NeedsError, match="quantised or fused"):
        down_projection(model, 0)
    mlp.down_proj = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(NeedsError, match="a Sequential, not a plain"):
        down_projection(model, 0)
    del mlp.down_proj
    with pytest.raises(NeedsError, match="no module"):
        down_projection(model, 0)
    assert "gpt2" in DOWN_PROJECTIONS
