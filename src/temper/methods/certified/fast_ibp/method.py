"""Train a classifier on the worst logits of a box, with a short warm-up; and report what can be proven of any classifier."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from temper.artefacts import Tune, Weights, tuning
from temper.core.errors import DataError, ModelError, NumericsError
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.certified.fast_ibp import report
from temper.methods.certified.fast_ibp.card import Config
from temper.methods.certified.fast_ibp.first_weights import draw_weights
from temper.methods.certified.fast_ibp.objective import BoxObjective
from temper.ops.network_bounds import BoundedNetwork
from temper.ops.optim import adamw
from temper.ops.train import TrainLog, TrainSettings, train
from temper.systems.image_classifier import Examples, ImageClassifier

__all__ = ["fit", "full_batches", "learn", "measure"]

SLUG = "fast-ibp"


def fit(system: ImageClassifier, data: Data, config: Config, run: Run) -> Weights:
    """First weights, then training on boxes whose eps grows; batch norm's running statistics are part of the artefact."""
    _require_float32(system)
    examples = system.examples(data["train"])  # type: ignore[arg-type]
    with tuning(system, Tune(mode="full"), run) as tuned:
        bounded = BoundedNetwork(tuned.system.model, system.shape)
        _require_batch(tuned.system.model, len(examples.class_B), config)
        draw_weights(bounded, config.init, run.seed)
        if config.num_epochs:
            learn(tuned.system, bounded, tuned.parameters(), examples, config, run)
        artefact = tuned.finish(SLUG)
        assert isinstance(artefact, Weights)
        return artefact


def learn(
    system: ImageClassifier,
    bounded: BoundedNetwork,
    parameters: list[nn.Parameter],
    examples: Examples,
    config: Config,
    run: Run,
) -> TrainLog:
    """Train the system's model in place, in training mode."""
    objective = BoxObjective(system, bounded, examples, config)
    num_items, batch_rows = len(examples.class_B), min(config.batch_rows, len(examples.class_B))
    steps_per_epoch = num_items // batch_rows
    optimizers: list[torch.optim.Optimizer] = []

    def build(chosen: Any) -> torch.optim.Optimizer:
        optimizers.append(adamw(chosen, config.lr, 0.0, (0.9, 0.999), 1e-8))
        return optimizers[0]

    def before_step(step: int) -> None:
        objective.at_step(step, steps_per_epoch)
        num_drops = sum(step >= epoch * steps_per_epoch for epoch in config.lr_drops)
        for group in optimizers[0].param_groups:
            group["initial_lr"] = config.lr * config.lr_factor**num_drops

    model = system.model.to(memory_format=torch.channels_last).train()
    try:
        return train(
            model,
            parameters,
            lambda epoch: full_batches(num_items, batch_rows, run.seed, epoch),
            objective,
            TrainSettings(
                lr=config.lr, num_epochs=config.num_epochs, batch_rows=batch_rows, clip_norm=config.clip_norm
            ),
            run,
            length=lambda item: 1,
            build_optimizer=build,
            before_step=before_step,
        )
    except NumericsError as error:
        raise NumericsError(
            error.what,
            where=error.where,
            cure="The bounds exploded: take init=ibp and a network with batch norm, lower lr, or lengthen ramp_epochs.",
        ) from None
    finally:
        model.to(memory_format=torch.contiguous_format).eval()


def full_batches(num_items: int, batch_rows: int, seed: int, epoch: int) -> list[int]:
    """An epoch's places, as many as fill whole batches (Departure 1); which sit out changes with the epoch."""
    places = list(range(num_items))
    random.Random(f"{seed}/{epoch}/sits out").shuffle(places)
    return places[: num_items // batch_rows * batch_rows]


def _require_batch(model: nn.Module, num_items: int, config: Config) -> None:
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if norms and min(num_items, config.batch_rows) < 2:
        raise DataError(
            "Batch norm needs at least 2 images in a batch",
            where=f"batch_rows {config.batch_rows}, {num_items} images",
            cure="Raise batch_rows, give more images, or take a network without -bn.",
        )


def _require_float32(system: ImageClassifier) -> None:
    if system.dtype != torch.float32:
        raise ModelError(
            f"A certificate needs weights in float32; these are {system.dtype}",
            where=system.spec,
            cure="Load the model in float32.",
        )


def measure(system: ImageClassifier, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """What can be proven: errors, certificates, growth of boxes, states of neurons; with `at_start` before training."""
    _require_float32(system)
    examples = system.examples(data["test"][: config.max_rows])  # type: ignore[arg-type]
    if config.at_start:
        yield from report.start_rows(system, examples, config, run)
        return
    ids = [record.id or str(place) for place, record in enumerate(data["test"][: config.max_rows])]
    found = report.look(system, examples, config, run)
    _write_curve(found, run)
    yield from report.rows(found, ids, config)


def _write_curve(found: report.Findings, run: Run) -> None:
    """Certified accuracy over the radius, and what PGD leaves of the first images, between which the truth lies."""
    if run.folder is None or not found.curve:
        return
    lines = {"verified": found.curve}
    if found.withstood:
        lines[f"withstands PGD (first {len(found.withstood[0.0])} images)"] = found.withstood
    figure = {
        "shared": True,
        "caption": "How many test images are right for certain everywhere in a box of that radius around them, and how many an "
        "attack leaves right.",
        "x": "Radius (eps)",
        "y": "Share of images",
        "lines": {
            name: {"x": list(at), "y": [sum(hits) / len(hits) for hits in at.values()]}
            for name, at in lines.items()
        },
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "figures.json").write_text(json.dumps({"curves": {"Certified accuracy": figure}}))
