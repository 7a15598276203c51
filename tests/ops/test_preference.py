"""Pairs scored with their prompt computed once beside two rows alone; losses beside TRL's."""

from functools import partial

import pytest
import torch

from temper.artefacts import Tune, tuning
from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.data.schemas import Preference
from temper.ops.batching import Example
from temper.ops.preference import (
    PreferenceObjective,
    PreferencePair,
    dpo,
    encode_pair,
    ipo,
    score_pairs,
    simpo,
    with_reference,
)
from temper.ops.train import TrainSettings, train


def pairs_of(draw, sizes=((5, 4, 9), (1, 3, 2), (30, 1, 12))):
    made = []
    for number, (prompt, one, other) in enumerate(sizes):
        begin, chosen, rejected = draw([prompt, one, other], seed=number)
        rows = [Example(begin + end, [False] * prompt + [True] * len(end)) for end in (chosen, rejected)]
        made.append(PreferencePair(*rows, ref_chosen=-3.0 - number, ref_rejected=-4.0))
    return made


def two_rows(model, pair):
    """The slow twin: each row alone, full logits."""
    out = []
    for row in (pair.chosen, pair.rejected):
        ids = torch.tensor(row.ids)
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        out.append(logp[torch.tensor(row.scored[1:])].sum())
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral", "mamba"])
@pytest.mark.parametrize("loss", [dpo, ipo, simpo])
def test_losses_and_gradients_equal_two_rows_alone(kind, loss, lively, random_prompts):
    attention = "eager" if kind in ("gemma2", "mamba") else "sdpa"
    model, pairs = lively(kind, attention).model.double(), pairs_of(random_prompts)
    fast = PreferenceObjective(loss)(model, pairs)["preference"]
    fast.total.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    chosen_B, rejected_B = torch.stack([two_rows(model, pair) for pair in pairs]).T
    ref = [torch.tensor([getattr(pair, name) for pair in pairs]) for name in ("ref_chosen", "ref_rejected")]
    slow = loss(chosen_B, rejected_B, *ref).sum()
    slow.backward()
    torch.testing.assert_close(fast.total, slow, atol=1e-6, rtol=1e-6, check_dtype=False)
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(ours, theirs, strict=True):
        # Norms and rotations compute in float32 inside.
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)


def padded_sums(model, rows):
    """Right-padded ids, full logits, softmax and masks spelt out in float64."""
    width = max(len(row.ids) for row in rows) + 3
    ids, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)], mask[b, : len(row.ids)] = torch.tensor(row.ids), 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.dtype == torch.float64
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return [
        sum(p[b, t - 1, row.ids[t]].log() for t in range(1, len(row.ids)) if row.scored[t])
        for b, row in enumerate(rows)
    ]


def by_formula(name, beta, a, b, ref_a, ref_b):
    margin = (a - ref_a) - (b - ref_b)
    return {
        "dpo": lambda: (1 + (-beta * margin).exp()).log(),
        "ipo": lambda: (margin - 1 / (2 * beta)) ** 2,
        "simpo": lambda: (1 + (-beta * (a - b) + 1.0).exp()).log(),
    }[name]()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss", [dpo, ipo, simpo])
