"""What was drawn: rates by a detector, distances from real pictures, and what a picture cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import ModelError, NeedsError
from temper.core.spec import parse_system
from temper.core.types import Row, Run
from temper.data.pictures import Picture
from temper.data.schemas import Labelled
from temper.methods.diffusion.sfd.card import Config
from temper.ops.diffusion import counting, frechet_distance, rbf_mmd
from temper.systems.diffusion import Diffusion
from temper.systems.loading import load_base

__all__ = [
    "Detector",
    "Wanted",
    "distance_rows",
    "draw_all",
    "load_detector",
    "open_reference",
    "rate_rows",
    "real_pictures",
    "strips",
]

AT_ONCE = 256
"""Pictures that a detector sees together."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of the model, in order, and what each drawing should show (an index of `names`)."""

    asked: tuple[int | str, ...]
    shows_N: Tensor
    names: tuple[str, ...]
    forget: int
    override: int | None
    """None where the override is no one name."""

    @property
    def forgotten_N(self) -> Tensor:
        """Whether a drawing was asked for by the forgotten condition."""
        return self.shows_N == self.forget


@dataclass(frozen=True)
class Detector:
    """An image classifier and the columns of its scores that belong to the names asked for."""

    system: Any
    columns: list[int]

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture]) -> Tensor:
        """Scores of the names, (N, names)."""
        return torch.cat([self.system.logits(part)[:, self.columns] for part in self._pixels(pictures)])

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """What the last layer reads, (N, D)."""
        return torch.cat([self.system.features(part).flatten(1).float() for part in self._pixels(pictures)])

    def _pixels(self, pictures: Sequence[Picture]) -> Iterator[Tensor]:
        for start in range(0, len(pictures), AT_ONCE):
            yield self.system.pixels(pictures[start : start + AT_ONCE])


def load_detector(name: str, names: Sequence[str], run: Run) -> Detector:
    """The classifier of a name; a world's is trained if need be.

    Raises ModelError unless its classes hold all the names, or are as many: then they go by their order.
    """
    system: Any = _load(name, run)
    if getattr(system, "kind", "") != "ImageClassifier":
        raise NeedsError(f"{name} does not classify pictures", cure="Name an image classifier.")
    if set(names) <= set(system.classes):
        return Detector(system, [system.classes.index(each) for each in names])
    if len(system.classes) != len(names):
        missing = sorted(set(names) - set(system.classes))
        raise ModelError(
            f"The detector has no class {missing[0]!r}",
            where=name,
            cure="Use one that was trained on these classes.",
        )
    return Detector(system, list(range(len(names))))


def open_reference(spec: str, run: Run) -> Diffusion:
    """The system whose drawings stand for real ones: a base without artefacts."""
    parsed = parse_system(spec)
    system = _load(parsed.base, run)
    if parsed.artefacts or not isinstance(system, Diffusion):
        raise NeedsError(f"{spec!r} is no bare image generator", cure="Name the teacher, without artefacts.")
    return system


def _load(name: str, run: Run) -> Any:
    if name.startswith("world:"):
        from temper.ops.world_models import ensure

        ensure(name.removeprefix("world:"))
    return load_base(name, device=run.device)


def draw_all(system: Diffusion, wanted: Wanted, config: Config, seed: int) -> tuple[list[Picture], list[Row]]:
    """A picture of everything asked for, and what one cost."""
    condition = system.conditions(wanted.asked)
    began = time.perf_counter()
    with counting(system.model) as calls:
        pictures = system.draw(condition, config.sample_steps, seed, config.guidance)
    seconds, num = time.perf_counter() - began, len(pictures)
    return pictures, [
        Row(metric="calls_per_sample", value=calls.rows / num, n=num, higher_is_better=False),
        Row(metric="sample_s", value=seconds / num, n=num, higher_is_better=False),
    ]


def rate_rows(scores_NC: Tensor, wanted: Wanted) -> Iterator[Row]:
    """What a detector says: rates under the forgotten condition, and of right drawings under every other."""
    seen_N, is_forgotten_N = scores_NC.argmax(-1), wanted.forgotten_N
    probs_NC = scores_NC.float().softmax(-1)
    num = int(is_forgotten_N.sum())
    rates = {
        "forget_rate": (_share(seen_N[is_forgotten_N] == wanted.forget), False),
        "forget_probability": (float(probs_NC[is_forgotten_N, wanted.forget].mean()), False),
        "unlearning_accuracy": (1 - _share(seen_N[is_forgotten_N] == wanted.forget), True),
    }
    entropy_N = torch.distributions.Categorical(probs=probs_NC[is_forgotten_N]).entropy()
    yield Row(metric="forget_entropy_nats", value=float(entropy_N.mean()), n=num)
    if wanted.override is not None:
        rates["override_rate"] = (_share(seen_N[is_forgotten_N] == wanted.override), True)
    for metric, (value, is_better) in rates.items():
        yield Row(metric=metric, value=value, n=num, higher_is_better=is_better)
    is_right_N = seen_N == wanted.shows_N
    kept = int((~is_forgotten_N).sum())
    yield Row(metric="retain_rate", value=_share(is_right_N[~is_forgotten_N]), n=kept, higher_is_better=True)
    for index, name in enumerate(wanted.names):
        of_N = wanted.shows_N == index
        if index != wanted.forget and bool(of_N.any()):
            share = _share(is_right_N[of_N])
            yield Row(metric="class_rate", value=share, n=int(of_N.sum()), group=name, higher_is_better=True)


def _share(hit_N: Tensor) -> float:
    return float(hit_N.float().mean())


def distance_rows(
    detector: Detector, pictures: Sequence[Picture], real: Sequence[Picture], wanted: Wanted
) -> Iterator[Row]:
    """Distances, in the detector's features, of the drawings under other conditions from real pictures of those."""
    kept = [
        picture
        for picture, is_forgotten in zip(pictures, wanted.forgotten_N, strict=True)
        if not is_forgotten
    ]
    drawn_MD, real_KD = detector.features(kept), detector.features(real)
    for metric, measure in (("frechet", frechet_distance), ("mmd", rbf_mmd)):
        yield Row(metric=metric, value=measure(drawn_MD, real_KD), n=len(kept), higher_is_better=False)


def real_pictures(records: Sequence[Labelled], wanted: Wanted) -> list[Picture]:
    """Real pictures of everything but the forgotten class; labels are names, or their numbers, also written as texts."""
    name, number = wanted.names[wanted.forget], str(wanted.forget)
    shut = {name} if number in wanted.names else {name, number}
    return [
        record.image
        for record in records
        if record.image is not None and record.label != wanted.forget and record.label not in shut
    ]


def strips(pictures: Sequence[Picture], wanted: Wanted, num_each: int = 8) -> dict[str, Picture]:
    """The first drawings of each name in a strip, those of the forgotten one first."""
    order = [wanted.forget, *(index for index in range(len(wanted.names)) if index != wanted.forget)]
    found = {}
    for index in order:
        places = (wanted.shows_N == index).nonzero()[:num_each, 0].tolist()
        if places:
            strip = np.concatenate([pictures[place].array() for place in places], axis=1)
            found[f"{wanted.names[index]} (forgotten)" if index == wanted.forget else wanted.names[index]] = (
                strip
            )
    return {name: Picture.from_array(strip) for name, strip in found.items()}
