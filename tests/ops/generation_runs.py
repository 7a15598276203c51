"""What the tests of generation begin with: how it runs, how long the prompts are, how replies are drawn."""

from temper.core.types import Run
from temper.ops.generate import Sampling

RUN = Run(batch_tokens=64)
LENGTHS = (7, 1, 23, 12, 3, 30, 12, 18)
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, seed=3)


def ids_of(replies):
    return [reply.ids for reply in replies]
