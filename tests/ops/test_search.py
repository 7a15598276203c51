"""Token search: gradients along one-hot rows, allowed ids, candidates, the filter by whole prompts, exact losses."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, DynamicCache

from temper.core.errors import ConfigError, DataError, ModelError, NeedsError, NumericsError
from temper.core.types import Message, Run
from temper.ops import prefix_cache, search_losses
from temper.ops.prefix_cache import PrefixCache
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
from temper.ops.search_losses import SlotLoss, SlotScorer, mean_nll, mellowmax
from temper.ops.search_prompt import exact_rows, initial_ids, reply_prefix_ids, slot_prompt
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.loading import load_base
from temper.systems.tiny import build_tiny

PROMPT, TARGET = "What is the answer?", "Sure, here is a fox"
EAGER = {"gemma2", "mamba"}
KEPT = ["llama", "gpt2", "gemma", "neox", "qwen2", "gemma2", "mistral"]


def scorer_of(system, *, reuse=True, loss=None, run=None, prompt=PROMPT, target=TARGET):
    return SlotScorer(
        slot_prompt(system, prompt, target), loss or SlotLoss(), run or Run(), reuse_prefix=reuse
    )


def draw(current, num, seed=0, replace=1, size=512):
    generator = torch.Generator().manual_seed(seed)
    choices = torch.arange(4, size).expand(len(current), -1)
    return propose(torch.tensor(current), choices, num, generator, positions="uniform", num_replace=replace)


@torch.no_grad()
def slow_losses(system, prompt, ids_KN):
    """The slow twin: one whole row at a time, all logits, no cache."""
    out = []
    for ids in ids_KN.tolist():
        whole = prompt.full_ids(ids)
        logits = system.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        m = len(prompt.target)
        logp = logits[len(whole) - m - 1 : -1].log_softmax(-1)  # in the model's own dtype
        out.append(-logp[torch.arange(m), torch.tensor(prompt.target)].mean())
    return torch.stack(out)


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


# -- the slot in its prompt ------------------------------------------------------------------------


def merging_pair(system):
    """Two tokens whose texts, side by side, the tokenizer reads as one other token."""
    tokenizer = system.tokenizer
    for whole in range(300, 512):
        text = tokenizer.decode([whole])
        for cut in range(1, len(text)):
            left, right = (
                tokenizer(part, add_special_tokens=False).input_ids for part in (text[:cut], text[cut:])
            )
            if text.isalpha() and len(left) == len(right) == 1:
                return left[0], right[0]
    raise AssertionError


def test_a_merge_across_the_slots_border_is_dropped():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    assert prompt.before[-1] == left
    comma = system.tokenizer.convert_tokens_to_ids(",")
    rows = torch.tensor([[right, comma, comma], [comma, comma, comma]])
    alone = [
        system.tokenizer(prompt.texts([ids])[0], add_special_tokens=False).input_ids for ids in rows.tolist()
    ]
    assert alone == rows.tolist(), "the slot alone keeps its ids"
    assert exact_rows([prompt], rows) == [1]


def test_a_merge_with_what_follows_is_dropped():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say it{optim_str}" + system.tokenizer.decode([right]), TARGET)
    comma = system.tokenizer.convert_tokens_to_ids(",")
    assert exact_rows([prompt], torch.tensor([[comma, left], [comma, comma]])) == [1]


def test_the_filter_is_the_rendered_prompt(lively):
    system = lively("llama")
    prompt = slot_prompt(system, PROMPT, TARGET)
    rows = draw(initial_ids([prompt], 6), 60, replace=3)
    kept = exact_rows([prompt], rows)
    assert 0 < len(kept) < len(rows)
    for row, ids in enumerate(rows.tolist()):
        text = system.tokenizer.decode(ids)
        whole = [*prompt.before, *ids, *prompt.after]
        assert (row in kept) == (system.chat.prompt([Message("user", PROMPT + text)]).ids == whole)


def test_every_prompt_must_keep_the_ids():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    merges = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    plain = slot_prompt(system, "Say it.", TARGET)
    rows = torch.tensor([[right, right]])
    assert (len(exact_rows([plain], rows)), exact_rows([plain, merges], rows)) == (1, [])


def test_initial_ids_fill_the_slot_exactly(lively):
    system = lively("llama")
    prompts = [slot_prompt(system, text, TARGET) for text in (PROMPT, "Say it: {optim_str} Now.")]
    for num in (1, 5, 8):
        ids = initial_ids(prompts, num)
        assert len(ids) == num
        assert all(prompt.is_exact(ids, prompt.texts([ids])[0]) for prompt in prompts)
    ids = initial_ids(prompts[:1], 3, " a small fox")
    assert prompts[0].texts([ids]) == [" a small fox"]


def test_an_initial_text_that_melts_into_the_prompt_is_refused():
    system = load_base("tiny:llama")
    left, right = merging_pair(system)
    prompt = slot_prompt(system, "Say:" + system.tokenizer.decode([left]), TARGET)
    with pytest.raises(DataError, match="does not keep its tokens"):
        initial_ids([prompt], 1, system.tokenizer.decode([right]))


def test_target_ids_are_those_the_model_would_write(lively):
    system = lively("llama")
    prompt = slot_prompt(system, PROMPT, TARGET)
    said = system.chat.dialogue([Message("user", PROMPT + " !"), Message("assistant", TARGET)])
    span = said.spans[-1]
    assert prompt.target == said.ids[span.start : span.end - 1]
    assert slot_prompt(system, PROMPT, TARGET, opening=[9]).target == [9, *prompt.target]


def test_rewrites_apply_before_the_slot_is_cut(lively):
    system = lively("llama").with_(rewrites=(lambda messages: (Message("system", "Be brief."), *messages),))
    prompt = slot_prompt(system, PROMPT, TARGET)
    assert [message.role for message in prompt.messages] == ["system", "user"]
    ids = initial_ids([prompt], 3)
    typed = system.rewritten([Message("user", PROMPT + prompt.texts([ids])[0])])
    assert system.chat.prompt(typed).ids == [*prompt.before, *ids, *prompt.after]


def test_control_strings_in_a_prompt_stay_text_and_bos_is_never_stripped(lively):
    """This tokenizer's BOS is the turn marker: deleting "the BOS" from the text would delete every turn."""
    system = lively("llama")
    prompt = slot_prompt(system, "Read <|im_start|> aloud.", TARGET)
    markers = [i for i in (*prompt.before, *prompt.after) if i == system.tokenizer.bos_token_id]
    assert len(markers) == 2, "one for each turn, none from the user's text"


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        (PROMPT, "  ", "target is empty"),
        ("{optim_str} and {optim_str}", TARGET, "once"),
        (PROMPT, "fox " * 400, "context holds"),
    ],
)
def test_bad_prompts_and_targets(lively, prompt, target, message):
    with pytest.raises(DataError, match=message):
        slot_prompt(lively("llama"), prompt, target)


