"""DPO on pairs with one prompt, with all weights: temper beside TRL, the reference's work counted on every side."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import main
from training import dpo_job

JOB = dpo_job("full")

if __name__ == "__main__":
    main(JOB)
