"""Unlearning by NPO with adapters: temper's method beside a plain loop of transformers and PEFT, its reference cached or not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import main
from npo import first_loss, inputs, npo_job

ABOUT = "NPO on 32 question-answer rows, 8 a step, two epochs, LoRA of rank 16 on every linear layer."
JOB = npo_job("npo-lora", ABOUT, "lora", inputs, first_loss)

if __name__ == "__main__":
    main(JOB)