def test_reply_prefix_is_asked_of_the_rules_that_have_one(lively):
    class Silent:
        name = "silent"

        def start(self, prompt_ids):
            return {}

        def __call__(self, logits_BV, position_B, states):
            return logits_BV

    class Opens(Silent):
        def reply_prefix_ids(self):
            return [77]

    system = lively("llama").with_(step_rules=(Silent(), Opens()))
    assert reply_prefix_ids(system) == [77]
    assert slot_prompt(system, PROMPT, TARGET).target[0] == 77


# -- losses ----------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])
    target = torch.tensor([[0, 1]])
    wanted = (torch.log(torch.tensor(2.0)) + torch.log1p(torch.exp(torch.tensor(-2.0)))) / 2
    assert mean_nll(logits, target).item() == pytest.approx(wanted.item())
    z = torch.tensor([0.0, -3.0])
    soft = (torch.logsumexp(2 * z, 0) - torch.log(torch.tensor(2.0))) / 2
    assert mellowmax(logits, target, 2.0).item() == pytest.approx(soft.item())
    assert mellowmax(logits, target, 1e4).item() == pytest.approx(0.0, abs=1e-3), "towards the worst token"
    assert mellowmax(logits, target, 1e-3).item() == pytest.approx(-1.5, abs=1e-2), "towards the mean"


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("replace", [1, 3])
def test_kept_keys_give_the_losses_of_whole_rows(lively, kind, replace):
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    kept = scorer_of(system, run=Run(batch_tokens=200))
    current = [40, 50, 60, 70, 80, 90]
    for seed in (0, 1):  # twice: a pass that changed the prefix would show in the next
        rows = torch.cat([draw(current, 20, seed, replace), torch.tensor([current])])
        found = kept.losses(rows, current)
        slow = slow_losses(system, kept.prompt, rows)
        torch.testing.assert_close(found.loss_K, slow, atol=1e-4, rtol=1e-5)
        whole = scorer_of(system, reuse=False).losses(rows, current)
        torch.testing.assert_close(found.loss_K, whole.loss_K, atol=1e-4, rtol=1e-5)
        current = rows[3].tolist()
    assert kept.reuses_prefix
    assert slow.std() > 1e-3, "candidates that all score the same would show nothing"


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["llama", "gpt2", "gemma2", "mistral"]),
    num_slot=st.integers(1, 9),
    target=st.sampled_from(["Yes", TARGET, TARGET + " in the long grass of the field"]),
    text=st.sampled_from([PROMPT, "Now {optim_str} fold it.", PROMPT * 9]),
    budget=st.sampled_from([1, 60, 4096]),
    seed=st.integers(0, 99),
)
def test_losses_of_any_slot_prompt_and_target_are_those_of_whole_rows(
    lively, kind, num_slot, target, text, budget, seed
):
    """Positions, lengths, models and batches drawn at random; the gradient's keys serve the losses after it."""
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    kept = scorer_of(system, prompt=text, target=target, run=Run(batch_tokens=budget))
    current = torch.randint(4, 512, (num_slot,), generator=torch.Generator().manual_seed(seed)).tolist()
    for _ in range(2):
        kept.gradient(current)
        rows = draw(current, 9, seed, replace=min(2, num_slot))
        slow = slow_losses(system, kept.prompt, rows)
        torch.testing.assert_close(kept.losses(rows, current).loss_K, slow, atol=1e-4, rtol=1e-5)
        current = rows[0].tolist()
    assert kept.reuses_prefix


