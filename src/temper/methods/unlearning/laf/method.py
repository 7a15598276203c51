"""Draw a task, unlearn, measure; the maths is in `vae.py`, the loops in `training.py`, the metrics in `metrics.py`."""

from __future__ import annotations

from collections.abc import Iterator

from temper.artefacts import Artefact, Tune, tuning
from temper.artefacts.opening import opened
from temper.artefacts.training import Tuning
from temper.core.types import Row, Run
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf import training
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.comparison import compare
from temper.methods.unlearning.laf.metrics import Seen, look, prepare, report
from temper.methods.unlearning.laf.tasks import build_task
from temper.systems.image_classifier import ImageClassifier

__all__ = ["fit", "make", "measure"]

SLUG = "laf"


def make(system: ImageClassifier, data: Data, config: Config, run: Run) -> Data:
    """What is to be forgotten and what is to be kept, drawn by the seed."""
    return build_task(data, config, run.seed)


def fit(system: ImageClassifier, data: Data, config: Config, run: Run) -> Artefact:
    """The weights after one technique; the system stays as it was."""
    with tuning(system, Tune(mode="full"), run) as tuned:
        _train(tuned, data, config, run)
        tuned.system.model.eval()
        return tuned.finish(SLUG)


def _train(tuned: Tuning, data: Data, config: Config, run: Run) -> None:
    forget, retain = (data.records(part, Labelled) for part in ("forget", "retain"))
    if config.technique == "laf":
        training.unlearn(tuned, training.pictures(tuned.system, data), config, run)
    elif config.technique == "repair":
        training.repair(tuned, retain, config, run)
    elif config.technique == "ascent":
        training.learn(tuned, forget, config, run, config.ascent_epochs, config.ascent_lr, sign=-1.0)
    elif config.technique == "finetune":
        training.learn(tuned, retain, config, run, config.finetune_epochs, config.learn_lr)
    else:
        records = retain if config.technique == "retrain" else (*forget, *retain)
        training.learn(tuned, records, config, run, config.learn_epochs, config.learn_lr)


def measure(system: ImageClassifier, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """The report on the system as it is, or of every technique in `compare` on copies of it."""
    if config.compare:
        yield from compare(system, data, config, run, fit)
        return
    parts = prepare(system, data, config)
    reference: Seen | None = None
    if config.reference:
        with opened(config.reference, device=run.device) as retrained:
            reference = look(retrained, parts, config, run)
    yield from report(look(system, parts, config, run), parts, run, reference)
