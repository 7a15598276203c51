"""Teaching and forgetting: the responses that are trained on, and how likely a model finds both of an item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from temper.artefacts import Tune, Tuning
from temper.core.types import Run
from temper.methods.unlearning.random_label_forgetting.card import Config
from temper.methods.unlearning.random_label_forgetting.maths import Labels, draw_labels
from temper.methods.unlearning.random_label_forgetting.tasks import Item
from temper.ops.batching import Example
from temper.ops.choices import ChoiceItem, choice_logprobs, encode_choices
from temper.ops.train import SftObjective, TrainSettings, train
from temper.systems.causal_lm import CausalLM

__all__ = ["encode_items", "response_scores", "train_on", "tune"]


def encode_items(system: CausalLM, items: Sequence[Item], config: Config) -> list[ChoiceItem]:
    """Each item's question with its right response and with its wrong one."""
    return [
        encode_choices(
            system,
            config.prompt.replace("{question}", item.question),
            [item.right, item.wrong],
            where=f"question {item.question[:60]!r}",
        )
        for item in items
    ]


def response_scores(system: CausalLM, items: Sequence[Item], config: Config, run: Run) -> Tensor:
    """Log-probabilities of the right and the wrong response, (N, 2)."""
    return torch.stack(choice_logprobs(system, encode_items(system, items, config), run, per=config.score))


def tune(config: Config) -> Tune:
    """What is trained."""
    return Tune(mode=config.mode, r=config.rank, alpha=2.0 * config.rank)


def train_on(
    tuned: Tuning,
    items: Sequence[Item],
    labels: Labels,
    key: str,
    config: Config,
    run: Run,
    watch: Callable[[int], Mapping[str, float] | None] | None = None,
) -> list[bool]:
    """Train in place on the responses that `labels` chooses; gives the last choice, True for a right response.

    `key` seeds the labels; with `redraw` they are drawn anew in every epoch.
    """
    system = tuned.system
    encoded = encode_items(system, items, config)
    chosen = draw_labels(len(items), labels, key)

    def epoch_items(epoch: int) -> list[Example]:
        nonlocal chosen
        if config.redraw:
            chosen = draw_labels(len(items), labels, f"{key}/{epoch}")
        return [item.rows[0 if right else 1] for item, right in zip(encoded, chosen, strict=True)]

    learning = labels == "learn"
    settings = TrainSettings(
        lr=config.learn_lr if learning else config.lr,
        num_epochs=config.learn_epochs if learning else config.num_epochs,
        batch_rows=config.batch_rows,
    )
    train(
        system.model,
        tuned.parameters(),
        epoch_items,
        SftObjective(system.pad_id, system.device),
        settings,
        run,
        length=lambda example: len(example.ids),
        every=config.order_every if watch else 0,
        callback=watch,
    )
    return chosen
