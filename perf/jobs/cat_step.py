"""A step of continuous adversarial training (C-AdvUL: attack, then one update) beside the passes it is made of.

A step of `attack_steps` A on N adversarial rows with U utility rows each is counted as A passes of the N rows that the attack
reads (bad replies) and one pass of the (2 + U) N rows that the defence reads (bad, good and utility ones). A pass is one
plain forward and backward pass of those rows, cross-entropy of their replies, without hooks, perturbation or optimiser; with
the adapters' dropout, as the update has it. Not in the count, so all of it is overhead: the attack's last loss (a pass
without gradient), its own steps and projections, away losses, clipping, the model's optimiser.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Job, Measured, Side, main, timed
from latent_steps import agree, pairs_and_benign, pass_seconds, prepared

ATTACK_STEPS, ITEMS, STEPS = 10, 2, 3


def inputs() -> Any:
    """Sizes; every side draws the same rows."""
    return {"items": ITEMS, "attack_steps": ATTACK_STEPS, "steps": STEPS}


def config_of(given: Any) -> Any:
    """The method's defaults: ten sign steps, seven utility rows a row, LoRA of rank 64 with dropout."""
    from temper.methods.hardening.continuous_at.card import Config

    return Config(
        attack_steps=given["attack_steps"],
        batch_rows=given["items"],
        max_steps=given["steps"],
        attack_lr=1e-3,
    )


def rows_of(given: Any, config: Any, run: Any) -> tuple[Any, Any]:
    """The system, and its items with their utility rows."""
    from temper.methods.hardening.continuous_at import method

    system, data = prepared(), pairs_and_benign(given["items"])
    items = method.adversarial_items(system, data["train"], config, run)
    return system, method._with_utility(items, method._utility(system, data, config), config, run.seed, 0)


def temper(given: Any) -> Measured:
    """`train_rounds` as `fit` calls it; rows and adapters stand before the clock starts."""
    from dataclasses import replace

    from temper.artefacts import tuning
    from temper.core.types import Run
    from temper.methods.hardening.continuous_at import method
    from temper.ops.latent_objective import train_rounds

    config, run = config_of(given), Run(precision="bf16")
    system, items = rows_of(given, config, run)
    with tuning(system, method._tune(config, run), run) as tuned:
        method._use_dropout(tuned.system.model)

        def fit(config: Any) -> Any:
            return train_rounds(
                tuned.system.model,
                tuned.parameters(),
                lambda epoch: items,
                method.objective_of(tuned.system, config, tuned),
                method._train_settings(config),
                run,
            )

        before = fit(replace(config, attack_steps=1, max_steps=1)).terms["attack_before"][0]
        _, seconds = timed(lambda: fit(config))
    return Measured(given["steps"], seconds, {"loss": before})


def passes(packed: bool) -> Any:
    """The count of passes times the time of one."""

    def run(given: Any) -> Measured:
        from temper.artefacts import tuning
        from temper.core.types import Run
        from temper.methods.hardening.continuous_at import method

        config, run = config_of(given), Run(precision="bf16")
        system, items = rows_of(given, config, run)
        attacked = [item.bad for item in items]
        defended = [*attacked, *(item.row("good") for item in items)]
        defended += [row for item in items for row in item.benign]
        with tuning(system, method._tune(config, run), run) as tuned:
            _, loss = pass_seconds(tuned.system, attacked, run, packed)
            method._use_dropout(tuned.system.model)
            attack, _ = pass_seconds(tuned.system, attacked, run, packed)
            defence, _ = pass_seconds(tuned.system, defended, run, packed)
        seconds = given["attack_steps"] * attack + defence
        return Measured(1, seconds, {"loss": loss}, {"attack_s": attack, "defence_s": defence})

    return run


JOB = Job(
    name="cat-step",
    about=__doc__ or "",
    unit="s/step",
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
