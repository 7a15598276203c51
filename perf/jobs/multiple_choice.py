"""Log-likelihoods of 4 choices to each of 8 questions about a passage, float32: temper and lm-evaluation-harness.

The passages are the facts of a made-up person. Both sides begin with text, so tokenising is timed on both.
lm-evaluation-harness reads 8 requests at a time; of 1, 4, 8, 16 and 32 only 16 was faster, by 4 %, on a tenth of the requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import Job, Measured, Side, main, model_folder, timed

NUM_PASSAGES = 25
QUESTIONS = 8
CHOICES = 4
BATCH = 8


def inputs() -> dict[str, Any]:
    """Questions as (context, choices), a passage's together."""
    from itertools import takewhile

    from temper.data.loading import load_data
    from temper.data.schemas import Dialogue

    facts: dict[str, list[Dialogue]] = {}
    for row in load_data("builtin:people").records("retain", Dialogue):
        facts.setdefault(str(row.extra["person"]), []).append(row)
    questions = []
    for rows in list(facts.values())[: NUM_PASSAGES + 1]:
        passage = " ".join(row.reply for row in rows)
        for row in rows[:QUESTIONS]:
            extra: Any = row.extra
            answers = [extra["paraphrased_answer"], *extra["perturbed_answer"]][:CHOICES]
            letters = takewhile(lambda same: len(set(same)) == 1, zip(*answers, strict=False))
            shared = len("".join(same[0] for same in letters).rsplit(" ", 1)[0])
            context = f"{passage}\nQuestion: {extra['paraphrased_question']}\nAnswer: {answers[0][:shared]}"
            questions.append({"context": context, "choices": [answer[shared:] for answer in answers]})
    return {"model": model_folder(), "warm_up": questions[-QUESTIONS:], "questions": questions[:-QUESTIONS]}


def temper(given: Any) -> Measured:
    """`encode_choices` and `choice_logprobs`."""
    from temper.core.types import Run
    from temper.ops.choices import choice_logprobs, encode_choices
    from temper.systems.loading import load_base

    system = load_base(given["model"])

    def work(questions: Any) -> list[list[float]]:
        items = [
            encode_choices(system, asked["context"], asked["choices"], delimiter="") for asked in questions
        ]
        return [logp_K.tolist() for logp_K in choice_logprobs(system, items, Run())]

    work(given["warm_up"])
    found, seconds = timed(lambda: work(given["questions"]))
    return Measured(sum(map(len, found)), seconds, found)


def harness_lm(given: Any) -> Measured:
    """`HFLM.loglikelihood`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=given["model"], device="cpu", dtype="float32", batch_size=BATCH)

    def work(questions: Any) -> list[list[float]]:
        pairs = [(asked["context"], choice) for asked in questions for choice in asked["choices"]]
        rows = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        values = [value for value, _ in lm.loglikelihood(rows, disable_tqdm=True)]
        return [values[start : start + CHOICES] for start in range(0, len(values), CHOICES)]

    work(given["warm_up"])
    found, seconds = timed(lambda: work(given["questions"]))
    return Measured(sum(map(len, found)), seconds, found)


def check(outputs: Mapping[str, Any]) -> str:
    """Every value to 1e-4 nats and a hundred-thousandth of itself, and the same choice of each question."""
    sides = list(outputs.values())
    pairs = [(a, b) for side in sides[1:] for a, b in zip(sides[0], side, strict=True)]
    values = [(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    worst = max((abs(x - y) for x, y in values), default=0.0)
    assert all(abs(x - y) <= 1e-4 + 1e-5 * abs(x) for x, y in values), (
        f"log-likelihoods differ by {worst:.1e}"
    )
    assert all(a.index(max(a)) == b.index(max(b)) for a, b in pairs), "choices differ"
    return f"{len(sides[0])} identical choices, log-likelihoods of up to {max((abs(x) for x, _ in values), default=0.0):.0f} nats within {worst:.1e}"


def limit(given: Any, machine: Mapping[str, float]) -> float:
    """Every passage, question and choice once; the vocabulary at the choices' tokens. Four characters a token."""
    groups = [
        given["questions"][start : start + QUESTIONS]
        for start in range(0, len(given["questions"]), QUESTIONS)
    ]
    passages = sum(len(group[0]["context"].split("\n")[0]) for group in groups)
    asked = sum(len(question["context"].split("\n", 1)[1]) for group in groups for question in group)
    scored = sum(len(choice) for group in groups for question in group for choice in question["choices"])
    work = (passages + asked + scored) / 4 * 2 * 106.2e6 + scored / 4 * 2 * 28.3e6
    return len(given["questions"]) * CHOICES / (work / machine["flops_fp32"])


JOB = Job(
    name="multiple-choice",
    about=__doc__ or "",
    unit="requests/s",
    target=5.0,
    inputs=inputs,
    sides={"temper": Side(temper), "lm-evaluation-harness": Side(harness_lm, env="lm_eval")},
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
