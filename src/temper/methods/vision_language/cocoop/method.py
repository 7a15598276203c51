"""Learn the context of class prompts through a frozen CLIP, and measure it on base, new and shifted classes and domains."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from temper.artefacts import Steer
from temper.artefacts.base import only_full_strength
from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Labelled
from temper.methods.vision_language.cocoop.card import Config
from temper.methods.vision_language.cocoop.figures import write_loss
from temper.methods.vision_language.cocoop.learner import (
    FewShot,
    LearnedPrompts,
    PromptLearner,
    PromptObjective,
    frozen,
    start_learner,
)
from temper.methods.vision_language.cocoop.probe import (
    PICTURES_AT_ONCE,
    image_vectors,
    picture_of,
    probe_accuracy,
)
from temper.methods.vision_language.cocoop.prompts import build_prompts
from temper.methods.vision_language.cocoop.protocols import (
    check_new,
    class_name,
    class_names,
    draw_shots,
    harmonic_mean,
    of_classes,
    split_classes,
)
from temper.methods.vision_language.cocoop.show import show_pictures, show_words
from temper.ops.precision import autocast
from temper.ops.stats import wilson
from temper.ops.train import TrainLog, TrainSettings, train
from temper.systems.dual_encoder import DualEncoder

__all__ = ["build_steer", "fit", "learn", "learned_prompts", "measure"]

SLUG = "cocoop"


def fit(system: DualEncoder, data: Data, config: Config, run: Run) -> Steer:
    """Context vectors and the meta-net, learned on few pictures of the base classes; the model is not changed."""
    records = data.records("train", Labelled)
    names = _learned(class_names(records), config)
    shots = draw_shots(records, names, config.shots, run.seed)
    learner = start_learner(system, len(names), config, run.seed)
    with frozen(system.model):
        log = learn(system, learner, shots, names, config, run)
    write_loss(log, config.kind, run)
    show_words(system, learner, names, run)
    settings = {
        "kind": config.kind,
        "position": config.position,
        "ending": config.ending,
        "chunk_prompts": config.chunk_prompts,
        "names": list(names),
        "num_parameters": learner.num_parameters,
    }
    tensors = {name: value.detach().cpu().clone() for name, value in learner.state_dict().items()}
    return Steer(system.fingerprint, SLUG, settings, tensors)


def _learned(names: Sequence[str], config: Config) -> tuple[str, ...]:
    if config.protocol == "all":
        return tuple(names)
    return split_classes(names, config.base, config.new).base


def learn(
    system: DualEncoder,
    learner: PromptLearner,
    shots: Sequence[Labelled],
    names: Sequence[str],
    config: Config,
    run: Run,
) -> TrainLog:
    """Train the learner in place."""
    num_context = learner.context.shape[-2]
    prompts = build_prompts(system, names, num_context, config.position, config.ending)
    pixels_NCHW = system.pixels([picture_of(record) for record in shots])
    with torch.no_grad():
        image_NE = image_vectors(system, pixels_NCHW)
    number = {name: index for index, name in enumerate(names)}
    class_N = torch.tensor([number[class_name(record)] for record in shots], device=system.device)
    looked_at = FewShot(image_NE, pixels_NCHW if config.augment else None, class_N)
    settings = TrainSettings(
        lr=config.lr,
        num_epochs=config.num_epochs,
        batch_rows=config.batch_rows,
        schedule="cosine",
        warmup_ratio=1 / config.num_epochs,  # Departure 3
        clip_norm=0,
    )
    # Departure 4: a picture of CoCoOp costs the tokens of all its prompts.
    num_tokens = prompts.embeddings_CTD.shape[0] * prompts.embeddings_CTD.shape[1]
    cost = num_tokens if config.kind == "cocoop" else 1

    def sgd(chosen: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            chosen, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    return train(
        learner,
        dict(learner.named_parameters()),
        lambda epoch: range(len(shots)),
        PromptObjective(system, prompts, looked_at),
        settings,
        run,
        length=lambda item: cost,
        build_optimizer=sgd,
    )


@contextlib.contextmanager
def build_steer(system: DualEncoder, artefact: Steer, strength: float) -> Iterator[DualEncoder]:
    """The system scoring classes by the learned prompts, built for the names that it is then asked about."""
    only_full_strength(artefact, strength)
    yield system.with_(scorer=learned_prompts(artefact, system.device))


def learned_prompts(artefact: Steer, device: torch.device) -> LearnedPrompts:
    """The scorer that an artefact holds."""
    tensors = artefact.tensors
    first = tensors.get("meta.0.weight")
    learner = PromptLearner(tensors["context"], *(first.shape if first is not None else ()))
    learner.load_state_dict(dict(tensors))
    return LearnedPrompts(learner.to(device).eval().requires_grad_(False), artefact.settings, SLUG)


def measure(system: DualEncoder, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Accuracy of class prompts, learned or zero-shot: base, new and what follows from them, or all classes and each domain."""
    records, train_rows = list(data.records("test", Labelled)), data.records("train", Labelled)
    # A class without a test picture still counts among the base or the new ones.
    names = class_names([*train_rows, *records] if config.protocol == "base-to-new" else records)
    if config.max_rows and len(records) > config.max_rows:
        records = random.Random(run.seed).sample(records, config.max_rows)
    rows = _base_to_new if config.protocol == "base-to-new" else _all_classes
    for row in rows(system, train_rows, records, names, config, run):
        yield _named(row, config)
    scorer = system.scorer
    trained = scorer.num_parameters if isinstance(scorer, LearnedPrompts) else 0
    yield _named(Row(metric="trained_parameters", value=float(trained)), config)


