"""What the jobs on training under attack share: their rows, and the time of one plain pass of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import model_folder, timed

REPEATS = 3
UNSURE = "I am sorry, but I do not know anything about that person."


def prepared() -> Any:
    """The system that both sides train."""
    from temper.systems.loading import load_base

    return load_base(model_folder())


def pairs_and_benign(num: int) -> Any:
    """Questions about invented people: the bad reply tells, the good one does not; as many ordinary rows."""
    from temper.data.loading import load_data
    from temper.data.schemas import Data, Preference

    people = load_data("builtin:people")
    told = people["forget"][:num]
    train = [Preference(record.prompt, UNSURE, record.reply, id=record.id) for record in told]
    return Data({"train": train, "benign": people["retain"][:num], "utility": people["retain"]}, "people")


def pass_seconds(
    system: Any, rows: Sequence[Any], run: Any, packed: bool, *, both: bool = False
) -> tuple[float, float]:
    """Seconds of a forward and backward pass of the rows' cross-entropy, and what the attack loses without a perturbation.

    Padded rows, as a perturbation needs them; or `packed` as `train` reads them: end to end, shared beginnings once.
    `both` counts the second half of the rows as those that the attack moves away from.
    """
    import torch

    from temper.ops.batching import collate
    from temper.ops.logprobs import score_batch
    from temper.ops.precision import autocast, short_attention
    from temper.ops.toward_away import away_tokens, mean_rows, score_tokens

    model, batch = system.model, collate(rows, system.pad_id)

    def once() -> None:
        with short_attention("cpu", max(len(row.ids) for row in rows)):
            with autocast(run):
                scored = score_batch(model, batch) if packed else score_tokens(model, batch)
                loss = -scored.logp_S.mean()
            loss.backward()
        model.zero_grad(set_to_none=True)

    once()
    _, seconds = timed(lambda: [once() for _ in range(REPEATS)])
    with torch.no_grad(), autocast(run):
        scores = score_tokens(model, batch)
        toward_B = mean_rows(-scores.logp_S, scores)
        away_B = mean_rows(away_tokens(scores), scores)
    half = len(rows) // 2
    loss_B = 0.5 * toward_B[:half] + 0.5 * away_B[half:] if both else toward_B
    return seconds / REPEATS, float(loss_B.mean())


def agree(outputs: Mapping[str, Any]) -> str:
    """The attack's loss without a perturbation is what the plain pass gives."""
    found = [out["loss"] for out in outputs.values()]
    worst = max(abs(value - found[0]) for value in found)
    assert worst < 0.02, found
    return f"losses without a perturbation equal to {worst:.0e} nats a token"
