"""Embedding 2,000 texts of 4 to 256 tokens with all-MiniLM-L6-v2: temper beside sentence-transformers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from harness import Job, Measured, Side, main, timed
from texts import FLOPS_PER_TOKEN, minilm_folder, paragraphs

NUM_TEXTS = 2000
WARM_UP = 64
SHOWN = 200
"""Vectors that are compared."""


def inputs() -> dict[str, Any]:
    """Texts drawn with a fixed seed."""
    texts = paragraphs()
    random.Random(0).shuffle(texts)
    return {
        "folder": minilm_folder(),
        "texts": texts[:NUM_TEXTS],
        "warm": texts[NUM_TEXTS : NUM_TEXTS + WARM_UP],
    }


def ours(given: Any, precision: Any = "bf16") -> Measured:
    from temper.core.types import Run
    from temper.ops.embed import embed
    from temper.systems.loading import load_base

    system, run = load_base(given["folder"]), Run(precision=precision)
    embed(system, given["warm"], run)
    out_ND, seconds = timed(lambda: embed(system, given["texts"], run))
    return Measured(NUM_TEXTS, seconds, out_ND[:SHOWN].tolist())


def theirs(given: Any, dtype: str, batch_size: int) -> Measured:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(given["folder"], device="cpu", model_kwargs={"torch_dtype": dtype})
    model.encode(given["warm"], batch_size=batch_size)
    out_ND, seconds = timed(lambda: model.encode(given["texts"], batch_size=batch_size))
    return Measured(NUM_TEXTS, seconds, out_ND[:SHOWN].astype("float32").tolist())


def check(outputs: Mapping[str, Any]) -> str:
    """Least cosine of each side with sentence-transformers' float32, or with temper's where that side is left out."""
    base = next(
        name for name in ("sentence-transformers float32", "temper float32", *outputs) if name in outputs
    )
    least = {
        name: min(_cosine(one, other) for one, other in zip(out, outputs[base], strict=True))
        for name, out in outputs.items()
    }
    assert all(value > (0.9999 if "float32" in name else 0.999) for name, value in least.items()), least
    return f"least cosine with {base}: " + ", ".join(f"{name} {value:.6f}" for name, value in least.items())


def _cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5


def limit(given: Any, limits: Mapping[str, float]) -> float:
    """Texts a second if nothing but the layers' matrix products took time, without padding."""
    from temper.systems.loading import load_base

    rows = load_base(given["folder"]).ids(given["texts"])  # type: ignore[attr-defined]
    return limits["flops_bf16"] * NUM_TEXTS / (FLOPS_PER_TOKEN * sum(map(len, rows)))


ENV = "sentence_transformers"
JOB = Job(
    name="embed",
    about="2,000 paragraphs of docstrings, 4 to 256 tokens, to unit vectors of all-MiniLM-L6-v2.",
    unit="texts/s",
    target=1.4,
    inputs=inputs,
    sides={
        "temper": Side(ours),
        "temper float32": Side(lambda given: ours(given, "float32"), counts=False),
        "sentence-transformers float32": Side(lambda given: theirs(given, "float32", 32), ENV),
        "sentence-transformers bf16": Side(lambda given: theirs(given, "bfloat16", 32), ENV),
        "sentence-transformers bf16, batches of 8": Side(lambda given: theirs(given, "bfloat16", 8), ENV),
    },
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
