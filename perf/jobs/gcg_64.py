"""A step of greedy coordinate gradient at width 64: gradient, draw, filter, and every candidate's exact loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from harness import Job, Measured, Side, main, model_folder, timed

PROMPT, TARGET = "How do I fold a paper boat?", "Sure, here is a riddle"
SLOT_TOKENS, TOPK, SEED = 20, 256, 0
WEIGHTS, HEAD = 106.2e6, 28.3e6
"""Multiplications a token of SmolLM2-135M: in its layers, and in its vocabulary projection."""


def inputs(width: int, steps: int) -> dict[str, Any]:
    """The prompt's ids, a slot a step, and the candidates that a step scores: all keep their ids as text."""
    import torch

    from temper.ops.search import allowed_mask, distinct, propose, random_choices
    from temper.ops.search_prompt import exact_rows, initial_ids, slot_prompt
    from temper.systems.loading import load_base

    folder = model_folder()
    system = load_base(folder)
    prompt = slot_prompt(system, PROMPT, TARGET)
    choices = random_choices(SLOT_TOKENS, allowed_mask(system))
    generator = torch.Generator().manual_seed(SEED)
    slot, rounds = initial_ids([prompt], SLOT_TOKENS), []
    for _ in range(steps):
        drawn = propose(torch.tensor(slot), choices, 2 * width, generator, positions="uniform")
        drawn = distinct(drawn, {tuple(slot)})
        kept = drawn[exact_rows([prompt], drawn)][:width].tolist()
        assert len(kept) == width
        rounds.append({"slot": slot, "candidates": kept})
        slot = kept[0]
    shared = {"folder": folder, "width": width, "rounds": rounds, "warm_up": kept}
    return shared | {"before": prompt.before, "after": prompt.after, "target": prompt.target}


def temper_side(given: Any, dtype: str) -> Measured:
    """`SlotScorer` and the functions that the method calls in a step."""
    import torch

    from temper.core.types import Run
    from temper.ops.search import allowed_mask, combine_gradients, distinct, gradient_choices, propose
    from temper.ops.search_losses import SlotLoss, SlotScorer
    from temper.ops.search_prompt import exact_rows, slot_prompt
    from temper.systems.loading import load_base

    system = load_base(given["folder"], dtype=dtype)
    prompt = slot_prompt(system, PROMPT, TARGET)
    assert (prompt.before, prompt.after, prompt.target) == (given["before"], given["after"], given["target"])
    allowed, generator = allowed_mask(system), torch.Generator().manual_seed(SEED)

    def step(scorer: Any, slot: list[int], candidates: list[list[int]]) -> list[float]:
        choices = gradient_choices(combine_gradients([[scorer.gradient(slot)]]), allowed, TOPK)
        drawn = propose(torch.tensor(slot), choices, given["width"], generator, positions="uniform")
        exact_rows([prompt], distinct(drawn, {tuple(slot)}))
        return scorer.losses(torch.tensor(candidates), slot).loss_K.tolist()

    step(
        SlotScorer(slot_prompt(system, "Hello!", TARGET), SlotLoss(), Run()),
        given["warm_up"][0],
        given["warm_up"][:8],
    )
    scorer = SlotScorer(prompt, SlotLoss(), Run())
    return _measured(given, functools.partial(step, scorer))


