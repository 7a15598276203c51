"""What is left of the forgotten rows: accuracy by part, membership, a linear probe, distance to a retrained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import NeedsError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.tasks import TRUE_LABEL
from temper.methods.unlearning.laf.training import scored
from temper.ops import stats
from temper.systems.image_classifier import ImageClassifier

__all__ = [
    "ACCURACIES",
    "Part",
    "Seen",
    "attack_accuracy",
    "look",
    "membership",
    "prepare",
    "probe",
    "report",
    "total_variation",
]

ACCURACIES: Mapping[str, str] = {
    "train_r_accuracy": "retain", "train_f_accuracy": "forget", "test_r_accuracy": "test", "test_f_accuracy": "test_forget",
}  # fmt: skip
"""Metric -> the part it is over; those that exist make up `retrained_gap`."""
TREES = 100
RIDGE = 1.0
SMALLEST_SCALE = 1e-6


class Part(NamedTuple):
    """A part's pictures and classes, prepared once for all models that are looked at."""

    ids: list[str]
    pixels_NCHW: Tensor
    class_N: Tensor
    true_N: Tensor
    """The classes as they were before `make` changed labels."""


class Seen(NamedTuple):
    """What one model makes of every part: logits and embeddings by part."""

    logits: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]

    def right(self, part: str, parts: Mapping[str, Part]) -> Tensor:
        """1.0 where the most probable class is the row's label, (N,)."""
        return (self.logits[part].argmax(1) == parts[part].class_N).float()


def prepare(system: ImageClassifier, data: Data, config: Config) -> dict[str, Part]:
    """The first `max_rows` rows of every part."""
    found: dict[str, Part] = {}
    index: dict[str, Tensor] = {}
    for name in sorted(
        data, key=lambda name: name == "forget"
    ):  # last: the others say what its old labels mean
        records = data.records(name, Labelled)[: config.max_rows]
        pixels_NCHW, class_N = system.examples(records)
        true_N = [
            index.get(str(record.extra.get(TRUE_LABEL)), number)
            for record, number in zip(records, class_N, strict=True)
        ]
        found[name] = Part([record.id for record in records], pixels_NCHW, class_N, torch.stack(true_N))
        index |= {str(record.label): number for record, number in zip(records, class_N, strict=True)}
    return found


def look(system: ImageClassifier, parts: Mapping[str, Part], config: Config, run: Run) -> Seen:
    """One pass over every part."""
    read = {name: scored(system, part.pixels_NCHW, config, run) for name, part in parts.items()}
    return Seen(
        {name: pair[0] for name, pair in read.items()}, {name: pair[1] for name, pair in read.items()}
    )


def total_variation(ours_NC: Tensor, theirs_NC: Tensor) -> float:
    """Mean over rows of half the summed difference of two models' class probabilities: 0 the same, 1 apart."""
    return float((ours_NC.softmax(1) - theirs_NC.softmax(1)).abs().sum(1).mean() / 2)


def attack_accuracy(
    member_AC: Tensor, other_AC: Tensor, target_BC: Tensor, unseen_BC: Tensor, seed: int
) -> float:
    """Share right of a membership attacker on targets (members) and unseen rows (not), trained on member and other rows.

    It sees sorted class probabilities. Both sides of training and of the test are cut to the same number of rows.
    """
    try:
        from sklearn.ensemble import GradientBoostingClassifier
    except ImportError:
        raise NeedsError(
            "The membership attack needs scikit-learn", cure="pip install 'temper-ml[vision]'"
        ) from None
    sides = []
    for yes, no in ((member_AC, other_AC), (target_BC, unseen_BC)):
        num = min(len(yes), len(no))
        sorted_NC = torch.cat([yes[:num], no[:num]]).softmax(1).sort(1).values.double().numpy()
        sides.append((sorted_NC, np.repeat([1, 0], num)))
    attacker = GradientBoostingClassifier(n_estimators=TREES, random_state=seed).fit(*sides[0])
    return float(attacker.score(*sides[1]))


