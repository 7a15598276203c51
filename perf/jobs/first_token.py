"""Logits of the first reply token to 240 chat prompts with one system prompt, float32: temper and transformers.

transformers pads to the left, sorts by length and projects the last position only, 16 prompts at a time; other batch
sizes were not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import Job, Measured, Side, main, model_folder, timed

NUM_PROMPTS = 240
BATCH = 16
KEPT = 32
"""Prompts of which all logits are compared; of the others the best token and its logit."""


def inputs() -> dict[str, Any]:
    """Requests in the model's chat template, whose own system prompt stands before each."""
    from temper.core.types import Message
    from temper.data.loading import load_data
    from temper.data.schemas import Behaviour
    from temper.systems.loading import load_base

    system = load_base("smollm2-135m")
    rows = load_data("builtin:behaviours").records("test", Behaviour)[:NUM_PROMPTS]
    prompts = [list(system.chat.prompt([Message("user", row.prompt)]).ids) for row in rows]
    return {"model": model_folder(), "prompts": prompts}


def temper(given: Any) -> Measured:
    """`next_token_logits`."""
    from temper.core.types import Run
    from temper.ops.logprobs import next_token_logits
    from temper.systems.loading import load_base

    system = load_base(given["model"])
    next_token_logits(system, [[5, 6, 7], [8, 9]], Run())
    logits_NV, seconds = timed(lambda: next_token_logits(system, given["prompts"], Run()))
    return _measured(logits_NV, seconds)


def transformers(given: Any) -> Measured:
    """Left-padded batches of prompts sorted by length, `logits_to_keep=1`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()

    @torch.inference_mode()
    def work(prompts: list[list[int]]) -> torch.Tensor:
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        found: list[Any] = [None] * len(prompts)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            longest = len(prompts[rows[0]])
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[place, longest - len(prompts[row]) :] = 1
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=1
            )
            for row, logits in zip(rows, out.logits[:, 0], strict=True):
                found[row] = logits
        return torch.stack(found)

    work([[5, 6, 7], [8, 9]])
    logits_NV, seconds = timed(lambda: work(given["prompts"]))
    return _measured(logits_NV, seconds)


def _measured(logits_NV: Any, seconds: float) -> Measured:
    top = logits_NV.max(1)
    kept = logits_NV[:KEPT, ::97].tolist()
    return Measured(
        len(logits_NV), seconds, {"kept": kept, "top": top.indices.tolist(), "best": top.values.tolist()}
    )


def check(outputs: Mapping[str, Any]) -> str:
    """The same best token everywhere, and logits to 1e-3."""
    sides = list(outputs.values())
    worst = 0.0
    for side in sides[1:]:
        assert side["top"] == sides[0]["top"], "best tokens differ"
        for a, b in zip([*sides[0]["kept"], sides[0]["best"]], [*side["kept"], side["best"]], strict=True):
            worst = max(worst, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    assert worst <= 1e-3, f"logits differ by {worst:.1e}"
    return f"the same best tokens, logits within {worst:.0e}"


def limit(given: Any, machine: Mapping[str, float]) -> float:
    """What all prompts begin with once, the rest of each through the layers, one position each to the vocabulary."""
    shared = next(n for n, ids in enumerate(zip(*given["prompts"], strict=False)) if len(set(ids)) > 1)
    tokens = shared + sum(len(ids) - shared for ids in given["prompts"])
    work = tokens * 2 * 106.2e6 + len(given["prompts"]) * 2 * 28.3e6
    return len(given["prompts"]) / (work / machine["flops_fp32"])


JOB = Job(
    name="first-token",
    about=__doc__ or "",
    unit="prompts/s",
    target=2.0,
    inputs=inputs,
    sides={"temper": Side(temper), "transformers": Side(transformers, env="transformers")},
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
