"""What the tests of token search begin with: a prompt, candidates, a scorer, and its slow twin."""

import torch

from temper.core.types import Run
from temper.ops.search import propose
from temper.ops.search_losses import SlotLoss, SlotScorer
from temper.ops.search_prompt import slot_prompt

PROMPT, TARGET = "What is the answer?", "Sure, here is a fox"
EAGER = {"gemma2", "mamba"}
KEPT = ["llama", "gpt2", "gemma", "neox", "qwen2", "gemma2", "mistral"]


def scorer_of(system, *, reuse=True, loss=None, run=None, prompt=PROMPT, target=TARGET):
    return SlotScorer(
        slot_prompt(system, prompt, target), loss or SlotLoss(), run or Run(), reuse_prefix=reuse
    )


def draw(current, num, seed=0, replace=1, size=512):
    generator = torch.Generator().manual_seed(seed)
    choices = torch.arange(4, size).expand(len(current), -1)
    return propose(torch.tensor(current), choices, num, generator, positions="uniform", num_replace=replace)


@torch.no_grad()
def slow_losses(system, prompt, ids_KN):
    """The slow twin: one whole row at a time, all logits, no cache."""
    out = []
    for ids in ids_KN.tolist():
        whole = prompt.full_ids(ids)
        logits = system.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        m = len(prompt.target)
        logp = logits[len(whole) - m - 1 : -1].log_softmax(-1)  # in the model's own dtype
        out.append(-logp[torch.arange(m), torch.tensor(prompt.target)].mean())
    return torch.stack(out)