def test_the_gradients_pass_leaves_the_slots_keys(lively):
    """After a gradient on the same slot nothing of it is run again; after one on another slot it is."""
    scorer = scorer_of(lively("llama"))
    current = [40, 50, 60, 70, 80, 90]
    rows = draw(current, 12)
    plain = scorer.losses(rows, current).loss_K
    spent = scorer.tokens
    again = scorer.losses(rows, current).loss_K
    whole = scorer.tokens - spent
    scorer.gradient(current)
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, plain)
    deepest = int((rows != torch.tensor(current)).int().argmax(1).max())
    assert whole - (scorer.tokens - spent) == deepest
    scorer.gradient([7, *current[1:]])
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, plain, atol=1e-5, rtol=1e-5)
    assert scorer.tokens - spent == whole


def test_a_model_without_such_a_cache_is_scored_in_whole_rows(lively, caplog):
    system = lively("mamba", "eager")
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    with caplog.at_level(logging.WARNING):
        found = scorer.losses(rows, [40, 50, 60])
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert not scorer.reuses_prefix
    assert "without kept keys" in caplog.text


def test_keys_that_change_the_losses_are_not_trusted(lively, monkeypatch):
    system = lively("llama")
    monkeypatch.setattr(
        PrefixCache, "first", lambda self, num: PrefixCache([(None, None)] * len(self.prefix))
    )
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    found = scorer.losses(rows, [40, 50, 60])
    assert not scorer.reuses_prefix
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)


