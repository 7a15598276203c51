"""Fine-tuning on chats of 30 to 300 tokens: temper beside TRL at its settings against padding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main
from training import losses_agree, most_tokens, rows, temper_sft, trl_sft

MODE = "full"
SAME = {"trl padded", "trl padding-free"}


def ours(given: Any) -> Measured:
    return temper_sft(given, MODE)


def padded(given: Any) -> Measured:
    return trl_sft(given, MODE)


def padding_free(given: Any) -> Measured:
    return trl_sft(given, MODE, padding_free=True)


def packing(given: Any) -> Measured:
    """Rows of 1024 tokens, one a step: about as many tokens as eight chats."""
    return trl_sft(given, MODE, packing=True, max_length=1024, per_device_train_batch_size=1)


def grouped(given: Any) -> Measured:
    return trl_sft(given, MODE, train_sampling_strategy="group_by_length")


JOB = Job(
    name="sft-full",
    about="All weights in float32 under bf16 autocast: 24 chats, 8 a step, one epoch.",
    unit="tokens/s",
    target=2.0,
    inputs=lambda: rows(24),
    sides={
        "temper": Side(ours),
        "trl padded": Side(padded, "trl"),
        "trl padding-free": Side(padding_free, "trl"),
        "trl packing": Side(packing, "trl"),
        "trl length-grouped": Side(grouped, "trl"),
    },
    check=lambda outputs: losses_agree(outputs, SAME, 0.05),
    limit=lambda given, limits: most_tokens(given, MODE, limits),
)

if __name__ == "__main__":
    main(JOB)
