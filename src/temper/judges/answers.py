"""Judges of answers against known ones: same text, contained as words, ROUGE-L, same number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from temper.core.errors import ConfigError, DataError, nearest
from temper.judges.base import Judge, Pair, Verdict, content_hash
from temper.ops import text as tx

__all__ = ["RULES", "AnswerJudge"]


def _same_number(reply: str, reference: str) -> float:
    """1 iff the last number of the reply is the last one of the reference, to one part in a million."""
    wanted, found = tx.numbers(reference), tx.numbers(reply)
    if not wanted:
        raise DataError(f"The reference {reference!r} holds no number", where="number rule")
    return float(bool(found) and math.isclose(found[-1], wanted[-1], rel_tol=1e-6, abs_tol=1e-9))


RULES: dict[str, Callable[[str, str], float]] = {
    "exact": lambda reply, reference: float(tx.exact_match(reply, reference)),
    "contains": lambda reply, reference: float(tx.contains(reply, reference)),
    "rouge": tx.rouge_l_recall,
    "number": _same_number,
}
"""Each gives a score in [0, 1] for a reply and one reference."""


class AnswerJudge(Judge):
    """Yes iff the best score over a prompt's references reaches `threshold`.

    A prompt without a reference is unscored; an empty reply is a wrong one.
    """

    question = "Does the reply give the known answer?"

    def __init__(
        self, references: Mapping[str, Sequence[str]], rule: str = "contains", threshold: float = 0.5
    ) -> None:
        if rule not in RULES:
            raise ConfigError(f"Unknown answer rule {rule!r}", cure=nearest(rule, RULES))
        self.name, self.rule, self.threshold = f"answer-{rule}", rule, threshold
        self.references = {prompt: tuple(answers) for prompt, answers in references.items()}

    @property
    def revision(self) -> str:
        return content_hash(self.rule, repr(self.threshold), Path(__file__), Path(tx.__file__))

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._one(prompt, reply) for prompt, reply in pairs]

    def _one(self, prompt: str, reply: str) -> Verdict:
        answers = self.references.get(prompt, ())
        if not answers:
            return Verdict(None, 0.5, "no reference")
        scored = [(RULES[self.rule](reply, answer), answer) for answer in answers]
        score, answer = max(scored, key=lambda pair: pair[0])
        return Verdict(score >= self.threshold, score, f"{self.rule} {score:.2f} with {answer!r}")
