"""Chooses what of a run goes to the report, where there is one: words of the context, test pictures and maps of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from temper.core.types import Run
from temper.data.schemas import Labelled
from temper.methods.vision_language.cocoop.explain import nearest_words, shifts, token_maps
from temper.methods.vision_language.cocoop.figures import (
    NUM_SETS,
    write_maps,
    write_pictures,
    write_shifts,
    write_words,
)
from temper.methods.vision_language.cocoop.learner import PromptLearner
from temper.methods.vision_language.cocoop.probe import image_vectors, picture_of
from temper.methods.vision_language.cocoop.protocols import class_name
from temper.systems.dual_encoder import DualEncoder

__all__ = ["NUM_MAPS", "show_pictures", "show_words"]

NUM_MAPS = 6
"""Pictures of a group that maps are drawn of."""


def show_words(system: DualEncoder, learner: PromptLearner, names: Sequence[str], run: Run) -> None:
    """The words nearest to each context vector; of contexts of one set a class the first few sets."""
    if run.folder is None:
        return
    context = learner.context.detach()
    sets = context[None] if context.ndim == 2 else context[:NUM_SETS]
    of = [""] if context.ndim == 2 else [f"{name}, " for name in names[:NUM_SETS]]
    labels = [f"{name}{place}" for name in of for place in range(1, 1 + context.shape[-2])]
    write_words(nearest_words(system, sets.flatten(0, 1)), labels, run)


def show_pictures(
    title: str,
    system: DualEncoder,
    records: Sequence[Labelled],
    names: Sequence[str],
    right: Sequence[bool],
    label: str,
    run: Run,
) -> None:
    """The first pictures with right and wrong answers marked; of a few of other classes each, maps and what the shift changes."""
    if run.folder is None or not records:
        return
    write_pictures(title, [picture_of(record) for record in records], right, run)
    first = {class_name(record): place for place, record in reversed(list(enumerate(records)))}
    step = max(1, len(first) // NUM_MAPS)
    places = [first[name] for name in names if name in first][::step][:NUM_MAPS]
    chosen = [records[place] for place in places]
    pictures, classes = [picture_of(record) for record in chosen], [class_name(record) for record in chosen]
    pixels_BCHW, class_B = system.pixels(pictures), [names.index(name) for name in classes]
    maps_BSS = token_maps(system, pixels_BCHW, class_B, names).cpu().numpy()
    write_maps(title, pictures, [right[place] for place in places], maps_BSS, label, run)
    with torch.no_grad():
        image_BE = image_vectors(system, pixels_BCHW)
    write_shifts(shifts(system, image_BE, class_B, names), classes, title, run)
