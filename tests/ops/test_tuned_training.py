"""The loop and the scorer with what `tuning` makes of a model: low-rank layers, trained vocabulary rows, bf16 base."""

import pytest
import torch

from temper.artefacts import Tune, tuning
from temper.core.types import Message, Run
from temper.data.schemas import Dialogue
from temper.ops.batching import collate, encode, pad_id
from temper.ops.logprobs import response_logprobs, score_batch
from temper.ops.train import SftObjective, TrainSettings, train
from temper.systems.loading import load_base


def dialogues():
    replies = ("Two.", "The old mill.", "I do not know.", "Sorry, I can't answer that.")
    return [
        Dialogue((Message("user", f"Question {i}?"), Message("assistant", r)), id=str(i))
        for i, r in enumerate(replies)
    ]


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:qwen3", "tiny:gpt2", "tiny:gemma2"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_every_way_of_tuning_learns_its_rows(name, mode):
    system = load_base(name, device="cpu", dtype="float32")
    run = Run(seed=1, batch_tokens=60)
    with tuning(system, Tune(mode=mode, new_tokens=("<|calm|>",)), run) as tuned:
        examples = [encode(tuned.system, record) for record in dialogues()]
        before = response_logprobs(tuned.system, examples, run=run)
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: examples,
            SftObjective(pad_id(tuned.system)),
            TrainSettings(lr=2e-2, max_steps=8),
            run,
            length=lambda example: len(example.ids),
        )
        after = response_logprobs(tuned.system, examples, run=run)
    assert log.loss[-1] < log.loss[0]
    assert (after > before).all()


def test_trained_rows_get_the_gradient_of_the_slow_twin():
    system = load_base("tiny:llama", device="cpu", dtype="float32")
    with tuning(system, Tune(new_tokens=("<|calm|>",)), Run()) as tuned:
        model = tuned.system.model
        batch = collate([encode(tuned.system, record) for record in dialogues()], pad_id(tuned.system))
        score_batch(model, batch).logp_S.sum().backward()
        ours = [p.grad.clone() for p in tuned.parameters()]
        model.zero_grad()
        logp = model(input_ids=batch.ids_BT).logits[:, :-1].log_softmax(-1)
        logp.gather(-1, batch.ids_BT[:, 1:, None])[..., 0][batch.scored_BT[:, 1:]].sum().backward()
        assert len(ours) > 1
        for mine, parameter in zip(ours, tuned.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, atol=1e-4, rtol=1e-4)