def test_attention_that_reads_the_prefix_once_is_given_up_where_it_changes_the_losses(lively, monkeypatch):
    """Then each row has its copy of the prefix, still cheaper than whole rows."""
    system = lively("llama")
    real, calls = prefix_cache._attend, []

    def wrong(*args, **more):
        calls.append(1)
        out, weights = real(*args, **more)
        return out * 1.1, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, prefix_cache.READ_ONCE, wrong)
    scorer = scorer_of(system)
    rows = draw([40, 50, 60], 6)
    for _ in range(2):
        found = scorer.losses(rows, [40, 50, 60]).loss_K
        torch.testing.assert_close(found, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert calls
    assert scorer.reuses_prefix
    calls.clear()
    scorer.losses(rows, [40, 50, 60])
    assert not calls


def test_a_hook_in_the_model_means_whole_rows(lively):
    system = lively("llama")
    scorer = scorer_of(system)
    handle = system.model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    assert not scorer.reuses_prefix
    handle.remove()
    assert scorer.reuses_prefix


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_fluency_counts_the_slots_own_tokens(lively, kind):
    system = lively(kind, "eager" if kind in EAGER else "sdpa")
    current = [40, 50, 60, 70]
    rows = draw(current, 10)
    scorer = scorer_of(system, loss=SlotLoss(control_weight=0.5, target_weight=2.0))
    found = scorer.losses(rows, current).loss_K
    whole = scorer_of(system, loss=SlotLoss(control_weight=0.5, target_weight=2.0), reuse=False)
    torch.testing.assert_close(found, whole.losses(rows, current).loss_K, atol=1e-4, rtol=1e-5)
    for row, ids in enumerate(rows.tolist()):
        before = scorer.prompt.before
        with torch.no_grad():
            logits = system.model(input_ids=torch.tensor([[*before, *ids]])).logits[0].float()
        nll = mean_nll(logits[None, len(before) - 1 : -1], torch.tensor([ids]))
        target = slow_losses(system, scorer.prompt, rows[row : row + 1])
        assert found[row].item() == pytest.approx((2 * target + 0.5 * nll).item(), abs=1e-3)


def test_mellowmax_is_scored_and_differentiated(lively):
    system = lively("llama")
    scorer = scorer_of(system, loss=SlotLoss(kind="mellowmax", alpha=0.7))
    plain = scorer_of(system)
    ids = [40, 50, 60]
    assert not torch.allclose(scorer.gradient(ids), plain.gradient(ids))
    assert (
        scorer.losses(torch.tensor([ids]), ids).loss_K.item()
        != plain.losses(torch.tensor([ids]), ids).loss_K.item()
    )


def test_a_hit_is_the_target_as_the_likeliest_token_everywhere(lively, slow_greedy):
    system = lively("llama")
    base = slot_prompt(system, PROMPT, TARGET)
    ids = [40, 50, 60]
    said = slow_greedy(system, [*base.before, *ids, *base.after], 4)
    import dataclasses

    hit = SlotScorer(dataclasses.replace(base, target=said), SlotLoss(), Run()).losses(
        torch.tensor([ids]), ids
    )
    near = SlotScorer(dataclasses.replace(base, target=[*said[:-1], 7]), SlotLoss(), Run())
    assert hit.hit_K.tolist() == [True]
    assert near.losses(torch.tensor([ids]), ids).hit_K.tolist() == [False]


def test_only_the_changed_end_is_run(lively):
    system = lively("llama")
    scorer = scorer_of(system)
    current = [40, 50, 60, 70, 80, 90]
    scorer.losses(torch.tensor([current]), current)
    before = scorer.tokens
    rows = torch.tensor([current] * 64)
    rows[:, 4] = torch.arange(100, 164)
    scorer.losses(rows, current)
    tail = len(scorer.prompt.after) + len(scorer.prompt.target) - 1
    assert scorer.tokens - before == 4 + 64 * (2 + tail)
    assert scorer.queries == 65


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_rows_run_no_token_in_vain(lively, kind, monkeypatch):
    """One pass for candidates of all positions; a window shorter than the text forbids it."""
    system = lively(kind)
    scorer = scorer_of(system)
    current = [40, 50, 60, 70, 80, 90]
    rows = draw(current, 14)
    wanted = slow_losses(system, scorer.prompt, rows)
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, wanted, atol=1e-4, rtol=1e-5)
    scorer.gradient(current)
    packs, real = [], search_losses.packed
    monkeypatch.setattr(search_losses, "packed", lambda *args: packs.append(1) or real(*args))
    spent = scorer.tokens
    torch.testing.assert_close(scorer.losses(rows, current).loss_K, wanted, atol=1e-4, rtol=1e-5)
    first = (rows != torch.tensor(current)).int().argmax(1)
    least = 14 * (6 + len(scorer.prompt.after) + len(scorer.prompt.target) - 1) - int(first.sum())
    if kind == "mistral":
        assert not packs
        assert scorer.tokens - spent > least
    else:
        assert packs == [1]
        assert scorer.tokens - spent == least


def test_places_of_packed_rows_by_hand():
    """Rows that leave the prefix at 2 and at 3 and end at 5."""
    rows = prefix_cache.packed([2, 3], 5, torch.device("cpu"))
    assert rows.position_S.tolist() == [2, 3, 4, 3, 4]
    assert rows.place_S.tolist() == [0, 1, 2, 4, 5]
    assert rows.token_BW.tolist()[0] == [0, 1, 2]
    assert rows.token_BW.tolist()[1][1:] == [3, 4]
    assert rows.seen_B1WK[0, 0, 2].int().tolist() == [1, 1, 0, 1, 1, 1]
    assert rows.seen_B1WK[1, 0, 1].int().tolist() == [1, 1, 1, 0, 1, 0]


