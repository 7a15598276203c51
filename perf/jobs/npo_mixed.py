"""Unlearning by NPO where rows differ in length, as the fine-tuning jobs' do: 60 to 300 tokens, with all weights."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import main
from npo import all_losses, npo_job, steps_of
from training import chat_and_records

NUM_ROWS, SHORTEST, LONGEST = 16, 60, 300


def inputs() -> Any:
    """Requests with answers made of several replies, their lengths uniform between the bounds."""
    from temper.core.types import Message

    chat, records = chat_and_records()
    draw, asked = random.Random(9), []
    for _ in range(NUM_ROWS + 2):
        wanted, question = draw.randint(SHORTEST, LONGEST), draw.choice(records).messages[0].content
        answer = draw.choice(records).messages[-1].content
        while len(chat.dialogue([Message("user", question), Message("assistant", answer)]).ids) < wanted:
            answer += " " + draw.choice(records).messages[-1].content
        asked.append([question, answer])
    return steps_of(asked)


ABOUT = f"NPO on {NUM_ROWS} rows of {SHORTEST} to {LONGEST} tokens, 8 a step, two epochs, all weights."
JOB = npo_job("npo-mixed", ABOUT, "full", inputs, all_losses)

if __name__ == "__main__":
    main(JOB)
