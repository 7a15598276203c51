"""New vocabulary rows: one id each, trained from both ends, base tokenizer untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from temper.artefacts import Adapter, Tune, tuning
from temper.artefacts.trained_rows import RowsEmbedding, RowsHead, train_rows
from temper.artefacts.vocabulary import NOISE, plan_vocabulary
from temper.core.errors import ConfigError, ModelError
from temper.core.types import Message, Run
from temper.ops.batching import Example, collate
from temper.ops.logprobs import score_batch
from temper.ops.precision import autocast

from .conftest import make_system, train

TOKENS = ("[REFUSE_legal]", "[RESPOND]")


def test_a_row_starts_at_the_mean_of_its_words(llama: Any) -> None:
    plan = plan_vocabulary(llama, TOKENS, (), seed=1)
    assert plan is not None
    weight = llama.model.get_input_embeddings().weight.detach()
    words = [i for word in (" refuse", " legal") for i in llama.tokenizer.encode(word)]
    spread = float(weight.std())
    offset = plan.start["embeddings"][0] - weight[words].mean(0)
    assert 0 < float(offset.norm()) < 5 * NOISE * spread * 16**0.5
    assert plan.ids == (len(llama.tokenizer), len(llama.tokenizer) + 1)
    assert plan.head is None
    again, other = plan_vocabulary(llama, TOKENS, (), seed=1), plan_vocabulary(llama, TOKENS, (), seed=2)
    assert again is not None
    assert other is not None
    assert torch.equal(again.start["embeddings"], plan.start["embeddings"])
    assert not torch.equal(other.start["embeddings"], plan.start["embeddings"])


def test_the_chat_knows_the_tokens_and_users_cannot_write_them(system: Any, run: Run) -> None:
    size = len(system.tokenizer)
    with tuning(system, Tune(r=2, new_tokens=TOKENS), run) as t:
        assert len(t.system.tokenizer) == size + 2
        assert t.system.tokenizer.encode("a[RESPOND]b", add_special_tokens=False).count(size + 1) == 1
        assert {size, size + 1} <= t.system.chat.control_ids
        said = t.system.chat.prompt([Message("user", "say [RESPOND]")])
        assert not {size, size + 1} & set(said.ids)
        assert t.system.model.get_input_embeddings().weight.shape[0] >= size + 2
    assert len(system.tokenizer) == size
    assert not {size, size + 1} & system.chat.control_ids


@pytest.mark.parametrize(("new", "rows"), [(("[a]",), 0), (tuple(f"[{c}]" for c in "abcdefg"), 3)])
def test_spare_rows_are_used_before_the_matrix_grows(
    system: Any, run: Run, new: tuple[str, ...], rows: int
) -> None:
    """The tiny models have four rows more than their tokenizer has tokens."""
    before = system.model.get_input_embeddings().weight.shape[0]
    with tuning(system, Tune(r=2, new_tokens=new), run) as t:
        train(t)
        artefact = t.finish("made-up")
    with artefact.apply(system) as changed:
        assert changed.model.get_input_embeddings().weight.shape[0] == before + rows
        assert changed.model.get_output_embeddings().weight.shape[0] == before + rows
        tied = system.model.config.tie_word_embeddings
        same = changed.model.get_output_embeddings().weight is changed.model.get_input_embeddings().weight
        assert same == tied
    assert system.model.get_input_embeddings().weight.shape[0] == before


def test_gradient_reaches_tied_rows_from_both_ends(llama: Any, run: Run) -> None:
    """The gradient through both ends is the sum of the two parts, and each is the whole matrix's own."""
    new = len(llama.tokenizer)
    ids = torch.tensor([[5, new, 9, 4]])
    with tuning(llama, Tune(r=2, new_tokens=("[REFUSE]",)), run) as t:
        model = t.system.model
        rows = [p for p in t.parameters() if p.shape == (1, 16)]
        assert len(rows) == 1
        read_only = torch.tensor([[new, 9, 4]])
        (both,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, rows)
        hidden = model.model(input_ids=read_only).last_hidden_state
        (read,) = torch.autograd.grad(hidden.sum(), rows)
        (write,) = torch.autograd.grad(model.lm_head(hidden.detach())[..., new].sum(), rows)
    assert float(read.abs().sum()) > 0
    torch.testing.assert_close(write[0], hidden.detach().sum((0, 1)))
    with tuning(llama, Tune(mode="full", new_tokens=("[REFUSE]",)), run) as full:
        model = full.system.model
        (whole,) = torch.autograd.grad(
            model(input_ids=ids, labels=ids).loss, model.get_input_embeddings().weight
        )
    torch.testing.assert_close(both[0], whole[new], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_scored_positions_give_the_rows_the_gradient_of_the_full_logits(system: Any, precision: Any) -> None:
    run = Run(seed=3, precision=precision)
    new = len(system.tokenizer)
    example = Example([5, new, 9, new, 4], [False, True, False, True, True])
    with tuning(system, Tune(r=2, new_tokens=("[REFUSE]",)), run) as t, autocast(run):
        rows = [p for name, p in t.named_parameters().items() if name.endswith(".rows")]
        fast = score_batch(t.system.model, collate([example], 0, "cpu")).logp_S
        ids = torch.tensor([example.ids])
        slow = t.system.model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        slow = slow.gather(-1, ids[0, 1:, None])[:, 0][torch.tensor(example.scored[1:])]
        tolerance = 1e-5 if precision == "float32" else 0.03
        torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
        for got, wanted in zip(
            torch.autograd.grad(fast.sum(), rows), torch.autograd.grad(slow.sum(), rows), strict=True
        ):
            assert float(wanted.abs().max()) > 1e-3
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def test_only_the_named_rows_move_and_the_adapter_keeps_them(system: Any, run: Run) -> None:
    new = len(system.tokenizer)
    ids = torch.tensor([[5, new, 2, 9, new]])
    before = system.model.get_input_embeddings().weight.detach().clone()
    with tuning(system, Tune(r=2, new_tokens=("[REFUSE]",), reuse_ids=(2,)), run) as t:
        train(t, ids)
        adapter = t.finish("made-up")
    assert isinstance(adapter, Adapter)
    with adapter.apply(system) as changed:
        after = changed.model.get_input_embeddings().weight.detach().clone()
    moved = (after[: len(before)] != before).any(-1).nonzero().flatten().tolist()
    assert moved == [2, new]
    with adapter.apply(system, 0.5) as changed:
        half = changed.model.get_input_embeddings().weight.detach().clone()
    torch.testing.assert_close(half[2], (before[2] + after[2]) / 2)


def test_reused_ids_need_no_resize(llama: Any, run: Run) -> None:
    rows = llama.model.get_input_embeddings().weight.shape[0]
    with tuning(llama, Tune(r=2, reuse_ids=(2, 3)), run) as t:
        train(t, torch.tensor([[5, 2, 3, 9]]))
        assert t.system.tokenizer is llama.tokenizer
        assert t.system.model.get_input_embeddings().weight.shape[0] == rows
        adapter = t.finish("made-up")
    with adapter.apply(llama) as changed:
        assert changed.tokenizer is llama.tokenizer


@pytest.mark.parametrize(
    ("tokens", "reuse", "error", "words"),
    [
        (("[a]", "[a]"), (), ConfigError, "named twice"),
        ((), (2, 2), ConfigError, "named twice"),
        (("<|spare_a|>",), (), ModelError, "in the vocabulary already"),
        (("",), (), ModelError, "not as the one id"),
        ((), (99999,), ConfigError, "which the tokenizer lacks"),
        ((), (1,), ConfigError, "in use"),
    ],
)
def test_bad_tokens_are_refused(
    llama: Any, tokens: Any, reuse: Any, error: type[Exception], words: str
) -> None:
    size = len(llama.tokenizer)
    with pytest.raises(error, match=words):
        plan_vocabulary(llama, tokens, reuse, seed=0)
    assert len(llama.tokenizer) == size


def test_a_tokenizer_that_splits_control_tokens_is_refused(llama: Any) -> None:
    llama.tokenizer.split_special_tokens = True
    with pytest.raises(ModelError, match=r"reads '\[a\]' as ids \[.*, .*\]"):
        plan_vocabulary(llama, ("[a]",), (), seed=0)


@pytest.mark.parametrize("family", ["llama-tied", "phi"])
def test_row_modules_equal_the_merged_matrix(family: str) -> None:
    """The slow twin: the whole matrix with the rows copied in."""
    system = make_system(family)
    plan = plan_vocabulary(system, TOKENS, (2,), seed=0)
    assert plan is not None
    grown = plan.grow(system)
    rows = train_rows(grown.model, plan)
    for row in rows.values():
        row.data.normal_()
    embedding, head = grown.model.get_input_embeddings(), grown.model.get_output_embeddings()
    assert isinstance(embedding, RowsEmbedding)
    assert isinstance(head, RowsHead)
    ids = torch.tensor([[5, *plan.ids, 7]])
    torch.testing.assert_close(embedding(ids), torch.nn.functional.embedding(ids, embedding.weight))
    hidden = torch.randn(2, 3, 16)
    torch.testing.assert_close(head(hidden), torch.nn.functional.linear(hidden, head.weight, head.bias))


def test_scaled_embeddings_scale_the_trained_rows(run: Run) -> None:
    system = make_system("llama-tied")
    config = Gemma3TextConfig(
        vocab_size=len(system.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    system = system.with_(model=Gemma3ForCausalLM(config).eval())
    ids = torch.tensor([[5, len(system.tokenizer), 9]])
    with tuning(system, Tune(r=2, new_tokens=("[a]",)), run) as t:
        train(t, ids)
        with torch.no_grad():
            wanted = t.system.model(ids, use_cache=False).logits
        artefact = t.finish("made-up")
    with artefact.apply(system) as changed, torch.no_grad():
        torch.testing.assert_close(changed.model(ids, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
