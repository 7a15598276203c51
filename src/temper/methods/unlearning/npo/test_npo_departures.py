"""Each departure of the objective and of training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.artefacts import Tune, tuning
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo import losses, training
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.conftest import make_pairs, objective_of, quick
from temper.methods.unlearning.npo.objective import Pair, kl_sum, positions
from temper.ops import unlearning
from temper.ops.batching import Example, collate
from temper.ops.logprobs import position_logits, response_logprobs
from temper.systems.loading import load_base


def test_departure_1_kl_positions(system: Any) -> None:
    rows = [Example([5, 6, 7, 8], [False, False, True, True]), Example([5, 6, 7], [False, True, True])]
    batch = collate(rows, 3)
    assert positions(batch, "nonpad").tolist() == [[True] * 4, [True, True, True, False]]
    assert positions(batch, "answer").tolist() == [[False, True, True, False], [True, True, False, False]]
    assert positions(batch, "all").all()
    other = load_base("tiny:llama:1").model
    items = [Pair(rows[0], retain=row) for row in rows]
    found = {
        w: objective_of(system, "ga+kl", kl_positions=w)(other, items)["kl"]
        for w in ("nonpad", "answer", "all")
    }
    assert {w: kl.count for w, kl in found.items()} == {"nonpad": 7, "answer": 4, "all": 80}

    def slow(model: Any, ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)

    with torch.no_grad():
        padded = [[*row.ids, *[3] * (40 - len(row.ids))] for row in rows]
        rows_kl = [(slow(system.model, ids), slow(other, ids)) for ids in padded]
    per_position = [(ref.exp() * (ref - now)).sum(-1) for ref, now in rows_kl]
    assert found["all"].total.item() == pytest.approx(sum(kl.sum().item() for kl in per_position), rel=1e-5)
    real = per_position[0][:4].sum() + per_position[1][:3].sum()
    assert found["nonpad"].total.item() == pytest.approx(real.item(), rel=1e-5)
    assert found["answer"].total.item() == pytest.approx(
        (per_position[0][1:3].sum() + per_position[1][:2].sum()).item(), rel=1e-5
    )


def test_kl_in_chunks_is_kl_at_once(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from temper.methods.unlearning.npo import objective as module

    batch = collate([item.row("retain") for item in make_pairs(2)], 3)
    at = positions(batch, "nonpad")
    with torch.no_grad():
        ref = position_logits(load_base("tiny:llama:2").model, batch, at).log_softmax(-1)
    weight = system.model.model.layers[0].mlp.up_proj.weight
    whole = losses.kl_divergence(ref, position_logits(system.model, batch, at).log_softmax(-1))
    (expected,) = torch.autograd.grad(whole, weight)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 512 * 7)
    chunked = kl_sum(system.model, batch, at, ref)
    (found,) = torch.autograd.grad(chunked, weight)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)


def test_departure_2_reference_log_probabilities_are_those_of_the_start(system: Any, people: Data) -> None:
    config = quick(loss="dpo+kl")
    rows = training.prepare(system, people, config, Run())
    with tuning(system, Tune(mode="lora", r=2), Run()) as tuned:
        training.unlearn(tuned, rows, config, Run())
        with tuned.reference() as before:
            again = [response_logprobs(before, part, run=Run()) for part in (rows.forget, rows.idk)]
        moved = response_logprobs(tuned.system, rows.forget, run=Run())
    assert torch.allclose(again[0], rows.forget_ref, atol=1e-4)
    assert torch.allclose(again[1], rows.idk_ref, atol=1e-4)
    assert (moved < rows.forget_ref).all(), "every forget answer became less likely"


def test_departure_5_an_idk_reply_is_drawn_once(system: Any, people: Data) -> None:
    config = quick(loss="dpo")
    rows = training.prepare(system, people, config, Run(seed=3))
    first, second = (training.pairs(rows, 3, epoch) for epoch in (0, 1))
    assert [pair.idk for pair in first] == [pair.idk for pair in second]
    own = Dialogue(
        (Message("user", "Who?"), Message("assistant", "Me.")), id="a", extra={"idk": "No idea at all."}
    )
    (row,) = training.idk_rows(system, [own], config, 0)
    assert "No idea at all." in system.tokenizer.decode(row.ids)


def test_departure_7_small_forget_sets_get_enough_steps() -> None:
    assert unlearning.num_steps(12, Config()) == 60, "ten epochs of twelve rows would be ten steps"
    assert unlearning.num_steps(400, Config()) == 130
    assert unlearning.num_steps(12, Config(min_steps=0)) == 10
    assert unlearning.num_steps(400, Config(max_steps=7)) == 7
    assert unlearning.train_settings(400, Config()).warmup_ratio == pytest.approx(0.1), (
        "the first epoch of ten"
    )


def test_departure_9_gradient_ascent_is_stopped_and_named(
    system: Any, people: Data, caplog: pytest.LogCaptureFixture
) -> None:
    config = quick(loss="ga", mode="full", num_epochs=40, max_forget_nll=8.0)
    rows = training.prepare(system, people, config, Run())
    with caplog.at_level(logging.WARNING), tuning(system, training.tune(config, Run()), Run()) as tuned:
        log, _ = training.unlearn(tuned, rows, config, Run())
    assert log.stopped_early
    assert log.num_steps < 40
    assert log.terms["forget_nll"][-1] > 8.0 >= log.terms["forget_nll"][-2]
    assert f"stopped as diverged at step {log.num_steps}:" in caplog.text
    assert "max_forget_nll=8" in caplog.text


def test_departure_9_the_report_names_what_diverged(tmp_path: Path) -> None:
    """Beside the curves of the fit, for a run's report holds more than its terminal did."""
    from temper.report.page import render_report
    from temper.run.execute import run_recipe

    path = tmp_path / "two.yaml"
    path.write_text(
        "system: tiny:llama\ndata: builtin:people\nlimit: 4\nsteps:\n"
        "  - {id: forget, fit: npo, settings: {loss: ga, mode: full, lr: 0.01, min_steps: 0, watch_every: 0}}\n"
        "arms:\n  broken: {forget: {settings: {num_epochs: 40, max_forget_nll: 8.0}}}\n"
        "  whole: {forget: {settings: {max_forget_nll: 0, num_epochs: 4}}}\n"
    )
    result = run_recipe(str(path), out=str(tmp_path / "runs"))
    page = render_report(result.folder.path)
    assert "How unlearning ended (broken · seed 0, forget)" in page
    assert "How unlearning ended (whole" not in page
    assert "nats a token, more than max_forget_nll=8" in page


def test_departure_10_idk_and_retain_are_two_means(system: Any) -> None:
    items = make_pairs(1)
    counts = objective_of(system, "idk+rt").counts(items)
    assert counts == {
        "forget": sum(sum(item.row("idk").scored) for item in items),
        "rt": sum(sum(item.row("retain").scored) for item in items),
    }
