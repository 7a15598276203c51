"""Token search: gradients along one-hot rows, allowed ids, candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from temper.core.errors import ConfigError, ModelError, NumericsError
from temper.ops.search import (
    allowed_mask,
    combine_gradients,
    distinct,
    embedding_table,
    first_order,
    gradient_choices,
    project_on_tokens,
    propose,
    random_choices,
    require_same_vocabulary,
)
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.loading import load_base
from temper.systems.tiny import build_tiny

from .search_runs import scorer_of, slow_losses

# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "gemma3", "neox"])
def test_gradient_is_the_finite_difference_along_one_hot_rows(kind):
    """A spare vocabulary row W[old] + eps W[v] goes through the model's own embedding path, scaling included."""
    torch.manual_seed(1)
    model, tokenizer = build_tiny(kind)
    system = CausalLM(_untied(model).double(), tokenizer, Chat(tokenizer))
    scorer = scorer_of(system)
    ids = [40, 50, 60, 70]
    grad_NV = scorer.gradient(ids)
    weight = system.model.get_input_embeddings().weight
    spare, eps = min(set(range(300, 512)) - set(scorer.prompt.full_ids(ids))), 1e-3
    kept = weight.detach().clone()
    largest = grad_NV.abs().argmax(1).tolist()
    for position, token in ((0, largest[0]), (2, largest[2]), (3, 200)):
        moved = [*ids[:position], spare, *ids[position + 1 :]]
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[spare] = kept[ids[position]] + sign * eps * kept[token]
            found.append(slow_losses(system, scorer.prompt, torch.tensor([moved])).item())
        measured = (found[0] - found[1]) / (2 * eps)
        assert grad_NV[position, token].item() == pytest.approx(measured, rel=1e-2, abs=1e-4)
        assert token == 200 or abs(measured) > 1e-2, "a direction in which nothing happens shows nothing"


def _untied(model):
    """A head of its own, and weights large enough that every token has a say in the loss."""
    model.set_output_embeddings(nn.Linear(32, 512, bias=False))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_gradient_is_the_same_with_and_without_kept_keys(lively, kind):
    system = lively(kind)
    ids = [40, 50, 60, 70]
    kept, whole = scorer_of(system), scorer_of(system, reuse=False)
    kept.losses(torch.tensor([ids]), ids)
    torch.testing.assert_close(kept.gradient(ids), whole.gradient(ids), atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in system.model.parameters())


def test_embedding_table_follows_the_modules_forward():
    plain, _ = build_tiny("llama")
    scaled, _ = build_tiny("gemma3")
    assert embedding_table(plain).data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    weight = scaled.get_input_embeddings().weight
    torch.testing.assert_close(embedding_table(scaled), weight.detach() * 32**0.5, rtol=1e-3, atol=0)


def test_projection_by_hand_and_its_error():
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    assert project_on_tokens(torch.tensor([[2.0, -1.0]]), table).tolist() == [[2.0, -2.0, 5.0]]
    half = torch.full((1, 2), 60000.0, dtype=torch.float16)
    assert torch.isfinite(project_on_tokens(half, table.half())).all(), "the product is taken in float32"
    with pytest.raises(NumericsError, match="not finite"):
        project_on_tokens(torch.tensor([[float("inf"), 0.0]]), table)


def test_a_half_precision_gradient_that_overflows_is_scaled(lively, monkeypatch):
    system = lively("llama")
    system.model.half()
    scorer = scorer_of(system)
    wanted = scorer.gradient([40, 50, 60])
    real, calls = torch.autograd.grad, []

    def overflowing(loss, leaf, **more):
        calls.append(loss.detach().item())
        (grad,) = real(loss, leaf, **more)
        return (torch.full_like(grad, torch.inf),) if len(calls) == 1 else (grad,)

    monkeypatch.setattr(torch.autograd, "grad", overflowing)
    again = scorer.gradient([40, 50, 60])
    assert calls[1] == pytest.approx(calls[0] / 1024, rel=1e-2)
    assert nn.functional.cosine_similarity(again.flatten(), wanted.flatten(), dim=0) > 0.99


def test_gradients_of_prompts_and_models_by_hand():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert torch.allclose(combine_gradients([[a, b]]), torch.tensor([[0.6, 0.8]])), (
        "summed, then rows to length 1"
    )
    both = combine_gradients([[a], [1e6 * b]])
    assert torch.allclose(both, torch.tensor([[1.0, 1.0]])), "no model outshouts another"
    assert combine_gradients([[torch.ones(2, 5)], [torch.ones(2, 3)]]).shape == (2, 3)
    assert torch.isfinite(combine_gradients([[torch.zeros(1, 2)]])).all()


