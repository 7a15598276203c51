"""The 10 nearest of 100,000 vectors of width 384, exactly: temper beside faiss's flat index and torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import Job, Measured, Side, main, threads, timed

NUM_ITEMS, WIDTH, K = 100_000, 384, 10
NUM_QUERIES, ALONE = 16_384, 512
BATCH = 1024
SHOWN = 512
CENTRES = 2000


def inputs() -> dict[str, int]:
    """The vectors are drawn on each side from this seed by the same generator: as JSON they would be 600 MB."""
    return {"seed": 0}


def vectors(given: Any) -> tuple[Any, Any]:
    """Unit vectors scattered around centres, as embeddings are: the corpus and the queries.

    Each side draws them before it imports its library, so the drawing is in nobody's peak.
    """
    import numpy as np

    draw = np.random.default_rng(given["seed"])
    centres = draw.standard_normal((CENTRES, WIDTH), dtype=np.float32)

    def around(num: int) -> Any:
        out = centres[draw.integers(CENTRES, size=num)] + draw.standard_normal((num, WIDTH), dtype=np.float32)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    return around(NUM_ITEMS), around(NUM_QUERIES)


def _measured(search: Any, queries_ND: Any, *, alone: bool) -> Measured:
    """`search` on all queries at once, or on some one by one; it gives scores and indices as lists."""
    search(queries_ND[:32])
    if alone:
        found, seconds = timed(lambda: [search(queries_ND[row : row + 1]) for row in range(ALONE)])
        scores, indices = ([row for part in found for row in part[side].tolist()] for side in (0, 1))
        return Measured(ALONE, seconds, {"scores": scores, "indices": indices})
    found, seconds = timed(lambda: search(queries_ND))
    return Measured(
        NUM_QUERIES, seconds, {"scores": found[0][:SHOWN].tolist(), "indices": found[1][:SHOWN].tolist()}
    )


def ours(given: Any, *, alone: bool = False) -> Measured:
    arrays = vectors(given)
    import torch

    from temper.core.types import Run
    from temper.ops.retrieve import build_index, search

    corpus_MD, queries_ND = map(torch.from_numpy, arrays)
    run = Run(precision="bf16")
    index = build_index(corpus_MD, run)
    return _measured(lambda queries: search(queries, index, K, run), queries_ND, alone=alone)


def faiss(given: Any, *, alone: bool = False) -> Measured:
    corpus_MD, queries_ND = vectors(given)
    import faiss

    faiss.omp_set_num_threads(threads())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(corpus_MD)
    return _measured(lambda queries: index.search(queries, K), queries_ND, alone=alone)


def torch_topk(given: Any) -> Measured:
    """What one writes without a library: a product and a top-k, in batches."""
    arrays = vectors(given)
    import torch

    corpus_MD, queries_ND = map(torch.from_numpy, arrays)

    def search(queries: Any) -> tuple[Any, Any]:
        parts = [(part @ corpus_MD.T).topk(K, dim=1) for part in queries.split(BATCH)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    return _measured(search, queries_ND, alone=False)


def check(outputs: Mapping[str, Any]) -> str:
    """The same ids at every rank, except where scores are equal within float32 rounding."""
    base = outputs["temper"] if "temper" in outputs else next(iter(outputs.values()))
    swapped = 0
    for name, out in outputs.items():
        for row, ids in enumerate(out["indices"]):
            for place, item in enumerate(ids):
                near = abs(out["scores"][row][place] - base["scores"][row][place])
                assert near < 2e-6, (name, row, place, near)
                swapped += item != base["indices"][row][place]
    return f"scores equal to 2e-6 at every rank; {swapped} ids differ, all between scores equal to that"


JOB = Job(
    name="dense-search",
    about="16,384 queries at once against 100,000 unit vectors of width 384, the best 10 of each, exactly.",
    unit="queries/s",
    target=1.0,
    inputs=inputs,
    sides={
        "temper": Side(ours),
        "faiss flat": Side(faiss, "faiss"),
        "torch topk float32": Side(torch_topk),
        "temper one by one": Side(lambda given: ours(given, alone=True), counts=False),
        "faiss flat one by one": Side(lambda given: faiss(given, alone=True), "faiss", counts=False),
    },
    check=check,
    limit=lambda given, limits: limits["flops_bf16"] / (2 * NUM_ITEMS * WIDTH),
)

if __name__ == "__main__":
    main(JOB)
