"""Fine-tuning on chats of 30 to 300 tokens, with adapters: temper beside TRL at its settings against padding."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import main
from training import sft_job

JOB = sft_job("lora")

if __name__ == "__main__":
    main(JOB)
