"""Unlearning by NPO with adapters: temper's method beside a plain loop of transformers and PEFT, its reference cached or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main
from npo import inputs, loop, most_tokens, temper_fit
from training import losses_agree


def ours(given: Any) -> Measured:
    return temper_fit(given, "lora")


def plain_loop(given: Any) -> Measured:
    return loop(given, cached=False, mode="lora")


def cached_loop(given: Any) -> Measured:
    return loop(given, cached=True, mode="lora")


def check(outputs: dict[str, Any]) -> str:
    """The first loss: from the first update on, adapters that began with other random numbers part ways.

    Answers are sums of some thirty log-probabilities in bf16, so even equal models differ by a few hundredths.
    """
    first = {name: {"loss": found["loss"][:1]} for name, found in outputs.items()}
    return "first step only: " + losses_agree(first, {"loop", "loop cached"}, 0.1)


JOB = Job(
    name="npo-lora",
    about="NPO on 32 question-answer rows, 8 a step, two epochs, LoRA of rank 16 on every linear layer.",
    unit="tokens/s",
    target=2.5,
    inputs=inputs,
    sides={
        "temper": Side(ours),
        "loop": Side(plain_loop, "trl"),
        "loop cached": Side(cached_loop, "trl"),
    },
    check=check,
    limit=lambda given, limits: most_tokens(given, "lora", limits),
)

if __name__ == "__main__":
    main(JOB)
