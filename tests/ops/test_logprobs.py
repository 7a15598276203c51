"""Log-probabilities against their slow twin: full logits, log-softmax, gather."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from temper.core.errors import DataError, NumericsError
from temper.core.types import Run
from temper.ops import logprobs, projection
from temper.ops.batching import Example, collate
from temper.ops.logprobs import (
    mean_by_row,
    next_token_logits,
    position_logits,
    reference_logprobs,
    response_logprobs,
    score_batch,
    sum_by_row,
)

# peft reads a name that transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

VOCAB = 61
SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
SMALL |= dict(num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.6)


def llama(tied=False, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, tie_word_embeddings=False)
    )


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2))


def lora(targets=("q_proj", "v_proj"), **more):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=list(targets), **more))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "gemma2": gemma2,
    "granite": granite,
    "cohere": cohere,
    "lora": lora,
    "lora-head": lambda: lora(("q_proj", "lm_head")),
    "lora-saved-head": lambda: lora(modules_to_save=["lm_head"]),
    "prompt-tuning": lambda: get_peft_model(
        llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


def draw(seed, sizes=(9, 4, 6)):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for size in sizes:
        ids = torch.randint(0, VOCAB, (size,), generator=generator).tolist()
        scored = (torch.rand(size, generator=generator) < 0.5).tolist()
        scored[0], scored[-1] = False, True
        examples.append(Example(ids, scored))
    return examples


def slow_rows(model, examples):
    """One row at a time, all logits, log-softmax, gather."""
    rows = []
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0, -len(example.ids) :]
        logp = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        rows.append(logp[torch.tensor(example.scored[1:])])
    return rows


def system_of(model):
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    chat = SimpleNamespace(sha256="template")
    return SimpleNamespace(model=model, tokenizer=tokenizer, chat=chat, device="cpu", fingerprint="weights")


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_slow_twin_values_and_gradients(name):
    model, examples = MODELS[name]().double().eval(), draw(3)
    weight = torch.linspace(-1, 2, sum(sum(example.scored) for example in examples)).double()
    slow = torch.cat(slow_rows(model, examples))
    (slow * weight).sum().backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scored = score_batch(model, collate(examples, 0))
    torch.testing.assert_close(scored.logp_S, slow.detach(), atol=1e-10, rtol=0, check_dtype=True)
    (scored.logp_S * weight).sum().backward()
    got = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert wanted
    # Their norms compute in float32 inside, whatever the weights.
    tolerance = 1e-6 if name in {"gemma2", "cohere"} else 1e-9
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_finds_out_whether_logits_are_the_heads(name):
    assert projection.head_is_plain(MODELS[name]()) is (name not in {"gemma2", "granite", "cohere"})


@pytest.mark.parametrize("name", ["llama", "tied", "lora", "lora-head", "gpt2"])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_chunks_change_nothing(name, rows, monkeypatch):
    model, batch = MODELS[name]().double().eval(), collate(draw(5), 0)

    def run():
        model.zero_grad()
        logp = score_batch(model, batch).logp_S
        logp.square().sum().backward()
        return logp.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, grads = run()
    monkeypatch.setattr(projection, "CHUNK_LOGITS", rows * VOCAB)
    chunked, chunked_grads = run()
    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(chunked_grads, grads, atol=1e-10, rtol=1e-10)


def test_only_a_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(projection, "CHUNK_LOGITS", 2 * VOCAB)
    seen = []
    original = projection._logits
    monkeypatch.setattr(projection, "_logits", lambda h, w, b: seen.append(len(h)) or original(h, w, b))
    examples = draw(5)
    score_batch(lora(), collate(examples, 0))
    assert max(seen) == 2
    assert sum(seen) == sum(sum(example.scored) for example in examples)


def test_equals_the_loss_of_transformers():
    model, examples = llama().eval(), draw(11)
    batch = collate(examples, 0)
    labels = batch.ids_BT.masked_fill(~batch.scored_BT, -100)
    theirs = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), labels=labels).loss
    torch.testing.assert_close(-score_batch(model, batch).logp_S.mean(), theirs, atol=1e-5, rtol=1e-5)


def test_equals_selective_log_softmax_of_trl():
    from trl.trainer.utils import selective_log_softmax

    model, batch = llama().eval(), collate(draw(12), 0)
    theirs = selective_log_softmax(model(input_ids=batch.ids_BT).logits[:, :-1], batch.ids_BT[:, 1:])
    torch.testing.assert_close(
        score_batch(model, batch).logp_S, theirs[batch.scored_BT[:, 1:]], atol=1e-5, rtol=1e-5
    )


def test_left_padding_gives_the_same():
    model, examples = llama().eval(), draw(2)
    right = score_batch(model, collate(examples, 0))
    left = score_batch(model, collate(examples, 7, side="left"))
    torch.testing.assert_close(left.logp_S, right.logp_S, atol=1e-5, rtol=0)
    assert left.row_S.tolist() == right.row_S.tolist()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pad=st.integers(0, VOCAB - 1),
    budget=st.sampled_from([1, 16, 40, 4096]),
    data=st.data(),
)
def test_neither_padding_nor_order_nor_budget_matters(seed, pad, budget, data):
    sizes = data.draw(st.lists(st.integers(2, 14), min_size=1, max_size=6))
    examples = draw(seed, sizes)
    order = data.draw(st.permutations(range(len(examples))))
    system = system_of(MODEL)
    system.tokenizer.pad_token_id = pad
    alone = torch.stack([row.sum() for row in slow_rows(MODEL, examples)]).detach()
    together = response_logprobs(system, [examples[i] for i in order], run=Run(batch_tokens=budget))
    torch.testing.assert_close(together, alone[list(order)], atol=1e-4, rtol=1e-5)
    tokens = response_logprobs(system, examples, reduce="tokens", run=Run(batch_tokens=budget))
    for ours, slow in zip(tokens, slow_rows(MODEL, examples), strict=True):
        torch.testing.assert_close(ours, slow.detach(), atol=1e-5, rtol=1e-5)


MODEL = llama().eval()


def test_exact_mode_is_bit_equal_for_every_budget_and_order():
    examples, system = draw(8, (3, 14, 7, 7, 2, 11, 5, 9)), system_of(MODEL)
    runs = [Run(exact=True, batch_tokens=budget) for budget in (1, 30, 4096)]
    first, *others = [response_logprobs(system, examples, run=run) for run in runs]
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(response_logprobs(system, examples[::-1], run=runs[0]), first.flip(0))


def test_sum_and_mean_by_hand():
    scored = logprobs.Scored(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
    assert sum_by_row(scored).tolist() == [-3.0, -4.0]
    assert mean_by_row(scored).tolist() == [-1.5, -4.0]


def test_mean_is_over_scored_tokens():
    examples, system = draw(4), system_of(MODEL)
    total = response_logprobs(system, examples, run=Run())
    mean = response_logprobs(system, examples, reduce="mean", run=Run())
    counts = torch.tensor([sum(example.scored) for example in examples])
    torch.testing.assert_close(mean, total / counts)


def test_scoring_leaves_the_model_as_it_was_and_gives_trainable_constants():
    model = llama().train()
    logp = response_logprobs(system_of(model), draw(1), run=Run())
    assert model.training
    assert not logp.requires_grad
    scale = torch.ones(3, requires_grad=True)
    (scale * logp).sum().backward()  # an inference tensor would refuse
    torch.testing.assert_close(scale.grad, logp)
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks


def test_the_hook_goes_when_the_model_raises():
    model = llama()
    with pytest.raises(IndexError):
        score_batch(model, collate([Example([VOCAB + 5, 1], [False, True])], 0))
    assert not model.lm_head._forward_pre_hooks


def test_a_row_without_scored_token_is_an_error():
    rows = [*draw(1), Example([1, 2], [False, False])]
    with pytest.raises(DataError, match=r"row 3.*truncated away"):
        score_batch(MODEL, collate(rows, 0))
    with pytest.raises(DataError, match=r"row 3"):
        response_logprobs(system_of(MODEL), rows, run=Run())


def test_no_examples_give_no_values():
    assert response_logprobs(system_of(MODEL), [], run=Run()).shape == (0,)
    assert response_logprobs(system_of(MODEL), [], reduce="tokens", run=Run()) == []


def test_a_value_that_is_not_finite_stops():
    model = llama()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match="row 0"):
        response_logprobs(system_of(model), draw(1), run=Run())


def test_bf16_is_near_float32():
    examples, system = draw(9), system_of(llama().eval())
    low = response_logprobs(system, examples, reduce="mean", run=Run(precision="bf16"))
    full = response_logprobs(system, examples, reduce="mean", run=Run())
    assert low.dtype is torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name", ["llama", "lora", "lora-head", "gemma2"])
def test_bf16_gradients_are_near_float32(name):
    model, batch = MODELS[name]().eval(), collate(draw(9), 0)

    def grads(enabled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = -score_batch(model, batch).logp_S.mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    low, full = grads(True), grads(False)
    assert low.dtype is torch.float32
    assert torch.cosine_similarity(low, full, dim=0) > 0.97


def test_reference_is_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    monkeypatch.delenv("TEMPER_NO_CACHE", raising=False)
    system, examples = system_of(llama().eval()), draw(6)
    first = reference_logprobs(system, examples, Run())
    assert torch.equal(first, response_logprobs(system, examples, run=Run()))
    system.model.lm_head.weight.data.zero_()
    assert torch.equal(reference_logprobs(system, examples, Run()), first)
    for change in [{"fingerprint": "other"}, {"chat": SimpleNamespace(sha256="other")}]:
        assert not torch.equal(
            reference_logprobs(SimpleNamespace(**{**vars(system), **change}), examples, Run()), first
        )
    assert not torch.equal(reference_logprobs(system, examples, Run(precision="bf16")), first)
    assert not torch.equal(reference_logprobs(system, draw(7), Run()), first)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_next_token_logits_are_the_models(name):
    model = MODELS[name]().eval()
    prompts = [example.ids for example in draw(13, (5, 1, 8, 3))]
    slow = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts]).detach()
    for budget in (1, 10, 4096):
        ours = next_token_logits(system_of(model), prompts, Run(batch_tokens=budget))
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    some = next_token_logits(system_of(model), prompts, Run(), columns=[7, 3])
    torch.testing.assert_close(some.logits_NK, slow[:, [7, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.logsumexp_N, slow.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(DataError, match="row 1"):
        next_token_logits(system_of(MODEL), [[1], []], Run())


def test_position_logits_carry_gradient_and_only_the_marked_positions():
    model, batch = gemma2().eval(), collate(draw(2), 0)
    at_BT = batch.scored_BT.roll(-1, 1)
    logits = position_logits(model, batch, at_BT)
    torch.testing.assert_close(logits, model(input_ids=batch.ids_BT).logits[at_BT], atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
