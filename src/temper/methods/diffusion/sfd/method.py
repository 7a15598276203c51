"""Fit a generator that forgot, draw with it, and measure what it draws; losses in `losses.py`, training in `distil.py`."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temper.artefacts import Artefact, Stack, Steer, Tune, tuning
from temper.artefacts.base import only_full_strength
from temper.core.errors import ConfigError, DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Labelled, Text
from temper.methods.diffusion.sfd import quality, toy
from temper.methods.diffusion.sfd.card import ONE_STEP, Config
from temper.methods.diffusion.sfd.distil import Problem, init_level, train
from temper.methods.diffusion.sfd.losses import one_step, other_labels, pseudo_labels
from temper.ops.precision import autocast
from temper.systems.diffusion import Condition, Diffusion
from temper.systems.noise import level

__all__ = ["OneStep", "build_steer", "estimate", "fit", "measure", "problem_of"]

SLUG = "sfd"
GRID = "What is drawn when asked for each, from the same noise"
TOY_STEP_S = 5e-3
"""Seconds of a term of a step of the toy."""


@dataclass(frozen=True)
class OneStep:
    """Draws in one call of the network, asked once at `t_init`."""

    t_init: int
    name: str = SLUG
    num_calls: int = 1

    def __call__(self, system: Diffusion, noise_BCHW: Tensor, condition: Condition) -> Tensor:
        """x_0 from unit noise, without guidance."""
        t_B = torch.full((len(noise_BCHW),), self.t_init, device=noise_BCHW.device)
        ab = level(system.alpha_bar_N, t_B, noise_BCHW)
        return one_step(lambda x_BCHW: system.eps(x_BCHW, t_B, condition), noise_BCHW, ab)


@contextlib.contextmanager
def build_steer(system: Diffusion, artefact: Steer, strength: float) -> Iterator[Diffusion]:
    """The system drawing by the one-step rule, which takes the sampler's place; only at strength 1."""
    only_full_strength(artefact, strength)
    yield system.with_(draw_rule=OneStep(int(artefact.settings["t_init"])))


def fit(system: Diffusion, data: Data, config: Config, run: Run) -> Artefact:
    """A generator that draws in one call and forgot (sfd), or did not (sid); a sampler's weights for the baselines.

    Raises ConfigError for labels that are none or the same, and for a system that draws in one step already.
    """
    if config.objective == "untouched":
        raise ConfigError("untouched trains nothing", where="objective", cure="Measure the base itself.")
    if system.draw_rule is not None:
        raise ConfigError(
            "The system draws by a rule of its own, so it is no teacher",
            where=system.spec,
            cure="Fit its base.",
        )
    with tuning(system, Tune(mode="full"), run) as tuned:
        problem = problem_of(tuned.system, data, config, run)
        log = train(problem, config, run)
        _write_figures(run, log.figures("Losses"))
        weights = tuned.finish(SLUG)
    if config.objective not in ONE_STEP:
        return weights
    rule = Steer(weights.base, SLUG, {"t_init": init_level(config, len(problem.alpha_bar_N))})
    return Stack.of([weights, rule], SLUG)


def problem_of(system: Diffusion, data: Data, config: Config, run: Run) -> Problem:
    """The system as the training loops take it."""
    conditions = _text_conditions if system.takes_text else _class_conditions
    remain, everything, pair, pseudo = conditions(system, data, config, run)

    def eps(model: nn.Module, x_B: Tensor, t_B: Tensor, condition: Condition, guidance: float) -> Tensor:
        with autocast(run):
            return system.with_(model=model).eps(x_B, t_B, condition, guidance).float()

    def sample(model: nn.Module, condition: Condition, seed: int) -> Tensor:
        drawn = system.with_(model=model).draw_pixels(condition, config.sample_steps, seed, config.guidance)
        return system.from_pixels(drawn)

    return Problem(
        model=system.model,
        eps=eps,
        alpha_bar_N=system.alpha_bar_N,
        shape=system.shape,
        remain=remain,
        everything=everything,
        pair=pair,
        pseudo=pseudo,
        sample=sample,
        nothing=system.nothing,
        device=system.device,
    )


def _labels(system: Diffusion, config: Config) -> tuple[int, int | None]:
    """The forgotten class and its override, None where that is no one class; names or numbers."""
    names = [config.forget] + ([config.override] if config.override_mode == "fixed" else [])
    forget, *override = system.conditions([_label(system, name) for name in names]).values.tolist()
    if override and override[0] == forget:
        raise ConfigError(
            f"The override is the forgotten class {system.labels[forget]!r}",
            where="override",
            cure="Name another one.",
        )
    return forget, override[0] if override else None


def _label(system: Diffusion, name: int | str) -> int | str:
    """A class by name, or by its number, which may be written as a text."""
    return int(name) if isinstance(name, str) and name not in system.labels and name.isdecimal() else name


def _class_conditions(system: Diffusion, data: Data, config: Config, run: Run) -> tuple[Any, ...]:
    """How classes are drawn: the remaining ones, all, the forgotten one with its override, a classifier's override."""
    num_classes, (forget, override) = len(system.labels), _labels(system, config)

    def labelled(label_B: Tensor) -> Condition:
        return Condition(labels_B=label_B.to(system.device))

    def pair(num: int, rng: torch.Generator) -> tuple[Condition, Condition | None]:
        forgotten = labelled(torch.full((num,), forget))
        if override is not None:
            return forgotten, labelled(torch.full((num,), override))
        if config.override_mode == "rand":
            return forgotten, labelled(other_labels(num, num_classes, forget, rng))
        return forgotten, None

    pseudo: Callable[[Tensor, torch.Generator], Condition] | None = None
    if config.override_mode in ("amax", "prob"):
        detector = quality.load_detector(config.classifier, system.labels, run)

        def pseudo(x_B: Tensor, rng: torch.Generator) -> Condition:
            scores_BC = detector.scores(system.pictures(system.to_pixels(x_B)))
            return labelled(pseudo_labels(scores_BC, forget, config.override_mode == "prob", rng))

    return (
        lambda num, rng: labelled(other_labels(num, num_classes, forget, rng)),
        lambda num, rng: labelled(torch.randint(0, num_classes, (num,), generator=rng)),
        pair,
        pseudo,
    )


