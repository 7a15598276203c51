"""Pairs of rows, what is scored, the reference's identity, and what a fit changes and leaves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from temper.artefacts import tuning
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo import training
from temper.methods.unlearning.npo.conftest import objective_of, quick, slow_logp
from temper.methods.unlearning.npo.method import fit
from temper.methods.unlearning.npo.objective import Pair
from temper.ops.batching import encode
from temper.ops.logprobs import response_logprobs
from temper.systems.loading import load_base


def test_answers_are_sums_and_the_end_of_turn_counts(system: Any) -> None:
    record = Dialogue((Message("user", "Who?"), Message("assistant", "Me.")), id="a")
    row = encode(system, record, train_on="last")
    scored = [token for token, flag in zip(row.ids, row.scored, strict=True) if flag]
    assert scored[-1] in system.stop_ids
    assert len(scored) > 2
    items = [Pair(row, retain=row)]
    answers = objective_of(system, "npo+rt")._score(system.model, items)
    total = slow_logp(load_base("tiny:llama").model.double(), row).sum().item()
    assert answers["forget"].logp_B.item() == pytest.approx(total, rel=1e-5)
    assert answers["forget"].num_tokens_B.item() == len(scored)


def test_an_epoch_is_every_forget_row_once_with_seeded_retain_rows(system: Any, people: Data) -> None:
    rows = training.prepare(system, people, quick(loss="npo+rt"), Run())
    epochs = [training.pairs(rows, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all([pair.forget for pair in epoch] == rows.forget for epoch in epochs)
    drawn = [[pair.retain for pair in epoch] for epoch in epochs]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or drawn[0] != drawn[3]
    assert all(row in rows.retain for epoch in drawn for row in epoch)


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_a_wrong_reference_is_noticed(
    system: Any, people: Data, caplog: pytest.LogCaptureFixture, shift: float
) -> None:
    config = quick(loss="npo", max_steps=2)
    rows = training.prepare(system, people, config, Run())
    rows = rows._replace(forget_ref=rows.forget_ref - shift)
    with caplog.at_level(logging.WARNING), tuning(system, training.tune(config, Run()), Run()) as tuned:
        log, _ = training.unlearn(tuned, rows, config, Run())
    num_tokens = sum(sum(row.scored) for row in rows.forget) / len(rows.forget)
    assert log.terms["log_ratio"][0] == pytest.approx(shift / num_tokens, rel=0.5, abs=1e-4)
    assert ("not the model that unlearning starts from" in caplog.text) == (shift > 0)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["npo+kl", "kto+rt", "simnpo", "ga+fkl"])
def test_fit_forgets_and_leaves_the_base_alone(people: Data, mode: str, name: str) -> None:
    system = load_base("tiny:llama")
    before = {key: value.clone() for key, value in system.model.state_dict().items()}
    rows = [encode(system, record, train_on="last") for record in people["forget"]]
    start = response_logprobs(system, rows, run=Run()).sum()
    artefact = fit(system, people, quick(loss=name, mode=mode, beta=0.5), Run())
    assert all(torch.equal(value, before[key]) for key, value in system.model.state_dict().items())
    with artefact.apply(system) as changed:
        assert response_logprobs(changed, rows, run=Run()).sum() < start


def test_learning_then_unlearning_starts_from_the_target(
    people: Data, caplog: pytest.LogCaptureFixture
) -> None:
    system = load_base("tiny:llama")
    target = fit(system, people, quick(loss="learn", num_epochs=15), Run())
    rows = [encode(system, record, train_on="last") for record in people["forget"]]
    start = response_logprobs(system, rows, run=Run())
    with target.apply(system) as learnt:
        taught = response_logprobs(learnt, rows, run=Run())
        assert (taught > start).all()
        with caplog.at_level(logging.WARNING):
            prepared = training.prepare(learnt, people, quick(loss="npo"), Run())
            assert torch.allclose(prepared.forget_ref, taught, atol=1e-4), (
                "the target, not the pretrained base"
            )
            forgot = fit(learnt, people, quick(loss="npo"), Run())
            with forgot.apply(learnt) as after:
                assert response_logprobs(after, rows, run=Run()).sum() < taught.sum()
        assert "not the model" not in caplog.text


def test_same_seed_same_artefact(people: Data) -> None:
    prints = [fit(load_base("tiny:llama"), people, quick(), Run(seed=seed)).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
