"""DPO on pairs with one prompt: temper beside TRL, the reference's work counted on every side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main
from training import losses_agree, pairs, temper_dpo, trl_dpo

MODE = "lora"
SAME = {"trl", "trl precomputed"}


def ours(given: Any) -> Measured:
    return temper_dpo(given, MODE)


def plain(given: Any) -> Measured:
    return trl_dpo(given, MODE)


def precomputed(given: Any) -> Measured:
    return trl_dpo(given, MODE, precompute_ref_log_probs=True, precompute_ref_batch_size=8)


JOB = Job(
    name="dpo-lora",
    about="LoRA of rank 16 on every linear layer: 4 pairs, two epochs, the reference included.",
    unit="tokens/s",
    target=3.0,
    inputs=lambda: pairs(4),
    sides={"temper": Side(ours), "trl": Side(plain, "trl"), "trl precomputed": Side(precomputed, "trl")},
    check=lambda outputs: losses_agree(outputs, SAME, 0.05),
)

if __name__ == "__main__":
    main(JOB)