def _text_conditions(system: Diffusion, data: Data, config: Config, run: Run) -> tuple[Any, ...]:
    """The same for texts: prompts without the phrase remain; the templates hold it, or the override's phrase."""
    if config.override_mode != "fixed":
        raise ConfigError(
            f"override_mode {config.override_mode} needs classes",
            where=system.spec,
            cure="Name an override phrase.",
        )
    phrase, other = str(config.forget), str(config.override)
    for name, words in (("forget", phrase), ("override", other)):
        _check_words(system, name, words)
    prompts = [record.text for record in data.get("prompts") if isinstance(record, Text)]
    kept = [text for text in prompts if phrase.lower() not in text.lower()]
    if not kept:
        raise DataError(
            f"No prompt without {phrase!r}",
            where=f"part prompts, {len(prompts)} rows",
            cure="Give the texts of what is to be kept as the part prompts.",
        )
    keep = system.conditions(kept)
    forgotten, override = (
        system.conditions([text.replace("{}", each) for text in config.templates]) for each in (phrase, other)
    )
    both = keep.like(torch.cat([keep.values, forgotten.values]))

    def rows(condition: Condition) -> Callable[[int, torch.Generator], Condition]:
        return lambda num, rng: condition.take(torch.randint(0, len(condition), (num,), generator=rng))

    def pair(num: int, rng: torch.Generator) -> tuple[Condition, Condition]:
        row_B = torch.randint(0, len(forgotten), (num,), generator=rng)
        return forgotten.take(row_B), override.take(row_B)

    return rows(keep), rows(both), pair, None


def _check_words(system: Diffusion, name: str, words: str) -> None:
    """Raise ConfigError for a word that the model's texts cannot hold: it would read any such word alike."""
    tokenizer = system.tokenizer
    unknown = [
        word
        for word in words.split()
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]
    ]
    if unknown or not words.split():
        raise ConfigError(
            f"The model's tokenizer does not know {(' '.join(unknown) or words)!r}",
            where=f"{name}, {system.spec}",
            cure="Name a word of its own texts.",
        )


def measure(system: Diffusion, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Rates by a detector, distances from real pictures, calls and seconds; with `toy` the toy in the system's place."""
    if config.toy:
        rows, figures = toy.measure(config, run)
        _write_figures(run, figures)
        yield from rows
        return
    wanted = _wanted(system, data, config)
    detector = quality.load_detector(config.detector, wanted.names, run)
    pictures, rows = quality.draw_all(system, wanted, config, run.seed)
    yield from quality.rate_rows(detector.scores(pictures), wanted)
    yield from rows
    real = quality.real_pictures(data.records("real", Labelled) if "real" in data else (), wanted)
    if not real and config.reference:
        teacher = quality.open_reference(config.reference, run)
        drawn, _ = quality.draw_all(teacher, wanted, config, run.seed + 1)
        real = [picture for picture, is_out in zip(drawn, wanted.forgotten_N, strict=True) if not is_out]
    if real:
        yield from quality.distance_rows(detector, pictures, real, wanted)
    shown = quality.strips(pictures, wanted)
    _write_figures(run, {"grids": {GRID: {name: _picture(strip.png()) for name, strip in shown.items()}}})


def estimate(system_facts: Mapping[str, Any], data: Data | None, config: Config) -> dict[str, float]:
    """Seconds of the toy; nothing for a system."""
    if not config.toy:
        return {}
    num_terms = {"sfd": 2.0, "sid": 1.0}.get(config.objective, 0.2)
    return {"seconds": TOY_STEP_S * (config.toy_steps / 4 + config.num_steps * num_terms)}


def _wanted(system: Diffusion, data: Data, config: Config) -> quality.Wanted:
    """What is asked for: every class, or the templates with the phrase and the prompts of the data."""
    if system.takes_text:
        return _wanted_texts(data, config)
    forget, override = _labels(system, config)
    asked = [label for label in range(len(system.labels)) for _ in range(config.num_samples)]
    return quality.Wanted(tuple(asked), torch.tensor(asked), system.labels, forget, override)


def _wanted_texts(data: Data, config: Config) -> quality.Wanted:
    phrase, other = str(config.forget), str(config.override)
    records = data.records("prompts", Labelled) if "prompts" in data else ()
    kept = [(record.text, str(record.label)) for record in records if str(record.label) != phrase]
    if not kept:
        raise DataError(
            "There is no prompt of what is to be kept",
            where="part prompts",
            cure="Give labelled texts: what the picture should show is the label.",
        )
    filled = [text.replace("{}", phrase) for text in config.templates]
    pairs = [(text, phrase) for text in (filled * config.num_samples)[: config.num_samples]] + kept
    names = tuple(dict.fromkeys([phrase, other, *(label for _, label in kept)]))
    shows_N = torch.tensor([names.index(label) for _, label in pairs])
    return quality.Wanted(tuple(text for text, _ in pairs), shows_N, names, 0, 1)


def _picture(png: bytes) -> dict[str, str]:
    return {"png": base64.b64encode(png).decode()}


def _write_figures(run: Run, figures: dict[str, Any] | Sequence[Any]) -> None:
    if run.folder is not None and figures:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "figures.json").write_text(json.dumps(figures))
