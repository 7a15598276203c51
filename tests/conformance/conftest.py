"""Every method's `tiny` recipe, opened step by step; what a method promises is tested on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from temper.artefacts import Artefact
from temper.core.card import Card
from temper.core.registry import load_card
from temper.core.types import Attempt, Row, Run
from temper.data.schemas import Data
from temper.run.plan import PlannedStep, Request, make_plan
from temper.run.verbs import call_verb
from temper.systems.loading import load_base


@dataclass(frozen=True)
class Stage:
    """One step of a tiny recipe, ready to be called again and again on a fresh system."""

    step: PlannedStep
    before: tuple[Artefact, ...]
    system_prompt: str

    @property
    def card(self) -> Card:
        return load_card(self.step.method)

    def base(self, **changes: Any) -> Any:
        assert self.step.system is not None
        return load_base(self.step.system.base, system_prompt=self.system_prompt, **changes)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """The step's system: a fresh base with the artefacts of the earlier steps it names."""
        if self.step.system is None:
            yield None
            return
        with contextlib.ExitStack() as stack:
            system = self.base()
            for artefact in self.before:
                system = stack.enter_context(artefact.apply(system))
            yield system

    def call(self, run: Run | None = None, data: Data | None = None, system: Any = None) -> Any:
        """The verb's result, streams made into lists."""
        step = self.step
        given = step.loaded if data is None else data
        with contextlib.nullcontext(system) if system is not None else self.opened() as opened:
            result = call_verb(step.method, step.verb, opened, given, step.config, run or Run(seed=step.seed))
            return list(result) if step.verb in ("attack", "measure") else result


@cache
def stages(slug: str) -> tuple[Stage, ...]:
    """The steps of a method's tiny recipe; what earlier steps leave or make is made once."""
    plan = make_plan(Request(source=slug, recipe="tiny"))
    ready: list[Stage] = []
    made: dict[str, Any] = {}
    for step in plan.cells[0].steps:
        if step.loaded is None and isinstance(step.data, str) and step.data in made:
            step = replace(step, loaded=made[step.data])
        names = [ref.name for ref in step.system.artefacts] if step.system else []
        stage = Stage(step, tuple(made[name] for name in names if name in made), plan.options.system_prompt)
        ready.append(stage)
        if step.verb in ("fit", "make"):
            made[step.id] = stage.call()
    return tuple(ready)


def find(slug: str, verb: str) -> list[Stage]:
    return [stage for stage in stages(slug) if stage.step.verb == verb and stage.step.method == slug]


def weights(system: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in system.model.state_dict().items()}


def answers(system: Any) -> torch.Tensor:
    """What a system says to a fixed input of its kind: what an artefact changes, or leaves alone."""
    with torch.no_grad():
        return ANSWERS[system.kind](system).clone()


def _logits(system: Any) -> torch.Tensor:
    return system.model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


def _vectors(system: Any) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    return system.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def _classes(system: Any) -> torch.Tensor:
    return system.logits(_noise(2, *system.shape))


def _likeness(system: Any) -> torch.Tensor:
    size = system.model.config.vision_config.image_size
    images = system.image_vectors(_noise(2, 3, size, size))
    return images @ system.text_vectors(["a red circle", "a blue star"]).T


def _drawn(system: Any) -> torch.Tensor:
    pictures = system.draw(system.conditions([0, 1]), seed=3)
    return torch.stack([torch.from_numpy(picture.array().copy()) for picture in pictures])


def _noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


ANSWERS = {
    "CausalLM": _logits,
    "Encoder": _vectors,
    "ImageClassifier": _classes,
    "DualEncoder": _likeness,
    "Diffusion": _drawn,
}


def plain(result: Any) -> list[Mapping[str, Any]]:
    """Rows or attempts without what a clock decides."""
    out: list[Mapping[str, Any]] = []
    for item in result:
        if isinstance(item, Row):
            if not item.metric.endswith("_s"):
                out.append(
                    {
                        "metric": item.metric,
                        "value": item.value,
                        "item": item.item,
                        "arm": item.arm,
                        "group": item.group,
                    }
                )
        elif isinstance(item, Attempt):
            out.append({"goal": item.goal, "input": item.input, "reply": item.reply, "success": item.success})
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
