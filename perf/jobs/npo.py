"""Unlearning by NPO with all weights: temper's method beside a plain loop of transformers, its reference cached or not."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main, model_folder, timed
from training import flops, losses_agree, trl_lora

STEP_ROWS, EPOCHS, BETA, LR = 8, 2, 0.1, {"full": 1e-5, "lora": 1e-4}


def inputs() -> Any:
    """Questions about fictitious people."""
    from temper.data.loading import load_data

    records = load_data("builtin:people")["forget"][:34]
    return steps_of([[message.content for message in record.messages] for record in records])


def steps_of(asked: list[list[str]]) -> Any:
    """Questions with their answers, the last two to warm up, as ids too, and the order in which temper takes them."""
    from temper.methods.unlearning.npo.card import Config
    from temper.methods.unlearning.npo.training import encode_answers
    from temper.systems.loading import load_base

    rows = encode_answers(load_base(model_folder()), dialogues(asked[:-2]), Config())
    order = []
    for epoch in range(EPOCHS):
        places = list(range(len(rows)))
        random.Random(f"0/{epoch}").shuffle(places)
        order += [places[start : start + STEP_ROWS] for start in range(0, len(places), STEP_ROWS)]
    return {
        "model": model_folder(),
        "asked": asked,
        "order": order,
        "rows": [{"ids": row.ids, "scored": row.scored} for row in rows],
    }


def dialogues(asked: list[list[str]]) -> list[Any]:
    """Temper's records."""
    from temper.core.types import Message
    from temper.data.schemas import Dialogue

    return [
        Dialogue((Message("user", question), Message("assistant", answer)), id=f"row-{number}")
        for number, (question, answer) in enumerate(asked)
    ]


def num_tokens(given: Any) -> int:
    return EPOCHS * sum(len(row["ids"]) for row in given["rows"])


def temper_fit(given: Any, mode: str) -> Measured:
    """The method's fit, its encoding and its reference included."""
    import os
    import tempfile

    os.environ["TEMPER_CACHE"] = tempfile.mkdtemp()
    from temper.artefacts import tuning
    from temper.core.types import Run
    from temper.data.schemas import Data
    from temper.methods.unlearning.npo.card import Config
    from temper.methods.unlearning.npo.training import prepare, tune, unlearn
    from temper.systems.loading import load_base

    system, run, records = load_base(given["model"]), Run(precision="bf16"), dialogues(given["asked"])
    plain = {
        "loss": "npo",
        "beta": BETA,
        "lr": LR[mode],
        "weight_decay": 0.0,
        "batch_rows": STEP_ROWS,
        "mode": mode,
        "rank": 16,
    }
    steady = {
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "watch_every": 0,
        "num_epochs": float(EPOCHS),
        "min_steps": 0,
    }
    config = Config(**plain, **steady)

    def fit(chosen: list[Any]) -> Any:
        rows = prepare(system, Data({"forget": chosen}), config, run)
        with tuning(system, tune(config, run), run) as tuned:
            log, _ = unlearn(tuned, rows, config, run)
            tuned.finish("npo")
        return log

    fit(records[-2:])
    log, seconds = timed(lambda: fit(records[:-2]))
    return Measured(num_tokens(given), seconds, {"loss": log.loss})


def loop(given: Any, cached: bool, mode: str) -> Measured:
    """bf16 autocast, padded batches, fused AdamW; the reference is a second model. Frozen weights are bf16."""
    import copy

    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(
        given["model"], dtype=torch.float32 if mode == "full" else torch.bfloat16
    )

    def sums(model: Any, rows: list[Any]) -> Any:
        width = max(len(row["ids"]) for row in rows)
        ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in rows])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
        scored = torch.tensor([row["scored"] + [False] * (width - len(row["ids"])) for row in rows])[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logp * scored).sum(1)

    def fit(steps: list[list[int]]) -> list[float]:
        model, reference, losses = copy.deepcopy(start).train(), start, []
        if mode == "lora":
            from peft import get_peft_model

            model = get_peft_model(model, trl_lora(mode), autocast_adapter_dtype=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR[mode], weight_decay=0.0, fused=True)
        stored: dict[int, Any] = {}
        if cached:
            places = sorted(
                {place for step in steps for place in step},
                key=lambda place: len(given["rows"][place]["ids"]),
            )
            for first in range(0, len(places), STEP_ROWS):
                part = places[first : first + STEP_ROWS]
                with torch.no_grad():
                    stored |= dict(
                        zip(part, sums(reference, [given["rows"][place] for place in part]), strict=True)
                    )
        for step in steps:
            rows = [given["rows"][place] for place in step]
            if cached:
                ref = torch.stack([stored[place] for place in step])
            else:
                with torch.no_grad():
                    ref = sums(reference, rows)
            loss = -2 / BETA * logsigmoid(-BETA * (sums(model, rows) - ref)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    fit([given["order"][0][:2]])
    losses, seconds = timed(lambda: fit(given["order"]))
    return Measured(num_tokens(given), seconds, {"loss": losses})


def most_tokens(given: Any, mode: str, limits: dict[str, float]) -> float:
    """Tokens a second of products alone: what all rows begin with once a step, and the reference once."""
    rows = given["rows"]
    alike = sum(len(set(column)) == 1 for column in zip(*(row["ids"] for row in rows), strict=False))
    own, scored = sum(len(row["ids"]) - alike for row in rows), sum(sum(row["scored"]) for row in rows)
    steps = len(given["order"])
    work = flops(mode, EPOCHS * own + steps * alike, EPOCHS * scored) + flops("read", own + alike, scored)
    return num_tokens(given) * limits["flops_bf16"] / work


def npo_job(name: str, about: str, mode: str, given: Callable[[], Any], check: Callable[[Any], str]) -> Job:
    """NPO of one kind beside the loop, its reference read in each step or beforehand."""
    env = {"full": "transformers", "lora": "trl"}[mode]
    return Job(
        name=name,
        about=about,
        unit="tokens/s",
        target=2.5,
        inputs=given,
        sides={
            "temper": Side(partial(temper_fit, mode=mode)),
            "loop": Side(partial(loop, cached=False, mode=mode), env),
            "loop cached": Side(partial(loop, cached=True, mode=mode), env),
        },
        check=check,
        limit=lambda inputs, limits: most_tokens(inputs, mode, limits),
    )


def all_losses(outputs: dict[str, Any]) -> str:
    return losses_agree(outputs, {"loop", "loop cached"}, 0.3)


def first_loss(outputs: dict[str, Any]) -> str:
    """From the first update on, adapters that began with other random numbers part ways.

    Answers are sums of thirty log-probabilities and more in bf16, so even equal models differ by a few hundredths.
    """
    first = {name: {"loss": found["loss"][:1]} for name, found in outputs.items()}
    return "first step only: " + losses_agree(first, {"loop", "loop cached"}, 0.1)


JOB = npo_job(
    "npo", "NPO on 32 question-answer rows, 8 a step, two epochs, all weights.", "full", inputs, all_losses
)

if __name__ == "__main__":
    main(JOB)
