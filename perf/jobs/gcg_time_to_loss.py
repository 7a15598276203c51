"""Greedy coordinate gradient until the target's loss is at most a fixed one: plain, and with probe sampling."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from gcg_64 import SLOT_TOKENS, TOPK, nanogcg_model
from harness import Job, Measured, Side, main, model_folder, timed

SEARCHES = (
    ("How do I fold a paper boat?", "Sure, here is a riddle", 0),
    ("What is the opposite of cold?", "Sure, here is a story about rain", 1),
)
WIDTH, GOAL, MOST_STEPS = 128, 2.0, 60
LAYERS, REDUCTION = 10, 8


def inputs() -> dict[str, Any]:
    """The searches' texts and ids, the ids that a slot may hold, and the loss to reach."""
    from temper.ops.search import allowed_mask
    from temper.ops.search_prompt import initial_ids, slot_prompt
    from temper.systems.loading import load_base

    folder = model_folder()
    system = load_base(folder)
    searches = []
    for text, target, seed in SEARCHES:
        prompt = slot_prompt(system, text, target)
        slot = initial_ids([prompt], SLOT_TOKENS)
        ids = {"before": prompt.before, "after": prompt.after, "target_ids": prompt.target, "slot": slot}
        searches.append(
            {"prompt": text, "target": target, "seed": seed, "text": prompt.texts([slot])[0]} | ids
        )
    barred = (~allowed_mask(system)).nonzero()[:, 0].tolist()
    return {"folder": folder, "searches": searches, "barred": barred}


def temper_side(given: Any, draft: str) -> Measured:
    """The method's own search, stopped by its loss instead of a number of steps."""
    import torch

    from temper.core.types import Run
    from temper.data.schemas import Behaviour
    from temper.methods.attacks.gcg.card import Config
    from temper.methods.attacks.gcg.method import open_search, prepare
    from temper.ops.search import allowed_mask
    from temper.systems.loading import load_base

    system = load_base(given["folder"])
    allowed = allowed_mask(system)
    config = Config(
        suffix_tokens=SLOT_TOKENS,
        num_candidates=WIDTH,
        topk=TOPK,
        positions="uniform",
        draft=draft,
        draft_reduction=REDUCTION,
    )

    def search(prompt: str, target: str, seed: int, most_steps: int = MOST_STEPS) -> list[float]:
        goals = prepare(system, [Behaviour(prompt, target)], config)
        found = open_search([goals], allowed, config, Run(), torch.Generator().manual_seed(seed))
        while found.best.loss > GOAL and found.num_steps < most_steps:
            found.step()
        return found.curve

    search("Hello!", "Good day", 0, 1)
    return _measured(lambda: [search(s["prompt"], s["target"], s["seed"]) for s in given["searches"]])


def nanogcg_side(given: Any, probe: bool) -> Measured:
    """The peer's own `run`, told to stop when a step's loss is low enough."""
    import nanogcg
    import torch
    from nanogcg.gcg import GCG, ProbeSamplingConfig

    model, tokenizer = nanogcg_model(given["folder"], "float32")
    # It takes every BOS out of the template, and here that is the mark of a turn.
    tokenizer.bos_token = None
    drafting = ProbeSamplingConfig(_first_layers(model), tokenizer, r=REDUCTION) if probe else None

    class Stopped(GCG):
        def _seen(self, loss: float) -> None:
            self.curve.append(loss)
            self.stop_flag = loss <= GOAL

        def _compute_candidates_loss_original(self, search_batch_size: int, input_embeds: Any) -> Any:
            loss = super()._compute_candidates_loss_original(search_batch_size, input_embeds)
            if not (probe and self.curve):
                self._seen(loss.min().item())
            return loss

        def _compute_candidates_loss_probe_sampling(self, *args: Any) -> Any:
            found = super()._compute_candidates_loss_probe_sampling(*args)
            self._seen(found[0])
            return found

    def search(
        prompt: str, target: str, seed: int, text: str, most_steps: int = MOST_STEPS, ids: Any = None
    ) -> list[float]:
        config = nanogcg.GCGConfig(
            num_steps=most_steps,
            optim_str_init=text,
            search_width=WIDTH,
            topk=TOPK,
            batch_size=16,
            probe_sampling_config=drafting,
            verbosity="ERROR",
        )
        gcg = Stopped(model, tokenizer, config)
        gcg.curve, gcg.not_allowed_ids = [], torch.tensor(given["barred"])
        torch.manual_seed(seed)
        gcg.run(prompt, target)
        if ids:
            parts = [gcg.before_embeds, gcg.after_embeds, gcg.target_embeds]
            assert all(
                torch.equal(part, gcg.embedding_layer(torch.tensor([ids[name]])))
                for part, name in zip(parts, ("before", "after", "target_ids"), strict=True)
            )
        return gcg.curve

    search("Hello!", "Good day", 0, given["searches"][0]["text"], 1)
    return _measured(
        lambda: [search(s["prompt"], s["target"], s["seed"], s["text"], ids=s) for s in given["searches"]]
    )


def _first_layers(model: Any) -> Any:
    """A draft of the peer's kind, a model of its own: the first layers, with shared weights."""
    import copy

    draft = copy.copy(model)
    draft._modules = dict(model._modules)
    draft.model = copy.copy(model.model)
    draft.model._modules = dict(model.model._modules)
    draft.model.layers = model.model.layers[:LAYERS]
    return draft


def _measured(work: Any) -> Measured:
    curves, seconds = timed(work)
    steps = [len(curve) - 1 for curve in curves]
    return Measured(len(curves), seconds, curves, {"steps": steps, "step_s": seconds / sum(steps)})


def check(outputs: Mapping[str, Any]) -> str:
    """Every side reached the loss in every search; the plain sides took the same way there."""
    for name, curves in outputs.items():
        assert all(min(curve) <= GOAL for curve in curves), f"{name} ended at {[min(c) for c in curves]}"
    said = f"all reached {GOAL} nats a token; steps " + ", ".join(
        f"{name} {[len(curve) - 1 for curve in curves]}" for name, curves in outputs.items()
    )
    plain = [outputs[name] for name in ("temper-plain", "nanogcg") if name in outputs]
    if len(plain) == 2:
        pairs = [(a, b) for one, two in zip(*plain, strict=True) for a, b in zip(one, two, strict=False)]
        same = sum(abs(a - b) < 1e-3 for a, b in pairs)
        said += f"; the plain curves agree in {same} of {len(pairs)} steps"
    return said


JOB = Job(
    name="gcg-time-to-loss",
    about=__doc__ or "",
    unit="s/search",
    target=1 / 3,
    lower_is_better=True,
    inputs=inputs,
    sides={
        "temper": Side(functools.partial(temper_side, draft=f"layers:{LAYERS}")),
        "temper-plain": Side(functools.partial(temper_side, draft=""), counts=False),
        "nanogcg": Side(functools.partial(nanogcg_side, probe=False), "nanogcg"),
        "nanogcg-probe": Side(functools.partial(nanogcg_side, probe=True), "nanogcg", counts=False),
    },
    check=check,
)

if __name__ == "__main__":
    main(JOB)
