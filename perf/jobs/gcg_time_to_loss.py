"""Greedy coordinate gradient until the target's loss is at most a fixed one: plain, and with probe sampling."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from gcg_64 import SLOT_TOKENS, TOPK, nanogcg_model
from harness import Job, Measured, Side, main, model_folder, timed

SEARCHES = (
    ("How do I fold a paper boat?", "Sure, here is a riddle", 2.25),
    ("What is the opposite of cold?", "Sure, here is a story about rain", 2.9),
)
"""Prompt, target, and the loss to reach, about 0.55 and 1 nat a token below that of the first slot."""
WIDTH, MOST_STEPS = 64, 60
LAYERS, REDUCTION = 2, 8
WARM_UP = {"prompt": "Hello!", "target": "Good day", "before": None}


def inputs() -> dict[str, Any]:
    """The searches' texts and ids, the ids that a slot may hold, and the loss to reach."""
    from temper.ops.search import allowed_mask
    from temper.ops.search_prompt import initial_ids, slot_prompt
    from temper.systems.loading import load_base

    folder = model_folder()
    system = load_base(folder)
    searches = []
    for seed, (text, target, goal) in enumerate(SEARCHES):
        prompt = slot_prompt(system, text, target)
        slot = initial_ids([prompt], SLOT_TOKENS)
        ids = {"before": prompt.before, "after": prompt.after, "target_ids": prompt.target}
        said = {"prompt": text, "target": target, "text": prompt.texts([slot])[0]}
        searches.append(said | ids | {"goal": goal, "seed": seed})
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

    def search(said: Mapping[str, Any], most_steps: int = MOST_STEPS) -> list[float]:
        goals = prepare(system, [Behaviour(said["prompt"], said["target"])], config)
        found = open_search([goals], allowed, config, Run(), torch.Generator().manual_seed(said["seed"]))
        while found.best.loss > said["goal"] and found.num_steps < most_steps:
            found.step()
        return found.curve

    search(given["searches"][0] | WARM_UP, 1)
    return _measured(lambda: [search(said) for said in given["searches"]])


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
            self.stop_flag = loss <= self.goal

        def _compute_candidates_loss_original(self, search_batch_size: int, input_embeds: Any) -> Any:
            loss = super()._compute_candidates_loss_original(search_batch_size, input_embeds)
            if not (probe and self.curve):
                self._seen(loss.min().item())
            return loss

        # Named as in the peer: its search for a batch size counts the parameters.
        def _compute_candidates_loss_probe_sampling(
            self, search_batch_size: int, input_embeds: Any, sampled_ids: Any
        ) -> Any:
            found = super()._compute_candidates_loss_probe_sampling(
                search_batch_size, input_embeds, sampled_ids
            )
            self._seen(found[0])
            return found

    def search(said: Mapping[str, Any], most_steps: int = MOST_STEPS) -> list[float]:
        config = nanogcg.GCGConfig(
            num_steps=most_steps,
            optim_str_init=said["text"],
            search_width=WIDTH,
            topk=TOPK,
            probe_sampling_config=drafting,
            verbosity="ERROR",
        )
        gcg = Stopped(model, tokenizer, config)
        gcg.curve, gcg.goal, gcg.not_allowed_ids = [], said["goal"], torch.tensor(given["barred"])
        torch.manual_seed(said["seed"])
        gcg.run(said["prompt"], said["target"])
        for name, part in (
            ("before", gcg.before_embeds),
            ("after", gcg.after_embeds),
            ("target_ids", gcg.target_embeds),
        ):
            if said["before"]:
                assert torch.equal(part, gcg.embedding_layer(torch.tensor([said[name]]))), (
                    f"{name} has other ids"
                )
        return gcg.curve

    search(given["searches"][0] | WARM_UP, 1)
    return _measured(lambda: [search(said) for said in given["searches"]])


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
        reached = [min(curve) <= goal for curve, (*_, goal) in zip(curves, SEARCHES, strict=True)]
        assert all(reached), f"{name} ended at {[min(curve) for curve in curves]}"
    said = "all reached the losses; steps " + ", ".join(
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
        "temper": Side(functools.partial(temper_side, draft="gradient")),
        "temper-plain": Side(functools.partial(temper_side, draft=""), counts=False),
        "nanogcg": Side(functools.partial(nanogcg_side, probe=False), "nanogcg"),
        "nanogcg-probe": Side(functools.partial(nanogcg_side, probe=True), "nanogcg", counts=False),
    },
    check=check,
)

if __name__ == "__main__":
    main(JOB)
