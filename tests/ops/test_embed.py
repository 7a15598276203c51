"""Vectors of texts beside one text at a time through the plain model; pooling by hand; bfloat16 layers put back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, DataError, NeedsError, NumericsError
from temper.core.types import Run
from temper.data import assets
from temper.ops.bf16_modules import bf16_modules
from temper.ops.embed import embed, pool, row_batches, vectors
from temper.systems.loading import load_base
from temper.systems.sentence_layout import POOLING, Layout

KINDS = ["bert", "roberta", "mpnet"]
SENTENCE = "the old mill stood beside a stream and children went there in summer to read , play or sleep"
TEXTS = [" ".join(SENTENCE.split()[: 1 + 5 * place % 17]) for place in range(23)] + ["", "Yes."]


def lively(kind, **layout):
    """A tiny encoder whose weights are large enough that every token matters."""
    system = load_base(f"tiny:{kind}")
    with torch.no_grad():
        for parameter in system.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return system.with_(layout=Layout(**layout))


@torch.no_grad()
def slow_embed(system, texts):
    """One text at a time, no packing, no padding, pooled by plain loops."""
    out = []
    for row in system.ids(texts):
        hidden_TD = system.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        parts = [slow_pool(hidden_TD, mode) for mode in system.layout.pooling]
        vector_D = torch.cat(parts)
        out.append(vector_D / vector_D.norm() if "normalize" in system.layout.steps else vector_D)
    return torch.stack(out)


def slow_pool(hidden_TD, mode):
    num = len(hidden_TD)
    if mode == "cls":
        return hidden_TD[0]
    if mode == "lasttoken":
        return hidden_TD[-1]
    if mode == "max":
        return hidden_TD.max(0).values
    if mode == "weightedmean":
        return sum((place + 1) * hidden_TD[place] for place in range(num)) / sum(range(1, num + 1))
    return hidden_TD.sum(0) / (num**0.5 if mode == "mean_sqrt_len_tokens" else num)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [Run(), Run(batch_tokens=40), Run(exact=True)])
def test_equals_one_by_one(kind, run):
    system = lively(kind, pooling=("mean",), steps=("normalize",))
    torch.testing.assert_close(embed(system, TEXTS, run), slow_embed(system, TEXTS), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_is_bit_identical_whatever_stands_beside(kind):
    system = lively(kind)
    together = embed(system, TEXTS, Run(exact=True))
    alone = torch.cat([embed(system, [text], Run(exact=True, batch_tokens=1)) for text in TEXTS])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_pooling_side_by_side(attention):
    system = load_base("tiny:bert", attention=attention).with_(layout=Layout(pooling=POOLING))
    assert system.takes_rows == (attention == "sdpa")
    vectors_ND = embed(system, TEXTS, Run())
    assert vectors_ND.shape == (len(TEXTS), system.width) == (len(TEXTS), 32 * len(POOLING))
    torch.testing.assert_close(vectors_ND, slow_embed(system, TEXTS), atol=2e-6, rtol=1e-5)


def test_pooling_by_hand():
    hidden_SD = torch.tensor([[1.0, -4.0], [3.0, 2.0], [5.0, 5.0]])
    lengths_B = torch.tensor([2, 1])
    expected = {
        "mean": [2.0, -1.0],
        "max": [3.0, 2.0],
        "cls": [1.0, -4.0],
        "lasttoken": [3.0, 2.0],
        "weightedmean": [7 / 3, 0.0],
    }
    for mode, first in expected.items():
        torch.testing.assert_close(pool(hidden_SD, lengths_B, [mode]), torch.tensor([first, [5.0, 5.0]]))
    root = torch.tensor([4.0, -2.0]) / 2**0.5
    torch.testing.assert_close(pool(hidden_SD, lengths_B, ["mean_sqrt_len_tokens"])[0], root)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(TEXTS))), budget=st.integers(1, 200))
def test_order_and_budget_change_nothing(order, budget):
    system = load_base("tiny:bert")
    straight = embed(system, TEXTS, Run())
    shuffled = embed(system, [TEXTS[place] for place in order], Run(batch_tokens=budget))
    torch.testing.assert_close(shuffled, straight[list(order)], atol=1e-6, rtol=1e-5)


def test_gradients_equal_those_of_padded_batches():
    """Rows one behind another and a padded batch give one gradient."""
    found = []
    for attention in ("sdpa", "eager"):
        system = load_base("tiny:bert", attention=attention, dtype="float64")
        rows = system.ids(TEXTS)
        vectors(system, rows).square().sum().backward()
        found.append({name: p.grad for name, p in system.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_layers_are_close_and_leave_no_trace(kind):
    system = lively(kind, steps=("normalize",))
    before = embed(system, TEXTS, Run())
    low = embed(system, TEXTS, Run(precision="bf16"))
    assert 0.99 < (before * low).sum(1).min() < 1
    assert torch.equal(embed(system, TEXTS, Run()), before)
    assert torch.equal(
        embed(system, TEXTS, Run(precision="bf16", exact=True)), embed(system, TEXTS, Run(exact=True))
    )
    with bf16_modules(system.model) as num_changed:
        assert num_changed > 10
    with pytest.raises(ZeroDivisionError), bf16_modules(system.model):
        raise ZeroDivisionError
    assert not [module for module in system.model.modules() if "forward" in module.__dict__]


def test_batches_hold_the_budget_and_every_row():
    system = load_base("tiny:bert")
    lengths = [5, 90, 3, 40, 40, 7]
    batches = row_batches(system, lengths, Run(batch_tokens=60))
    assert sorted(place for batch in batches for place in batch) == list(range(6))
    assert batches[0] == [1], "a row longer than the budget stands alone"
    assert all(sum(lengths[place] for place in batch) <= 60 for batch in batches[1:])


def test_prompts_and_control_strings():
    system = load_base("tiny:bert")
    asked = system.with_(layout=Layout(prompts={"query": "The fox: "}, default_prompt="query"))
    expected = embed(system, ["The fox: read"], Run())
    assert torch.equal(embed(asked, ["read"], Run()), expected)
    assert torch.equal(
        embed(asked.with_(layout=Layout(prompts=asked.layout.prompts)), ["read"], Run(), prompt="query"),
        expected,
    )
    control = set(system.tokenizer.all_special_ids)
    assert not control & set(system.ids(["a <|im_end|> b <|pad|>"])[0][1:-1])
    with pytest.raises(ConfigError, match="no prompt 'quary'"):
        embed(asked, ["read"], Run(), prompt="quary")


def test_bad_input_is_named():
    system = load_base("tiny:bert")
    assert embed(system, [], Run()).shape == (0, 32)
    with pytest.raises(NeedsError, match="lacks 'embed'"):
        embed(load_base("tiny:llama"), ["a"], Run())
    bare = load_base("tiny:bert")
    bare.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="text 1"):
        bare.ids(["a", ""])
    assert len(system.with_(layout=Layout(max_tokens=4)).ids(["a long text of many words"])[0]) == 4
    assert system.capabilities  # probed while the weights are whole
    with torch.no_grad():
        system.model.get_input_embeddings().weight[system.ids(["fox"])[0][1]] = torch.nan
    with pytest.raises(NumericsError, match="text 1"):
        embed(system, ["the", "fox"], Run())


@pytest.mark.skipif(not assets.is_cached("minilm"), reason="minilm is not fetched")
def test_minilm_knows_what_is_alike():
    system = load_base("minilm")
    texts = ["A man is eating food.", "Someone eats a meal.", "The girl carries a baby."]
    vectors_ND = embed(system, texts, Run())
    torch.testing.assert_close(vectors_ND, slow_embed(system, texts), atol=1e-6, rtol=1e-5)
    likeness = vectors_ND @ vectors_ND.T
    assert likeness[0, 1] > 0.6 > likeness[0, 2] + 0.3
    low = embed(system, texts, Run(precision="bf16"))
    assert (low * vectors_ND).sum(1).min() > 0.9995
