"""The decision at the first position, as a StepRule; the rules themselves are `temper.ops.thresholds`.

Columns of K: the refusal tokens in the order of `Controls.names`, then [respond].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import DataError
from temper.ops import thresholds

__all__ = ["COMPARE", "FREE", "Controls", "ReadOut", "RefusalGate", "decide_bias", "decide_columns"]

Array = np.ndarray[Any, np.dtype[Any]]

COMPARE = -1.0
"""As a threshold: refuse iff the refusal token is at least as likely as [respond]."""

FREE = -1
"""As a column: the model's own argmax, which is no control token."""


@dataclass(frozen=True)
class Controls:
    """The control tokens of one fitted model: refusal categories by name, and their ids."""

    refuse: tuple[int, ...]
    names: tuple[str, ...]
    respond: int

    @property
    def ids(self) -> list[int]:
        """Ids in column order."""
        return [*self.refuse, self.respond]

    @classmethod
    def from_json(cls, token_ids: Mapping[str, int]) -> Controls:
        """The controls of a calibration file's `token_ids`."""
        names = tuple(name for name in token_ids if name != "respond")
        return cls(tuple(token_ids[name] for name in names), names, token_ids["respond"])

    def to_json(self) -> dict[str, int]:
        """Ids by name, [respond] last."""
        return {**dict(zip(self.names, self.refuse, strict=True)), "respond": self.respond}

    def column(self, category: str | None) -> int:
        """The column of a label: its refusal token (the only one, if there is one), or [respond] for None."""
        if category is None:
            return len(self.names)
        return 0 if len(self.names) == 1 else self.names.index(category)


class ReadOut(NamedTuple):
    """What the first position says: control probabilities, and the column of the model's own argmax or FREE."""

    p_NK: Array
    top_N: Array

    @property
    def refuse_N(self) -> Array:
        """Probability of any refusal token."""
        return self.p_NK[:, :-1].sum(axis=1)


def decide_columns(read: ReadOut, threshold_C: Array, selected_C: Array, rule: str = "gate") -> Array:
    """The column each row emits under a probability rule; FREE where the model's own argmax is no control token.

    A category that leads without being selected leaves the choice to the model (the released rule).
    """
    selected = np.flatnonzero(selected_C)
    emitted_N = thresholds.decide(read.p_NK, threshold_C, selected.tolist(), rule)
    led_N = selected_C[read.p_NK[:, :-1].argmax(axis=1)]
    return np.where(led_N, emitted_N, read.top_N)


def decide_bias(logits_BV: Tensor, ids: list[int], bias_C: Array) -> Tensor:
    """Argmax over the whole vocabulary of z + b, b on the refusal ids alone; ids, shape (B,)."""
    shifted_BV = logits_BV.float().clone()
    shifted_BV[:, ids[:-1]] += torch.as_tensor(bias_C, dtype=torch.float32, device=logits_BV.device)
    return shifted_BV.argmax(-1)


class RefusalGate:
    """Decides the first token of every row and forbids control tokens afterwards (Departure 5).

    `settings` is the calibration file. Each row's state tells verdict ("refuse", "respond", or "none" where the model
    chose no control token), category, p by name, leak, and forced (not the model's own argmax).
    """

    name = "refusal-tokens"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.controls = Controls.from_json(settings["token_ids"])
        self.rule: str = settings["mode"]
        self.temperature: float = settings["temperature"]
        self.threshold_C = np.array(
            [settings["thresholds"].get(name, COMPARE) for name in self.controls.names]
        )
        self.selected_C = np.array([name in settings["selected"] for name in self.controls.names])

    def start(self, prompt_ids: list[int]) -> dict[str, Any]:
        """An empty state; raises DataError for a control id in the prompt (Departure 6)."""
        found = set(self.controls.ids).intersection(prompt_ids)
        if found:
            raise DataError(
                f"The prompt holds control ids {sorted(found)}",
                cure="Render it with the system's chat: control strings in user text become ordinary tokens there.",
            )
        return {}

    def reply_prefix_ids(self) -> list[int]:
        """What opens an answer that is no refusal: [respond]. An attack's target starts with it."""
        return [self.controls.respond]

    def read(self, logits_BV: Tensor) -> ReadOut:
        """Control probabilities and the model's own choice, from first-position logits."""
        p_BK = thresholds.control_probs(logits_BV, self.controls.ids, self.temperature)
        return ReadOut(p_BK, self.columns(logits_BV.argmax(-1)))

    def columns(self, ids_B: Tensor) -> Array:
        match_BK = ids_B.cpu().numpy()[:, None] == np.array(self.controls.ids)
        return np.where(match_BK.any(axis=1), match_BK.argmax(axis=1), FREE)

    def decide(self, logits_BV: Tensor, read: ReadOut) -> Tensor:
        """The id each row must emit, shape (B,)."""
        if self.rule == "bias":
            return decide_bias(logits_BV, self.controls.ids, self.bias_C)
        column_B = decide_columns(read, self.threshold_C, self.selected_C, self.rule)
        ids_B = torch.as_tensor(np.array(self.controls.ids)[column_B], device=logits_BV.device)
        free_B = torch.as_tensor(column_B == FREE, device=logits_BV.device)
        return torch.where(free_B, logits_BV.argmax(-1), ids_B)

    @property
    def bias_C(self) -> Array:
        """First-position biases that equal the thresholds on q; 0 for unselected categories and COMPARE."""
        return np.array([
            thresholds.bias_from_threshold(min(float(value), 1.0)) if chosen and value != COMPARE else 0.0
            for value, chosen in zip(self.threshold_C, self.selected_C, strict=True)
        ])  # fmt: skip

    def __call__(self, logits_BV: Tensor, position_B: list[int], states: list[dict[str, Any]]) -> Tensor:
        """Logits with the first token decided and later control tokens forbidden."""
        out_BV = logits_BV.clone()
        out_BV[:, self.controls.ids] = -torch.inf
        rows = [row for row, position in enumerate(position_B) if position == 0]
        if not rows:
            return out_BV
        first_BV = logits_BV[rows]
        read = self.read(first_BV)
        chosen_B = self.decide(first_BV, read)
        out_BV[rows] = torch.full_like(first_BV, -torch.inf).scatter(1, chosen_B[:, None], 0.0)
        forced_B = (chosen_B != first_BV.argmax(-1)).tolist()
        for row, column, p_K, forced in zip(rows, self.columns(chosen_B), read.p_NK, forced_B, strict=True):
            states[row].update(self._report(int(column), p_K, forced))
        return out_BV

    def _report(self, column: int, p_K: Array, forced: bool) -> dict[str, Any]:
        names = [*self.controls.names, "respond"]
        respond = len(self.controls.names)
        return {
            "verdict": "none" if column == FREE else "respond" if column == respond else "refuse",
            "category": None if column in (FREE, respond) else names[column],
            "p": {name: float(p) for name, p in zip(names, p_K, strict=True)},
            "leak": float(1 - p_K.sum()),
            "forced": forced,
        }