def test_losses_equal_a_float64_version_on_padded_batches(kind, per_token, loss, lively, random_prompts):
    model, beta = lively(kind).model.double(), 0.3
    for seed, sizes in enumerate((((5, 4, 9), (1, 3, 2), (30, 1, 12)), ((2, 1, 1), (17, 6, 3)))):
        pairs = pairs_of(lambda lengths, seed, at=seed: random_prompts(lengths, 10 * at + seed), sizes)
        objective = PreferenceObjective(partial(loss, beta=beta), pad_id=3, per_token=per_token)
        found = objective(model, pairs)["preference"]
        with torch.no_grad():
            sums = padded_sums(model, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
        expected = 0.0
        for at, pair in enumerate(pairs):
            long = [sum(row.scored) if per_token else 1 for row in (pair.chosen, pair.rejected)] * 2
            values = [sums[at], sums[len(pairs) + at], pair.ref_chosen, pair.ref_rejected]
            parts = [value / size for value, size in zip(values, long, strict=True)]
            expected += by_formula(loss.__name__, beta, *parts) / len(pairs)
        assert found.total.item() / found.count == pytest.approx(float(expected), abs=1e-6, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_dpo_equals_trl_on_a_padded_batch(lively, random_prompts, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    system, pairs = lively("llama"), pairs_of(random_prompts)
    settings = DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.3, precompute_ref_log_probs=False
    )
    prompts = [pair.chosen.scored.index(True) for pair in pairs]
    columns = {
        "prompt_ids": [pair.chosen.ids[:size] for pair, size in zip(pairs, prompts, strict=True)],
        "chosen_ids": [pair.chosen.ids[size:] for pair, size in zip(pairs, prompts, strict=True)],
        "rejected_ids": [pair.rejected.ids[size:] for pair, size in zip(pairs, prompts, strict=True)],
    }
    trainer = Tokenised(
        system.model,
        ref_model=lively("llama").model,
        args=settings,
        train_dataset=Dataset.from_dict(columns),
        processing_class=system.tokenizer,
    )
    features = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    inputs = trainer.data_collator(features)
    for name in ("ref_chosen", "ref_rejected"):
        inputs[f"{name}_logps"] = torch.tensor([getattr(pair, name) for pair in pairs])
    trainer.precompute_ref_logps = True
    system.model.eval()
    theirs = trainer.compute_loss(trainer.model, dict(inputs))
    ours = PreferenceObjective(partial(dpo, beta=0.3))(system.model, pairs)["preference"]
    assert ours.total.item() / ours.count == pytest.approx(theirs.item(), abs=1e-6)


def test_the_shared_part_ends_before_what_is_asked(random_prompts):
    pair = pairs_of(random_prompts)[0]
    assert (pair.num_shared, pair.num_tokens) == (4, 9 + 14 - 4)
    other = Example([9, *pair.rejected.ids[1:]], pair.rejected.scored)
    assert PreferencePair(pair.chosen, other).num_shared == 0


def test_per_token_means_and_accuracy(lively, random_prompts):
    model, pairs = lively("llama").model, pairs_of(random_prompts)
    chosen_B, rejected_B = score_pairs(model, pairs)
    sizes = torch.tensor([[4.0, 9.0], [3.0, 2.0], [1.0, 12.0]])
    wanted = simpo(chosen_B / sizes[:, 0], rejected_B / sizes[:, 1], chosen_B, rejected_B).sum()
    found = PreferenceObjective(simpo, per_token=True)(model, pairs)
    torch.testing.assert_close(found["preference"].total, wanted)
    assert 0 <= found["accuracy"].total <= 3


def records():
    replies = (("Four.", "Five, surely."), ("The old mill.", "I do not know."), ("Yes.", "Never at all."))
    return [
        Preference((Message("user", f"Question {i}?"),), chosen, rejected, id=str(i))
        for i, (chosen, rejected) in enumerate(replies)
    ]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_raises_the_margin(mode, lively):
    system, run = lively("llama"), Run(seed=1)
    pairs = with_reference(system, [encode_pair(system, record) for record in records()], run)
    with tuning(system, Tune(mode=mode), run) as tuned:
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: pairs,
            PreferenceObjective(pad_id=system.pad_id),
            TrainSettings(lr=5e-3, max_steps=8),
            run,
            length=lambda pair: pair.num_tokens,
        )
    assert log.loss[0] == pytest.approx(0.6931, abs=1e-3)
    assert log.loss[-1] < 0.3
    assert log.terms["accuracy"][-1] == 1.0


def test_a_reply_that_is_cut_away_names_its_row(lively):
    with pytest.raises(DataError, match="row 0, chosen"):
        encode_pair(lively("llama"), records()[0], max_tokens=5)
    assert with_reference(lively("llama"), [], Run()) == []
