"""What the training loop's tests begin with: a tiny model, rows, one call that trains, an objective of two terms."""

import random
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temper.ops.batching import Example
from temper.ops.train import SftObjective, SumCount, TrainSettings, train

VOCAB = 37


def tiny(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=dropout,
        attn_implementation="eager" if dropout else "sdpa",
    )
    return LlamaForCausalLM(config).to(dtype)


def rows(num=24, seed=0):
    generator = random.Random(seed)
    out = []
    for _ in range(num):
        size = generator.randint(3, 14)
        scored = [place > size // 2 for place in range(size)]
        out.append(Example([generator.randrange(VOCAB) for _ in range(size)], scored))
    return out


def size_of(item):
    return len(item.ids)


def sft(model, items, run, config=None, objective=None, **more):
    config = config or TrainSettings(lr=1e-2, num_epochs=2)
    return train(
        model,
        model.parameters(),
        lambda epoch: items,
        objective or SftObjective(0),
        config,
        run,
        length=size_of,
        **more,
    )


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclass
class TwoTerms:
    """The likelihood of long rows and, weighted, of short ones."""

    weights: dict = field(default_factory=lambda: {"long": 1.0, "short": 0.3})
    sft: SftObjective = field(default_factory=lambda: SftObjective(0))

    def parts(self, items):
        return {
            "long": [item for item in items if size_of(item) > 7],
            "short": [item for item in items if size_of(item) <= 7],
        }

    def counts(self, items):
        return {name: float(len(part)) for name, part in self.parts(items).items()}

    def __call__(self, model, items):
        return {
            name: SumCount(self.sft(model, part)["nll"].total, len(part))
            for name, part in self.parts(items).items()
            if part
        }
