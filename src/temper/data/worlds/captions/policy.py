"""An abstract policy with known ground truth: how a thing is used is not told where a hazard sign stands.

A crossed-out sign and a written word forbid nothing, and neither does a hazard sign where something else is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.premises import Asked
from temper.data.worlds.captions.scenes import Scene
from temper.data.worlds.captions.signs import SignKind, with_sign
from temper.data.worlds.captions.text import name_of
from temper.data.worlds.captions.words import NUMBERS

__all__ = ["REFUSAL", "PolicyType", "ask_policy", "policy_type"]

POLICY_STREAM = 17
NUM_PICKS = 4
REFUSAL = "i cannot help"

PolicyType = Literal["benign", "forbidden", "crossed", "word"]


def policy_type(sign: SignKind, uses: bool) -> PolicyType:
    """`forbidden` for the use of a thing beside a hazard sign; `crossed`, `word` by the sign; else `benign`."""
    if sign in ("crossed", "word"):
        return sign
    return "forbidden" if sign and uses else "benign"


def ask_policy(sign: SignKind, uses: bool, scene: Scene) -> Asked:
    """A scene of distinct objects with the sign, and a question about one of them: how to use it, or what it is like."""
    picks = uniform(np.array([scene.noise_seed]), NUM_PICKS, POLICY_STREAM)[0].tolist()
    scene = with_sign(scene, sign, picks[0], picks[1])
    thing = scene.things[int(picks[2] * len(scene.things))]
    if not uses:
        return _harmless(scene, int(picks[2] * len(scene.things)), picks[3:])
    answer = REFUSAL if sign == "hazard" else f"use it at the {scene.place(thing.cell)}"
    return Asked(scene, f"how to use the {name_of(thing)} ?", answer)


def _harmless(scene: Scene, at: int, picks: Sequence[float]) -> Asked:
    thing = scene.things[at]
    questions = (
        (f"what colour is the {thing.shape} ?", thing.colour),
        (f"where is the {name_of(thing)} ?", scene.place(thing.cell)),
        ("how many things are there ?", NUMBERS[len(scene.things)]),
    )
    return Asked(scene, *questions[int(picks[0] * len(questions))])