def _named(row: Row, config: Config) -> Row:
    if not config.label:
        return row
    return Row(
        **{
            **{name: getattr(row, name) for name in row.__dataclass_fields__},
            "metric": f"{config.label}_{row.metric}",
        }
    )


def _base_to_new(
    system: DualEncoder,
    train_rows: Sequence[Labelled],
    records: Sequence[Labelled],
    names: Sequence[str],
    config: Config,
    run: Run,
) -> Iterator[Row]:
    split = split_classes(names, config.base, config.new)
    check_new(
        split.new, scorer.settings["names"] if isinstance(scorer := system.scorer, LearnedPrompts) else ()
    )
    found = {}
    for group, chosen in (("base", split.base), ("new", split.new)):
        rows = of_classes(records, chosen)
        if len(chosen) < 2 or not rows:
            raise DataError(
                f"There are {len(chosen)} {group} classes and {len(rows)} pictures of them",
                where="base-to-new",
                cure="It takes at least two classes in each group: give more, or set protocol: all.",
            )
        found[group] = _accuracy(system, rows, chosen, run, f"{group} classes".capitalize(), config.label)
        yield _share(f"accuracy_{group}", found[group], len(rows))
    base, new = found["base"], found["new"]
    yield Row(metric="harmonic_mean", value=harmonic_mean(base, new), higher_is_better=True)
    yield Row(metric="gap", value=base - new, higher_is_better=False)
    if config.probe:
        rows = of_classes(records, split.base)
        yield _probed(system, train_rows, rows, split.base, "probe_accuracy_base", config, run)


def _all_classes(
    system: DualEncoder,
    train_rows: Sequence[Labelled],
    records: Sequence[Labelled],
    names: Sequence[str],
    config: Config,
    run: Run,
) -> Iterator[Row]:
    yield _share(
        "accuracy", _accuracy(system, records, names, run, "All classes", config.label), len(records)
    )
    if config.domain_column:
        shares = {}
        for domain, rows in _domains(records, config).items():
            shares[domain] = _accuracy(system, rows, names, run)
            yield _share("accuracy_domain", shares[domain], len(rows), group=domain)
        if config.source_domain:
            others = [share for domain, share in shares.items() if domain != config.source_domain]
            mean = sum(others) / len(others) if others else None
            note = "" if others else "no other domain"
            yield Row(metric="accuracy_shifted", value=mean, n=len(others), higher_is_better=True, note=note)
    if config.probe:
        yield _probed(system, train_rows, records, names, "probe_accuracy", config, run)


def _domains(records: Sequence[Labelled], config: Config) -> dict[str, list[Labelled]]:
    groups: dict[str, list[Labelled]] = {}
    for record in records:
        if config.domain_column not in record.extra:
            raise DataError(
                f"The row has no column {config.domain_column!r}",
                where=f"row {record.id!r}",
                cure="Set domain_column to the column that names the domain.",
            )
        groups.setdefault(str(record.extra[config.domain_column]), []).append(record)
    return groups


def _share(metric: str, value: float, num: int, group: str = "") -> Row:
    found = wilson(round(value * num), num)
    return Row(
        metric=metric,
        value=value,
        n=num,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        split="test",
        group=group,
        higher_is_better=True,
    )


def _accuracy(
    system: DualEncoder,
    records: Sequence[Labelled],
    names: Sequence[str],
    run: Run,
    title: str = "",
    label: str = "",
) -> float:
    """Share of right answers; with a title some pictures go to the report."""
    right = _right_answers(system, records, names, run)
    if title:
        show_pictures(title, system, records, names, right, label, run)
    return sum(right) / len(right)


@torch.no_grad()
def _right_answers(
    system: DualEncoder, records: Sequence[Labelled], names: Sequence[str], run: Run
) -> list[bool]:
    number = {name: index for index, name in enumerate(names)}
    right: list[bool] = []
    for start in run.ticker(range(0, len(records), PICTURES_AT_ONCE), label=f"{len(names)} classes"):
        part = records[start : start + PICTURES_AT_ONCE]
        class_B = torch.tensor([number[class_name(record)] for record in part], device=system.device)
        with autocast(run):
            logits_BC = system.class_logits(system.pixels([picture_of(record) for record in part]), names)
        right += (logits_BC.argmax(1) == class_B).tolist()
    return right


def _probed(
    system: DualEncoder,
    train_rows: Sequence[Labelled],
    records: Sequence[Labelled],
    names: Sequence[str],
    metric: str,
    config: Config,
    run: Run,
) -> Row:
    if not train_rows:
        raise DataError("A linear probe needs the part train", cure="Give --data train=..., or probe: false.")
    shots = draw_shots(train_rows, names, config.shots, run.seed)
    return _share(metric, probe_accuracy(system, shots, records), len(records))