def test_memory_that_runs_out_halves_the_batch_once(lively, monkeypatch):
    system = lively("llama")
    scorer = scorer_of(system, reuse=False)
    sizes = []
    real = SlotScorer._pass

    def small(self, ids_BN, start, cache):
        sizes.append(len(ids_BN))
        if len(ids_BN) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, ids_BN, start, cache)

    monkeypatch.setattr(SlotScorer, "_pass", small)
    current = [40, 50, 60]
    rows = draw(current, 16)
    found = scorer.losses(rows, current)
    torch.testing.assert_close(found.loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5)
    assert (sizes[0], scorer.max_rows) == (16, 4)
    sizes.clear()
    scorer.losses(rows, current)
    assert sizes == [4, 4, 4, 4], "the size that fitted is remembered"
    monkeypatch.setattr(SlotScorer, "_pass", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(NeedsError, match="single candidate"):
        scorer.losses(rows[:1], current)


def test_other_errors_are_not_taken_for_memory(lively, monkeypatch):
    scorer = scorer_of(lively("llama"), reuse=False)
    monkeypatch.setattr(SlotScorer, "_pass", lambda *_: (_ for _ in ()).throw(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        scorer.losses(torch.tensor([[1, 2]]), [1, 2])


def test_exact_mode_does_not_depend_on_company(lively):
    scorer = scorer_of(lively("llama"), run=Run(exact=True))
    current = [40, 50, 60]
    rows = draw(current, 9)
    together = scorer.losses(rows, current).loss_K
    alone = torch.cat([scorer.losses(row[None], current).loss_K for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_batches_change_nothing_and_keep_the_order(lively, budget, monkeypatch):
    monkeypatch.setattr(search_losses, "FILL_TOKENS", 30)
    system = lively("gpt2")
    scorer = scorer_of(system, run=Run(batch_tokens=budget))
    current = [40, 50, 60, 70]
    rows = draw(current, 25, replace=2)[torch.randperm(25, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(
        scorer.losses(rows, current).loss_K, slow_losses(system, scorer.prompt, rows), atol=1e-4, rtol=1e-5
    )


def test_bf16_losses_stay_near(lively):
    system = lively("llama")
    rows = draw([40, 50, 60], 8)
    low = scorer_of(system, run=Run(precision="bf16")).losses(rows, [40, 50, 60]).loss_K
    torch.testing.assert_close(low, slow_losses(system, scorer_of(system).prompt, rows), atol=0.2, rtol=0.05)


def test_a_prefix_is_read_and_never_changed(lively):
    """transformers' own cache grows with each pass over it; this one does not."""
    model = lively("llama").model
    prefix = PrefixCache.empty(model).extended(model, [5, 6, 7, 8])
    keys = prefix.prefix[0].keys.clone()
    own = DynamicCache()
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=own)
    for _ in range(2):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([[9, 10], [11, 12]]), past_key_values=prefix).logits
            model(input_ids=torch.tensor([[9, 10]]), past_key_values=own)
    assert (prefix.num_tokens, own.get_seq_length()) == (4, 8)
    assert torch.equal(prefix.prefix[0].keys, keys)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 11, 12]])).logits[0, -2:]
    torch.testing.assert_close(rows[1], whole, atol=1e-5, rtol=1e-4)
    short = prefix.first(2)
    assert short.num_tokens == 2
    assert short.prefix[0].keys.data_ptr() == prefix.prefix[0].keys.data_ptr(), "a view"
    assert prefix.extended(model, []) is prefix
    with pytest.raises(NeedsError, match="reads no keys"):
        prefix.recorder().recorded()


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["llama", "gpt2", "gemma", "neox", "qwen2", "mistral"]),
    num_prefix=st.integers(1, 40),
    num_own=st.integers(1, 30),
    num_rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_prefix_read_once_gives_the_logits_of_whole_texts(
    lively, kind, num_prefix, num_own, num_rows, seed
):
    """Also past a sliding window, with key heads shared or not; afterwards the model is as it was."""
    model = lively(kind).model
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(4, 512, (num_prefix,), generator=generator)
    rows = torch.randint(4, 512, (num_rows, num_own), generator=generator)
    prefix = PrefixCache.empty(model).extended(model, head.tolist())
    with torch.no_grad():
        copied = model(input_ids=rows, past_key_values=prefix).logits
        with prefix_cache.read_once(model, prefix):
            once = model(input_ids=rows, past_key_values=prefix).logits
        whole = model(input_ids=torch.cat([head.expand(num_rows, -1), rows], dim=1)).logits[:, num_prefix:]
        torch.testing.assert_close(once, whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(once, copied, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(input_ids=rows, past_key_values=prefix).logits, copied)
    assert model.config._attn_implementation == "sdpa"


def test_only_plain_sdpa_reads_a_prefix_once(lively):
    eager = lively("gemma2", "eager").model
    prefix = PrefixCache.empty(eager).extended(eager, [5, 6, 7])
    with prefix_cache.read_once(eager, prefix):
        assert eager.config._attn_implementation == "eager"
    with pytest.raises(RuntimeError, match="more than a softmax"):
        prefix_cache._attend(None, None, None, None, None, softcap=50.0)