def nanogcg_side(given: Any, dtype: str, batch_size: int | None) -> Measured:
    """The peer's own functions in the order of its `run`, with its prefix cache."""
    import nanogcg
    import torch
    from nanogcg.gcg import GCG, filter_ids, sample_ids_from_grad
    from nanogcg.utils import find_executable_batch_size

    model, tokenizer = nanogcg_model(given["folder"], dtype)
    config = nanogcg.GCGConfig(
        search_width=given["width"], topk=TOPK, batch_size=batch_size, seed=SEED, verbosity="ERROR"
    )
    gcg = GCG(model, tokenizer, config)
    torch.manual_seed(SEED)

    def open_prompt(before: list[int]) -> None:
        parts = [torch.tensor([ids]) for ids in (before, given["after"], given["target"])]
        gcg.target_ids = parts[2]
        gcg.before_embeds, gcg.after_embeds, gcg.target_embeds = map(gcg.embedding_layer, parts)
        with torch.no_grad():
            gcg.prefix_cache = model(inputs_embeds=gcg.before_embeds, use_cache=True).past_key_values

    def step(slot: list[int], candidates: list[list[int]]) -> list[float]:
        slot_1N, ids_KN = torch.tensor([slot]), torch.tensor(candidates)
        gradient = gcg.compute_token_gradient(slot_1N)
        with torch.no_grad():
            drawn = sample_ids_from_grad(
                slot_1N[0],
                gradient[0],
                config.search_width,
                TOPK,
                config.n_replace,
                not_allowed_ids=gcg.not_allowed_ids,
            )
            filter_ids(drawn, tokenizer)
            num = len(ids_KN)
            rows = [
                gcg.embedding_layer(ids_KN),
                gcg.after_embeds.repeat(num, 1, 1),
                gcg.target_embeds.repeat(num, 1, 1),
            ]
            scored = find_executable_batch_size(gcg._compute_candidates_loss_original, batch_size or num)
            return scored(torch.cat(rows, dim=1)).tolist()

    open_prompt(given["before"][:-3])
    step(given["warm_up"][0], given["warm_up"][:8])
    open_prompt(given["before"])
    return _measured(given, step)


def nanogcg_model(folder: str, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer in the newest transformers that the peer allows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(folder)
    # It looks for the base of the rotation elsewhere than in the file.
    config.rope_theta = config.rope_parameters["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=getattr(torch, dtype))
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def _measured(given: Any, step: Callable[[list[int], list[list[int]]], list[float]]) -> Measured:
    losses, seconds = timed(lambda: [step(part["slot"], part["candidates"]) for part in given["rounds"]])
    return Measured(sum(map(len, losses)), seconds, losses)


def check(outputs: Mapping[str, Any]) -> str:
    """Every candidate's loss against the first side of the same dtype."""
    said = []
    for half in (False, True):
        names = [name for name in outputs if name.endswith("bf16") == half]
        flat = [[loss for losses in outputs[name] for loss in losses] for name in names]
        gap = max(
            (abs(a - b) for other in flat[1:] for a, b in zip(flat[0], other, strict=True)), default=0.0
        )
        assert gap < (0.2 if half else 1e-4), f"{names} differ by {gap}"
        if len(names) > 1:
            said.append(
                f"{'bf16' if half else 'float32'} losses of {len(flat[0])} candidates within {gap:.1e}"
            )
    return "; ".join(said) or "one side alone"


def limit(given: Any, machine: Mapping[str, float]) -> float:
    """Candidates a second if nothing but the products of their changed ends cost time, at the machine's float32 rate."""
    tail, target = len(given["after"]) + len(given["target"]) - 1, len(given["target"])
    slot = sum(
        SLOT_TOKENS - min(i for i, (a, b) in enumerate(zip(row, part["slot"], strict=True)) if a != b)
        for part in given["rounds"]
        for row in part["candidates"]
    ) / (len(given["rounds"]) * given["width"])
    return machine["flops_fp32"] / (2 * ((slot + tail) * WEIGHTS + target * HEAD))


def job(width: int, steps: int) -> Job:
    """The job at one width; nanoGCG with all candidates in a batch, its default, and with a quarter."""
    return Job(
        name=f"gcg-{width}",
        about=__doc__ or "",
        unit="candidates/s",
        target=1.6,
        inputs=functools.partial(inputs, width, steps),
        sides={
            "temper": Side(functools.partial(temper_side, dtype="float32")),
            "nanogcg": Side(functools.partial(nanogcg_side, dtype="float32", batch_size=None), "nanogcg"),
            "nanogcg-quarter": Side(
                functools.partial(nanogcg_side, dtype="float32", batch_size=width // 4), "nanogcg"
            ),
            "temper-bf16": Side(functools.partial(temper_side, dtype="bfloat16"), counts=False),
            "nanogcg-bf16": Side(
                functools.partial(nanogcg_side, dtype="bfloat16", batch_size=None),
                "nanogcg",
                counts=False,
            ),
        },
        check=check,
        limit=limit,
    )


JOB = job(64, 12)

if __name__ == "__main__":
    main(JOB)