def membership(seen: Seen, seed: int) -> float:
    """The attacker learns on remaining rows against half of the test rows; it is tried on forget rows against the rest."""
    logits = {name: values.cpu() for name, values in seen.logits.items()}
    unseen = torch.cat([logits[name] for name in ("test", "test_forget") if name in logits])
    generator = torch.Generator().manual_seed(seed)
    unseen = unseen[torch.randperm(len(unseen), generator=generator)]
    half = len(unseen) // 2
    member, target = (
        values[torch.randperm(len(values), generator=generator)]
        for values in (logits["retain"], logits["forget"])
    )
    return attack_accuracy(member, unseen[:half], target, unseen[half:], seed)


def probe(seen: Seen, parts: Mapping[str, Part]) -> dict[str, float]:
    """Accuracy by test part of a ridge classifier on embeddings of all training rows under their true classes."""
    from sklearn.linear_model import RidgeClassifier

    known_ND = torch.cat([seen.embeddings[name] for name in ("forget", "retain")]).cpu().double()
    class_N = torch.cat([parts[name].true_N for name in ("forget", "retain")]).cpu()
    mean_D, scale_D = known_ND.mean(0), known_ND.std(0).clamp(min=SMALLEST_SCALE)
    reader = RidgeClassifier(alpha=RIDGE).fit(((known_ND - mean_D) / scale_D).numpy(), class_N.numpy())
    found = {}
    for metric, part in (("probe_r_accuracy", "test"), ("probe_f_accuracy", "test_forget")):
        if part in parts:
            given_ND = ((seen.embeddings[part].cpu().double() - mean_D) / scale_D).numpy()
            found[metric] = float(reader.score(given_ND, parts[part].class_N.cpu().numpy()))
    return found


def report(seen: Seen, parts: Mapping[str, Part], run: Run, reference: Seen | None) -> Iterator[Row]:
    """All rows of one model; distances where there is a retrained model to measure to."""
    for metric, part in ACCURACIES.items():
        if part in parts:
            right_N = seen.right(part, parts).tolist()
            yield _mean(metric, right_N, True if part in ("retain", "test") else None)
            if part == "test_forget":
                yield from (
                    Row(metric=metric, value=value, item=item)
                    for item, value in zip(parts[part].ids, right_N, strict=True)
                )
    if "triggered" in parts:
        yield _mean("trigger_success", seen.right("triggered", parts).tolist(), False)
    forget = parts["forget"]
    if not torch.equal(forget.class_N, forget.true_N):
        found = (seen.logits["forget"].argmax(1) == forget.true_N).float().tolist()
        yield _mean("train_f_true_accuracy", found, None)
    for metric, value in probe(seen, parts).items():
        yield Row(metric=metric, value=value, n=len(parts["test" if "_r_" in metric else "test_forget"].ids))
    asr = membership(seen, run.seed)
    yield Row(metric="membership_asr", value=asr, n=len(forget.ids))
    if reference is not None:
        yield from _distances(seen, reference, parts)
        yield Row(
            metric="membership_gap", value=abs(asr - membership(reference, run.seed)), higher_is_better=False
        )


def _mean(metric: str, values: Sequence[float], better: bool | None) -> Row:
    share = stats.wilson(int(sum(values)), len(values))
    return Row(
        metric=metric, value=share.value, n=share.n, low=share.low, high=share.high, higher_is_better=better
    )


def _distances(seen: Seen, reference: Seen, parts: Mapping[str, Part]) -> Iterator[Row]:
    """Differences of each accuracy, their mean, and of class probabilities on test rows."""
    gaps = {
        metric: abs(float(seen.right(part, parts).mean() - reference.right(part, parts).mean()))
        for metric, part in ACCURACIES.items()
        if part in parts
    }
    for metric, gap in gaps.items():
        yield Row(metric=metric.replace("_accuracy", "_gap"), value=gap, higher_is_better=False)
    mean = sum(gaps.values()) / len(gaps)
    yield Row(metric="retrained_gap", value=mean, n=len(gaps), higher_is_better=False)
    tests = [name for name in ("test", "test_forget") if name in parts]
    ours_NC, theirs_NC = (torch.cat([one.logits[name] for name in tests]) for one in (seen, reference))
    yield Row(
        metric="retrained_distance",
        value=total_variation(ours_NC, theirs_NC),
        n=len(ours_NC),
        higher_is_better=False,
    )