def test_what_a_gradient_foresees_by_hand_and_in_the_limit(lively):
    grad = torch.tensor([[1.0, 2.0, 5.0], [0.0, -3.0, 1.0]])
    rows = torch.tensor([[1, 0], [2, 0], [1, 1], [0, 2]])
    assert first_order(grad, rows, [1, 0]).tolist() == [0.0, 3.0, -3.0, 0.0]
    system = lively("llama")
    scorer, current = scorer_of(system), [40, 50, 60]
    weight, old = (
        system.model.get_input_embeddings().weight,
        system.model.get_input_embeddings().weight.clone(),
    )
    with torch.no_grad():  # token 300 lies close to token 50
        weight[300] = old[50] + 1e-3 * old[301]
    rows = torch.tensor([[40, 50, 60], [40, 300, 60]])
    loss = scorer_of(system, reuse=False).losses(rows, current).loss_K
    foreseen = first_order(scorer.gradient(current), rows, current)
    assert foreseen[0] == 0
    assert foreseen[1].item() == pytest.approx((loss[1] - loss[0]).item(), rel=0.2, abs=2e-5)


@given(st.floats(0.01, 100.0))
def test_top_choices_of_one_model_ignore_the_gradients_scale(scale):
    grad = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(40, dtype=torch.bool)
    plain = gradient_choices(grad, allowed, 5)
    assert torch.equal(gradient_choices(combine_gradients([[grad * scale]]), allowed, 5), plain)


# -- ids and candidates ----------------------------------------------------------------------------


def test_allowed_ids_of_a_tiny_tokenizer():
    system = load_base("tiny:llama")
    system.tokenizer.add_tokens(["blorp"])
    system.model.resize_token_embeddings(520)
    allowed = allowed_mask(system)
    ids = system.tokenizer.convert_tokens_to_ids
    assert allowed.shape == (520,)
    assert not allowed[:4].any(), "control tokens"
    assert not allowed[ids("blorp")], "every added token"
    assert not allowed[513:].any(), "beyond the tokenizer"
    assert not allowed[ids("Ċ")], "newlines are unprintable"
    assert allowed[ids("Ġ")], "spaces are printable"
    assert allowed[ids("!")]
    high = ids("Ã")
    assert system.tokenizer.decode([high]) == "\ufffd"
    assert not allowed_mask(system, ascii_only=False)[high], "no whole character"


def test_ascii_is_a_choice(monkeypatch):
    system = load_base("tiny:llama")
    monkeypatch.setattr(type(system.tokenizer), "batch_decode", lambda self, ids, **_: ["é"] * len(ids))
    with pytest.raises(ModelError, match="no token"):
        allowed_mask(system)
    assert allowed_mask(system, ascii_only=False)[4:512].all()


def test_choices_are_best_first_and_allowed():
    grad = torch.tensor([[5.0, -3.0, -9.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    allowed = torch.tensor([True, True, False, True])
    assert gradient_choices(grad, allowed, 2).tolist() == [[1, 3], [0, 1]]
    assert gradient_choices(grad, allowed, 9).shape == (2, 3), "no more than there are"
    assert random_choices(2, allowed).tolist() == [[0, 1, 3]] * 2


def test_even_positions_by_hand():
    current, choices = torch.zeros(4, dtype=torch.long), torch.full((4, 3), 7)
    drawn = propose(current, choices, 8, torch.Generator().manual_seed(0))
    assert (drawn == 7).int().argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (drawn == 7).sum(1).tolist() == [1] * 8


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 9))
def test_uniform_candidates_change_as_many_positions_as_asked(replace, num, seed):
    current = torch.arange(6)
    choices = torch.arange(100, 130).reshape(6, 5)
    drawn = propose(
        current, choices, num, torch.Generator().manual_seed(seed), positions="uniform", num_replace=replace
    )
    changed = drawn != current
    assert changed.sum(1).tolist() == [replace] * num
    for row, flags in zip(drawn, changed, strict=True):
        assert all(int(row[i]) in choices[i].tolist() for i in flags.nonzero()[:, 0].tolist())


def test_distinct_keeps_the_first_of_equals():
    seen = {(1, 2)}
    rows = torch.tensor([[1, 2], [3, 4], [3, 4], [5, 6]])
    assert distinct(rows, seen).tolist() == [[3, 4], [5, 6]]
    assert seen == {(1, 2), (3, 4), (5, 6)}


def test_vocabularies_must_agree():
    one, two = load_base("tiny:llama"), load_base("tiny:gpt2")
    require_same_vocabulary([one, two])
    two.tokenizer.add_tokens(["blorp"])
    with pytest.raises(ConfigError, match="different vocabularies"):
        require_same_vocabulary([one, two])
