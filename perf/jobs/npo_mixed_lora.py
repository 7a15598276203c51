"""Unlearning by NPO where rows differ in length, with adapters: temper beside a plain loop of transformers and PEFT."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import main
from npo import first_loss, npo_job
from npo_mixed import ABOUT, inputs

JOB = npo_job("npo-mixed-lora", ABOUT.replace("all weights", "LoRA of rank 16"), "lora", inputs, first_loss)

if __name__ == "__main__":
    main(JOB)
