"""The TOFU report by hand, its undefined cases, the reference, and the logistic toy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.core.errors import ConfigError
from temper.core.types import Message, Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo import metrics, toy
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.method import measure
from temper.methods.unlearning.npo.reference import load_reference, read_rows
from temper.ops import tofu_metrics
from temper.ops.batching import encode
from temper.ops.logprobs import response_logprobs
from temper.store import lines
from temper.store.records import row_record

FAST = {"reply_tokens": 3, "max_rows": 3}


@pytest.fixture(scope="module")
def report(system: Any, people: Data) -> list[Row]:
    return list(measure(system, people, Config(**FAST), Run()))


def one(rows: list[Row], metric: str) -> Row:
    (row,) = [row for row in rows if row.metric == metric and row.item is None]
    return row


def items(rows: list[Row], metric: str) -> dict[str, float]:
    return {row.item: row.value for row in rows if row.metric == metric and row.item is not None}  # type: ignore[misc]


def test_truth_ratio_by_hand() -> None:
    wrong, right = [math.log(0.1), math.log(0.4)], math.log(0.5)
    assert math.exp(metrics.log_truth_ratio(wrong, right, "geometric")) == pytest.approx(0.2 / 0.5)
    assert math.exp(metrics.log_truth_ratio(wrong, right, "arithmetic")) == pytest.approx(0.25 / 0.5)
    assert metrics.forget_truth(math.log(0.4)) == pytest.approx(0.4)
    assert metrics.forget_truth(math.log(2.5)) == pytest.approx(0.4), "min(R, 1/R)"
    assert metrics.kept_truth(math.log(0.4)) == pytest.approx(0.6)
    assert metrics.kept_truth(math.log(3)) == 0, "max(0, 1 - R)"


@given(st.floats(-1e4, 1e4))
def test_departure_8_truth_ratios_never_overflow(log_ratio: float) -> None:
    assert 0 <= metrics.forget_truth(log_ratio) <= 1
    assert 0 <= metrics.kept_truth(log_ratio) <= 1
    assert math.isfinite(metrics.log_truth_ratio([log_ratio, -log_ratio], 0.0, "arithmetic"))


def test_memorisation_by_hand() -> None:
    def strength(*greedy: bool) -> float:
        return metrics.extraction_strength(torch.tensor(greedy))

    assert strength(True, True, True, True) == 1
    assert strength(False, True, True, True) == 0.75, "from the second token on all is greedy: k = 1"
    assert strength(True, True, False, True) == 0.25
    assert strength(True, True, True, False) == 0


def test_privleak_by_hand() -> None:
    assert metrics.privleak(1.0, 0.5) == -100, "still fully recognised as a member"
    assert metrics.privleak(0.5, 0.5) == 0
    assert metrics.privleak(0.25, 0.5) == 50
    assert metrics.privleak(0.5, 1.0) is None


def test_forget_quality_is_a_ks_test_and_blind_to_direction() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(2, size=40)
    quality = metrics.forget_quality(list(a), list(b))
    assert quality.p < 1e-6
    assert quality.log10_p == pytest.approx(math.log10(quality.p))
    assert metrics.forget_quality(list(-a), list(-b)).p == pytest.approx(quality.p), "R or 1/R"
    assert metrics.forget_quality(list(a), list(a)).p == 1


def test_split_scores_are_what_the_model_says(system: Any, people: Data) -> None:
    record: Any = people["forget"][0]
    scores = metrics.split_scores(system, [record], "forget", Config(), Run())

    def mean(reply: str) -> float:
        return float(
            response_logprobs(system, [encode(system, (record.prompt, reply))], reduce="mean", run=Run())
        )

    assert scores["probability"][0] == pytest.approx(math.exp(mean(record.reply)), rel=1e-4)
    wrong = [mean(answer) for answer in record.extra["perturbed_answer"]]
    expected = sum(wrong) / len(wrong) - mean(record.extra["paraphrased_answer"])
    assert scores["log_truth_ratio"][0] == pytest.approx(expected, abs=1e-4)
    fact: Any = people["world_facts"][0]
    record = fact
    found = metrics.split_scores(system, [fact], "world_facts", Config(), Run())
    wrong = [mean(answer) for answer in fact.extra["perturbed_answer"]]
    share = math.exp(mean(fact.reply)) / (math.exp(mean(fact.reply)) + sum(map(math.exp, wrong)))
    assert found["probability"][0] == pytest.approx(share, rel=1e-4)
    assert found["log_truth_ratio"][0] == pytest.approx(sum(wrong) / 5 - mean(fact.reply), abs=1e-4), (
        "the plain answer"
    )


def test_answers_do_not_depend_on_how_many_positions_are_read_at_once(
    system: Any, people: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [encode(system, record, train_on="last") for record in people["forget"]]
    whole = metrics.answer_tokens(system, rows, Run())
    monkeypatch.setattr("temper.ops.logprobs.CHUNK_LOGITS", 7 * system.num_embeddings)
    for answer, chunked, row in zip(whole, metrics.answer_tokens(system, rows, Run()), rows, strict=True):
        assert len(answer.logp_T) == sum(row.scored)
        assert torch.allclose(chunked.logp_T, answer.logp_T, atol=1e-5)
        assert torch.equal(chunked.greedy_T, answer.greedy_T)
        with torch.no_grad():
            logits_TV = system.model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        logp_TV, scored = logits_TV.log_softmax(-1), torch.tensor(row.scored[1:])
        target_T = torch.tensor(row.ids[1:])
        assert torch.allclose(
            answer.logp_T, logp_TV[torch.arange(len(target_T)), target_T][scored], atol=1e-5
        )
        assert torch.equal(answer.greedy_T, (logp_TV.argmax(-1) == target_T)[scored])


def test_report_has_items_and_means(report: list[Row]) -> None:
    for split in ("forget", "retain", "holdout", "neighbours", "world_facts"):
        for metric in ("probability", "rouge", "truth_ratio", "repetition", "exact_memorisation"):
            values = items(report, f"{split}_{metric}")
            assert len(values) == 3
            assert one(report, f"{split}_{metric}").value == pytest.approx(sum(values.values()) / 3)
    assert one(report, "forget_truth_ratio").higher_is_better
    assert one(report, "forget_probability").higher_is_better is False


def test_utility_is_0_when_one_number_is_0_and_none_when_one_is_missing(system: Any, people: Data) -> None:
    splits = ("retain", "neighbours", "world_facts")
    full = {(split, metric): 0.5 for split in splits for metric in ("probability", "rouge", "truth_ratio")}
    assert metrics.utility_row(full).value == pytest.approx(0.5)
    full["retain", "rouge"] = 0.25
    assert metrics.utility_row(full).value == pytest.approx(9 / (8 / 0.5 + 1 / 0.25))
    full["retain", "rouge"] = 0.0
    assert metrics.utility_row(full).value == 0
    del full["retain", "rouge"]
    assert metrics.utility_row(full).value is None
    assert "retain rouge" in metrics.utility_row(full).note


def test_no_reference_no_p_value(report: list[Row]) -> None:
    for metric in ("forget_quality", "forget_quality_log10_p", "privleak"):
        row = one(report, metric)
        assert row.value is None
        assert "no retain-only model" in row.note
    assert 0 <= (one(report, "membership_auc").value or 0) <= 1


def test_reference_from_rows_and_from_a_system_agree(
    system: Any, people: Data, report: list[Row], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    with lines.LineWriter(file) as writer:
        for row in report:
            writer.write(row_record(row))
    found = [
        list(measure(system, people, Config(**FAST, reference=name), Run()))
        for name in (str(file), "tiny:llama")
    ]
    for rows in found:
        assert one(rows, "forget_quality").value == 1, "the model beside itself"
        assert one(rows, "forget_quality_log10_p").value == 0
        assert one(rows, "privleak").value == pytest.approx(0)
    other = list(measure(system, people, Config(**FAST, reference="tiny:llama:1"), Run()))
    assert one(other, "forget_quality").value is not None
    assert (one(other, "forget_quality").value or 0) <= 1


def test_a_reference_without_rows_is_an_error(system: Any, people: Data, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines.encode({"metric": "f1", "value": 1.0}))
    with pytest.raises(ConfigError, match="hold no item of 'forget_log_truth_ratio'"):
        read_rows(tmp_path / "rows.jsonl")
    for name in (str(tmp_path / "missing.jsonl"), str(tmp_path / "nothing")):
        with pytest.raises(ConfigError):
            load_reference(Config(reference=name), system, people, Run(), metrics.split_scores)


def test_rows_without_wrong_answers_have_no_truth_ratio(system: Any) -> None:
    data = Data({"forget": [Dialogue((Message("user", "Who?"), Message("assistant", "Me.")), id="a")]})
    rows = list(measure(system, data, Config(reply_tokens=0), Run()))
    assert one(rows, "forget_truth_ratio").value is None
    assert "perturbed_answer" in one(rows, "forget_truth_ratio").note
    assert one(rows, "forget_probability").value is not None
    assert not items(rows, "forget_rouge"), "no generation was asked for"


def test_departure_3_replies_are_greedy(system: Any, people: Data) -> None:
    first, second = (
        tofu_metrics.fluency_rows(system, people["forget"][:2], "forget", 5, Run(seed=seed))[0]
        for seed in (0, 1)
    )
    assert [reply.ids for reply in first] == [reply.ids for reply in second]


# ---- the toy


@pytest.fixture(scope="module")
def problem() -> toy.Problem:
    return toy.build(1000, 20_000)


def test_toy_target_is_fitted(problem: toy.Problem) -> None:
    learnt, unseen = (
        toy.answer_logp(problem.forget_NF, problem.forget_sign_N, a).mean()
        for a in (problem.target_F, problem.retain_only_F)
    )
    assert learnt > unseen + 0.2, "only the target has seen the forget rows"
    assert toy.retain_kl(problem, problem.retain_only_F) == pytest.approx(0, abs=1e-12)
    away = problem.target_F.clone().requires_grad_()
    assert toy.retain_kl(problem, away.detach()) > 0


def test_toy_ga_diverges_steadily_and_npo_slows_down(problem: toy.Problem) -> None:
    ga, npo = (toy.unlearn(problem, loss, 6000) for loss in toy.LOSSES)
    half = len(ga.step) // 2
    assert ga.drift[-1] / ga.drift[half] > 1.8, "linear in time"
    assert npo.drift[-1] / npo.drift[half] < 1.4, "logarithmic in time"
    first = toy.FIRST_STEPS // toy.EVAL_EVERY
    assert ga.kl[first] > 10 * npo.kl[first]
    assert all(later > earlier for earlier, later in zip(ga.kl[first:], ga.kl[first + 1 :], strict=False))
    gains = np.diff(np.array(npo.kl)[:: len(npo.kl) // 4])
    assert gains[-1] < gains[-2] < gains[-3], "NPO's distance grows ever more slowly"


def test_toy_gradient_by_hand(problem: toy.Problem) -> None:
    """One pretraining step from 0 is lr * mean(sign / 2 * features)."""
    a_F = toy._pretrain(problem.forget_NF, problem.forget_sign_N, 1)
    expected = 0.05 * (problem.forget_sign_N[:, None] / 2 * problem.forget_NF).mean(0)
    assert torch.allclose(a_F, expected)


def test_toy_rows_and_curves() -> None:
    config = Config(toy=True, toy_seeds=(1, 2), toy_pretrain_steps=300, toy_steps=100)
    rows, figures = toy.measure(config, Run())
    assert {row.item for row in rows} == {"toy seed 1", "toy seed 2"}
    assert set(items(rows, "toy_retain_kl_gap")) == {"toy seed 1", "toy seed 2"}
    for curve in figures["curves"].values():
        assert set(curve["lines"]) == {"ga", "npo"}
        assert len(curve["lines"]["npo"]["x"]) == len(curve["lines"]["npo"]["low"]) == 5
    again, _ = toy.measure(config, Run(seed=7))
    assert rows == again, "the toy has its own seeds"
