"""Generation by vLLM, for a base model as it is on disk or on a hub.

vLLM loads weights of its own, so nothing that lives in our process (adapters in memory, hooks,
step rules) can reach it; what it cannot honour is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from temper.core.errors import NeedsError
from temper.core.types import Run
from temper.ops.decode_backends import PromptRow
from temper.ops.hooks import is_hooked
from temper.systems.base import Reply, Sampling, StepRule
from temper.systems.causal_lm import CausalLM

__all__ = ["generate_vllm"]


def generate_vllm(
    system: CausalLM,
    rows: Sequence[PromptRow],
    sampling: Sampling,
    run: Run,
    rules: Sequence[StepRule],
    num_samples: int,
) -> list[Reply]:
    """Replies in the order of `generate`; the draw differs from ours, greedy text may by rounding."""
    vllm = _import_vllm()
    path = system.model.config._name_or_path
    refused = {
        "step rules": bool(rules),
        "hooks": is_hooked(system.model),
        "adapters or changed weights": hasattr(system.model, "peft_config") or "+" in system.spec,
        "exact mode": run.exact,
        "a model without a place on disk or a hub": not path,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise NeedsError(
            f"vLLM cannot run {' and '.join(found)}", where=system.spec, cure='Use engine="auto".'
        )
    dtype = "bfloat16" if run.precision == "bf16" else "float32"
    model = vllm.LLM(model=path, dtype=dtype, seed=sampling.seed, enable_prefix_caching=True)
    wanted = vllm.SamplingParams(
        n=num_samples,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=sorted(system.stop_ids),
    )
    outputs = model.generate([{"prompt_token_ids": row.ids} for row in rows], wanted)
    return [_reply(one, len(row.ids)) for row, out in zip(rows, outputs, strict=True) for one in out.outputs]


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError:
        raise NeedsError('engine="vllm" needs vLLM', cure="pip install vllm") from None
    return vllm


def _reply(output: Any, num_prompt_tokens: int) -> Reply:
    finish: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
    return Reply(output.text, list(output.token_ids), finish, num_prompt_tokens, {})
