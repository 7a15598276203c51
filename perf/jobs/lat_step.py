"""A round of latent adversarial training (attack, then updates under it) beside the passes it is made of.

A round of `attack_steps` A and `model_steps` M on N items is counted as A passes of the rows that the attack reads (2N: bad
and good replies) and M passes of the rows that the defence reads (3N: bad, good and benign ones). A pass is one plain
forward and backward pass of those rows, cross-entropy of their replies, without hooks, perturbation or optimiser. Not in
the count, so all of it is overhead: the passes without gradient (the attack's last loss, the starting model's
distributions for KL), the attack's own steps and projections, away losses, clipping, the model's optimiser.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main, timed
from latent_steps import agree, pairs_and_benign, pass_seconds, prepared

ATTACK_STEPS, MODEL_STEPS, ROUNDS = 16, 4, 1


def inputs() -> Any:
    """Sizes; every side draws the same rows."""
    return {"items": 4, "attack_steps": ATTACK_STEPS, "model_steps": MODEL_STEPS, "rounds": ROUNDS}


def config_of(given: Any, **changes: Any) -> Any:
    """The method's defaults: five sites, both losses on both sides, KL, LoRA of rank 64."""
    from temper.methods.hardening.lat.card import Config

    plain = {name: given[name] for name in ("attack_steps", "model_steps")}
    return Config(**plain, batch_rows=given["items"], num_rounds=given["rounds"], **changes)


def temper(given: Any) -> Measured:
    """`train_rounds` as `fit` calls it; rows, radii and adapters stand before the clock starts."""
    from dataclasses import replace

    from temper.artefacts import tuning
    from temper.core.types import Run
    from temper.methods.hardening.lat import method
    from temper.methods.hardening.lat.rows import attacked_items, benign_rows, search_of, with_benign
    from temper.ops.latent_objective import train_rounds

    system, run, config = prepared(), Run(precision="bf16"), config_of(given)
    data = pairs_and_benign(given["items"])
    items, benign = attacked_items(system, data, config, run), benign_rows(system, data, config)
    search = search_of(system, items, config, run)

    with tuning(system, method._tune(config, run), run) as tuned:

        def fit(config: Any, search: Any) -> Any:
            return train_rounds(
                tuned.system.model,
                tuned.parameters(),
                lambda epoch: with_benign(items, benign, config, run.seed, 0),
                method.objective_of(tuned.system, config, search, tuned.reference, run.seed),
                method._train_settings(config),
                run,
            )

        warm = config_of(given | {"attack_steps": 1, "model_steps": 1, "rounds": 1})
        before = fit(warm, replace(search, num_steps=1)).terms["attack_before"][0]
        _, seconds = timed(lambda: fit(config, search))
    return Measured(given["rounds"], seconds, {"loss": before})


def passes(packed: bool) -> Any:
    """The count of passes times the time of one."""

    def run(given: Any) -> Measured:
        from temper.artefacts import tuning
        from temper.core.types import Run
        from temper.methods.hardening.lat import method
        from temper.methods.hardening.lat.rows import attacked_items, benign_rows, with_benign

        system, run, config = prepared(), Run(precision="bf16"), config_of(given)
        data = pairs_and_benign(given["items"])
        items, benign = attacked_items(system, data, config, run), benign_rows(system, data, config)
        items = with_benign(items, benign, config, run.seed, 0)
        attacked = [item.row(kind) for kind in ("bad", "good") for item in items]
        defended = [*attacked, *(row for item in items for row in item.benign)]
        with tuning(system, method._tune(config, run), run) as tuned:
            attack, loss = pass_seconds(tuned.system, attacked, run, packed, both=True)
            defence, _ = pass_seconds(tuned.system, defended, run, packed)
        seconds = given["attack_steps"] * attack + given["model_steps"] * defence
        return Measured(1, seconds, {"loss": loss}, {"attack_s": attack, "defence_s": defence})

    return run


JOB = Job(
    name="lat-step",
    about=__doc__ or "",
    unit="s/round",
    target=1.2,
    lower_is_better=True,
    inputs=inputs,
    sides={
        "temper": Side(temper),
        "passes": Side(passes(packed=False)),
        "passes, packed": Side(passes(packed=True), counts=False),
    },
    check=agree,
)

if __name__ == "__main__":
    main(JOB)
