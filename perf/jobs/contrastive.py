"""Contrastive training of all-MiniLM-L6-v2 on pairs of texts: temper beside sentence-transformers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from typing import Any

from harness import Job, Measured, Side, main, timed
from texts import FLOPS_PER_TOKEN, minilm_folder, summaries

STEP_PAIRS, NUM_STEPS, WARM_STEPS = 32, 16, 2
NUM_PAIRS = STEP_PAIRS * NUM_STEPS
MAX_TOKENS = 128
LR, TEMPERATURE = 2e-5, 0.05


def inputs() -> dict[str, Any]:
    """Docstrings as (summary, rest), drawn with a fixed seed."""
    pairs = summaries()
    random.Random(0).shuffle(pairs)
    warm = pairs[NUM_PAIRS : NUM_PAIRS + STEP_PAIRS * WARM_STEPS]
    return {"folder": minilm_folder(), "pairs": pairs[:NUM_PAIRS], "warm": warm}


def ours(given: Any) -> Measured:
    from temper.artefacts import Tune, tuning
    from temper.core.types import Run
    from temper.ops.contrast import Contrasted, ContrastObjective, num_tokens
    from temper.ops.train import TrainSettings, train
    from temper.systems.loading import load_base

    base: Any = load_base(given["folder"])
    system, run = base.with_(layout=base.layout.cut(MAX_TOKENS)), Run(precision="bf16", batch_tokens=1 << 14)
    settings = TrainSettings(lr=LR, batch_rows=STEP_PAIRS, shuffle=False)

    def fit(name: str) -> Any:
        shorts, rests = (system.ids(list(texts)) for texts in zip(*given[name], strict=True))
        items = [Contrasted(short, (rest,)) for short, rest in zip(shorts, rests, strict=True)]
        with tuning(system, Tune(mode="full"), run) as tuned:
            objective = ContrastObjective(tuned.system, run.batch_tokens)
            return train(
                tuned.system.model,
                tuned.parameters(),
                lambda epoch: items,
                objective,
                settings,
                run,
                length=num_tokens,
            )

    fit("warm")
    log, seconds = timed(lambda: fit("pairs"))
    return Measured(NUM_PAIRS, seconds, log.loss)


def theirs(given: Any) -> Measured:
    """Its trainer at the same settings; dropout is off on both sides, and pairs come in order."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from torch import nn
    from torch.utils.data import BatchSampler, SequentialSampler

    model = SentenceTransformer(given["folder"], device="cpu")
    model.max_seq_length = MAX_TOKENS
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def fit(name: str) -> Any:
        model.load_state_dict(start)
        shorts, rests = (list(texts) for texts in zip(*given[name], strict=True))
        with tempfile.TemporaryDirectory() as folder:
            settings = SentenceTransformerTrainingArguments(
                folder,
                per_device_train_batch_size=STEP_PAIRS,
                num_train_epochs=1,
                learning_rate=LR,
                lr_scheduler_type="constant",
                bf16=True,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                batch_sampler=in_order,
            )
            loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
            data = Dataset.from_dict({"anchor": shorts, "positive": rests})
            trainer = SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss)
            trainer.train()
            return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    fit("warm")
    losses, seconds = timed(lambda: fit("pairs"))
    return Measured(NUM_PAIRS, seconds, losses)


def check(outputs: Mapping[str, Any]) -> str:
    """Losses of the first step and means over all, beside one another."""
    first = {name: losses[0] for name, losses in outputs.items()}
    mean = {name: sum(losses) / len(losses) for name, losses in outputs.items()}
    spread = max(mean.values()) - min(mean.values())
    assert all(len(losses) == NUM_STEPS for losses in outputs.values()), outputs
    assert spread < 0.05 * max(mean.values()), mean
    return "mean loss " + ", ".join(
        f"{name} {mean[name]:.4f} (first step {first[name]:.4f})" for name in outputs
    )


def limit(given: Any, limits: Mapping[str, float]) -> float:
    """Pairs a second if nothing but the layers' products took time, once forward and once backward."""
    from temper.systems.loading import load_base

    base: Any = load_base(given["folder"])
    cut = base.with_(layout=base.layout.cut(MAX_TOKENS))
    tokens = sum(len(row) for texts in zip(*given["pairs"], strict=True) for row in cut.ids(list(texts)))
    return limits["flops_bf16"] * NUM_PAIRS / (3 * FLOPS_PER_TOKEN * tokens)


JOB = Job(
    name="contrastive",
    about="512 pairs of docstring summaries and bodies, 32 a step, in-batch negatives, all weights under bf16 autocast.",
    unit="pairs/s",
    target=2.0,
    inputs=inputs,
    sides={"temper": Side(ours), "sentence-transformers": Side(theirs, "sentence_transformers")},
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
