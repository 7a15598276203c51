"""What is to be forgotten: a class, some rows, rows with wrong labels, or rows with a trigger."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from temper.core.errors import ConfigError, DataError
from temper.data.pictures import Picture
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf.card import Config
from temper.systems.image_classifier import pictures_of

__all__ = ["TRUE_LABEL", "build_task", "stamp"]

MARGIN_PX = 1
CLASS_INDEX = "class_index"
TRUE_LABEL = "true_label"
"""Column of a row whose label was changed: what it was before."""


def build_task(data: Data, config: Config, seed: int) -> Data:
    """Parts forget and retain of the training rows, test, and test_forget (class) or triggered (backdoor)."""
    train, test = data.records("train", Labelled), data.records("test", Labelled)
    pictures_of((*train, *test))  # a text among them stops here
    chosen = _chosen(train, config, seed)
    if not chosen or len(chosen) == len(train):
        raise DataError(
            f"{len(chosen)} of {len(train)} rows would be forgotten",
            where=f"task {config.task!r}, classes {list(config.classes) or 'all'}, share {config.share:g}",
            cure="Choose classes and share so that some rows are forgotten and some remain.",
        )
    models = {str(record.label): record for record in reversed(train)}
    forget = [
        _changed(train[place], models, config, random.Random(f"{seed}/{place}")) for place in sorted(chosen)
    ]
    parts: dict[str, Sequence[Labelled]] = {
        "forget": forget,
        "retain": [record for place, record in enumerate(train) if place not in chosen],
        "test": test,
    }
    if config.task == "class":
        parts["test"] = [record for record in test if str(record.label) not in config.classes]
        parts["test_forget"] = [record for record in test if str(record.label) in config.classes]
    if config.task == "backdoor":
        others = [record for record in test if str(record.label) != config.target]
        parts["triggered"] = [_stamped(record, models, config) for record in others]
    return Data({name: rows for name, rows in parts.items() if rows}, data.source)


def _chosen(train: Sequence[Labelled], config: Config, seed: int) -> set[int]:
    """Places of the rows to forget: a share of each class, drawn by the seed."""
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(train):
        groups.setdefault(str(record.label), []).append(place)
    unknown = [name for name in config.classes if name not in groups]
    if unknown:
        raise ConfigError(
            f"No row is of class {unknown[0]!r}",
            where="classes",
            cure=f"There are: {', '.join(sorted(groups))}.",
        )
    if config.task == "class" and not config.classes:
        raise ConfigError("Task class names no class", cure="Set classes, e.g. --set classes='[0]'.")
    wanted = config.classes or tuple(groups)
    if config.task == "backdoor":
        wanted = tuple(name for name in wanted if name != config.target)
    share = 1.0 if config.task == "class" else config.share
    draw = random.Random(seed)
    return {place for name in wanted for place in draw.sample(groups[name], round(share * len(groups[name])))}


def _changed(
    record: Labelled, models: Mapping[str, Labelled], config: Config, draw: random.Random
) -> Labelled:
    """A forget row as the model learns it; `models` holds a row of each class."""
    if config.task == "backdoor":
        return _stamped(record, models, config)
    if config.task == "noisy":
        others = [name for name in sorted(models) if name != str(record.label)]
        if not others:
            raise DataError(
                "All rows have one class: no label can be wrong", cure="Give two classes or more."
            )
        return _relabelled(record, models[draw.choice(others)])
    return record


def _relabelled(record: Labelled, model: Labelled) -> Labelled:
    """The row under the label of another, whose place among the classes goes with it."""
    extra = {name: value for name, value in record.extra.items() if name != CLASS_INDEX}
    extra |= {name: value for name, value in model.extra.items() if name == CLASS_INDEX}
    return dataclasses.replace(record, label=model.label, extra={**extra, TRUE_LABEL: record.label})


def _stamped(record: Labelled, models: Mapping[str, Labelled], config: Config) -> Labelled:
    """The row with the trigger and the target's label."""
    if config.target not in models:
        raise ConfigError(
            f"No row is of class {config.target!r}",
            where="target",
            cure=f"There are: {', '.join(sorted(models))}.",
        )
    assert record.image is not None
    changed = _relabelled(record, models[config.target])
    return dataclasses.replace(changed, image=stamp(record.image, config.patch_px))


def stamp(picture: Picture, patch_px: int) -> Picture:
    """The picture with a white square in its lower right corner, a pixel from the edges."""
    array = picture.array().copy()
    if min(array.shape[:2]) < patch_px + 2 * MARGIN_PX:
        raise ConfigError(
            f"A patch of {patch_px} px does not fit a picture of {array.shape[0]} x {array.shape[1]}",
            where="patch_px",
            cure="Make it smaller.",
        )
    end = -MARGIN_PX
    array[end - patch_px : end, end - patch_px : end] = 255
    return Picture.from_array(array)
