"""The losses by hand and beside independent versions, their limits, each departure of training, and bad input."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import temper
from temper.artefacts import Tune, tuning
from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Row, Run
from temper.data.loading import load_data
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo import losses, training
from temper.methods.unlearning.npo.card import FORGET_NAMES, TERM_NAMES, Config, loss_parts
from temper.methods.unlearning.npo.method import fit, measure
from temper.methods.unlearning.npo.objective import Pair, UnlearnObjective, kl_sum, positions
from temper.ops import unlearning
from temper.ops.batching import Example, collate, encode
from temper.ops.logprobs import position_logits, response_logprobs
from temper.ops.objectives import SumCount
from temper.systems.loading import load_base

logp = st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def people() -> Data:
    parts = {"forget": "Dialogue", "retain": "Dialogue", "holdout": "Dialogue", "neighbours": "Dialogue"}
    return load_data("builtin:people", {**parts, "world_facts": "Dialogue"}, limit=4)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quick(**settings: Any) -> Config:
    fast = {
        "mode": "lora",
        "rank": 2,
        "lr": 1e-2,
        "batch_rows": 4,
        "num_epochs": 3,
        "min_steps": 0,
        "watch_every": 0,
    }
    return Config(**{**fast, **settings})


# ---- the maths


def test_npo_by_hand() -> None:
    # p / p_ref = 1/2 with beta 1: 2 log(1 + 1/2)
    assert losses.npo_loss(doubles(math.log(0.1)), doubles(math.log(0.2)), 1.0).item() == pytest.approx(
        2 * math.log(1.5)
    )
    assert losses.npo_loss(doubles(-3, -3), doubles(-3, -3), 0.1).item() == pytest.approx(
        2 * 20 * math.log(2)
    )


def test_simnpo_and_dpo_by_hand() -> None:
    nll_mean, delta, beta = 6 / 3, 0.5, 2.0
    expected = -2 / beta * math.log(1 / (1 + math.exp(-beta * (nll_mean - delta))))
    assert losses.simnpo_loss(doubles(-6), doubles(3), beta, delta).item() == pytest.approx(expected)
    margin = 0.1 * ((-4 - -5) - (-9 - -7))
    expected = -2 / 0.1 * math.log(1 / (1 + math.exp(-margin)))
    assert losses.dpo_loss(doubles(-4), doubles(-5), doubles(-9), doubles(-7), 0.1).item() == pytest.approx(
        expected
    )


@given(logp, st.floats(0.01, 5))
def test_npo_gradient_is_ascent_times_w(rows: list[tuple[float, float]], beta: float) -> None:
    now = doubles(*(a for a, _ in rows)).requires_grad_()
    ref = doubles(*(b for _, b in rows))
    (grad,) = torch.autograd.grad(losses.npo_loss(now, ref, beta), now)
    assert torch.allclose(grad, losses.npo_weight(now, ref, beta), atol=1e-12)
    assert ((grad >= 0) & (grad <= 2)).all()


def test_w_by_its_own_formula() -> None:
    now, ref, beta = doubles(-1.0, -8.0), doubles(-2.0, -2.0), 0.7
    p, q = now.exp() ** beta, ref.exp() ** beta
    assert torch.allclose(losses.npo_weight(now, ref, beta), 2 * p / (p + q))
    assert losses.npo_weight(ref, ref, beta).tolist() == [1.0, 1.0], "weight 1 at the start"
    assert losses.npo_weight(doubles(-500.0), doubles(-2.0), beta).item() < 1e-100, (
        "0 once an answer is unlikely"
    )


@given(logp)
def test_beta_towards_0_is_gradient_ascent(rows: list[tuple[float, float]]) -> None:
    now = doubles(*(a for a, _ in rows)).requires_grad_()
    ref = doubles(*(b for _, b in rows))
    beta = 1e-7
    loss = losses.npo_loss(now, ref, beta)
    (grad,) = torch.autograd.grad(loss, now)
    assert torch.allclose(grad, torch.ones_like(grad), atol=1e-4)
    # In value too, up to the constant 2 log 2 / beta a row, the reference, and the next term of the series.
    constant = len(rows) * 2 * math.log(2) / beta
    gaps = (now - ref).detach()
    next_term = beta / 4 * gaps.square().sum().item()
    assert loss.item() - constant == pytest.approx(gaps.sum().item(), abs=1e-3 + next_term)


def test_nothing_overflows_where_a_probability_vanished() -> None:
    for value in (-1e30, -1e4, 1e4, 1e30):
        assert torch.isfinite(losses.npo_loss(torch.tensor([value]), torch.tensor([-5.0]), 0.1)).all()
        assert torch.isfinite(
            losses.kto_loss(*(torch.tensor([value]),) * 2, torch.tensor([-5.0]), torch.tensor([1.0]), 1.0)
        )


def test_departure_6_the_constant_of_kto_leaves_its_gradient() -> None:
    rows = [doubles(-3, -6), doubles(-4, -5), doubles(-8, -2), doubles(-7, -3)]
    now, again = rows[2].clone().requires_grad_(), rows[2].clone().requires_grad_()
    ours = losses.kto_loss(rows[0], rows[1], now, rows[3], 0.5) / 2
    point = (rows[0] - rows[1]).mean()
    released = 1 - torch.sigmoid(point - 0.5 * (again - rows[3])).mean() * 2 / 0.5
    assert ours.item() - released.item() == pytest.approx(2 / 0.5 - 1)
    (a,), (b,) = torch.autograd.grad(ours, now), torch.autograd.grad(released, again)
    assert torch.allclose(a, b)


def test_kl_by_hand() -> None:
    ref, now = doubles(0.5, 0.5).log()[None], doubles(0.25, 0.75).log()[None]
    assert losses.kl_divergence(ref, now).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert losses.kl_divergence(ref, ref).item() == 0


def test_names_and_tables_agree() -> None:
    assert set(losses.FORGET) == set(FORGET_NAMES)
    assert set(losses.TERMS) == set(TERM_NAMES)
    assert loss_parts("graddiff") == ("ga", ("rt",))
    assert losses.parse("npo+rt+kl").answers == ("forget", "retain")
    assert losses.parse("idk+rt").answers == ("idk", "retain")
    assert not losses.parse("ga+fkl").needs_retain


# ---- the objective, beside a float64 version written from full logits


def make_pairs(seed: int) -> list[Pair]:
    draw = torch.Generator().manual_seed(seed)

    def row(low: int, high: int) -> Example:
        size = int(torch.randint(low, high, (1,), generator=draw))
        ids = torch.randint(4, 512, (size,), generator=draw).tolist()
        start = int(torch.randint(1, size - 1, (1,), generator=draw))
        return Example(ids, [place >= start for place in range(size)])

    return [Pair(row(5, 30), -20.0 - n, row(5, 12), -15.0 + n, row(5, 40)) for n in range(4)]


def slow_logp(model: Any, row: Example) -> torch.Tensor:
    logits = model(torch.tensor([row.ids]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    return torch.stack([table[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.scored[t]])


def slow_loss(model: Any, items: list[Pair], name: str, beta: float, delta: float) -> torch.Tensor:
    """The released losses, row by row, in float64: no batches, no padding, no shared pieces."""
    forget = [slow_logp(model, item.forget) for item in items]
    idk = [slow_logp(model, item.row("idk")) for item in items]
    retain = torch.cat([slow_logp(model, item.row("retain")) for item in items])
    ratios = torch.stack([a.sum() - item.forget_ref for a, item in zip(forget, items, strict=True)])
    wins = torch.stack([a.sum() - item.idk_ref for a, item in zip(idk, items, strict=True)])
    means = torch.stack([-a.mean() for a in forget])
    kind, _, term = name.partition("+")
    found = {
        "ga": lambda: torch.cat(forget).mean(),
        "npo": lambda: -F.logsigmoid(-beta * ratios).mean() * 2 / beta,
        "simnpo": lambda: -F.logsigmoid(beta * (means - delta)).mean() * 2 / beta,
        "dpo": lambda: -F.logsigmoid(beta * (wins - ratios)).mean() * 2 / beta,
        "kto": lambda: (1 - torch.sigmoid(wins.mean() - beta * ratios)).mean() * 2 / beta,
        "idk": lambda: -torch.cat(idk).mean(),
    }[kind]()
    return found - retain.mean() if term else found


def objective_of(system: Any, name: str, **settings: Any) -> UnlearnObjective:
    class Same:
        def __enter__(self) -> Any:
            return system

        def __exit__(self, *error: Any) -> None: ...

    config = Config(loss=name, **settings)
    return UnlearnObjective(losses.parse(name), config, pad_id=3, device="cpu", reference=Same, width=40)


def value_of(objective: UnlearnObjective, model: Any, items: list[Pair]) -> float:
    terms: dict[str, SumCount] = objective(model, items)
    counts = objective.counts(items)
    assert {name: term.count for name, term in terms.items()} == counts
    return sum(
        objective.weights[name] * float(term.total.detach()) / counts[name] for name, term in terms.items()
    )


@pytest.mark.parametrize(
    "name", ["ga", "ga+rt", "npo", "npo+rt", "simnpo", "simnpo+rt", "dpo", "dpo+rt", "kto", "idk+rt"]
)
def test_losses_agree_with_a_slow_float64_version(system: Any, name: str) -> None:
    model = load_base("tiny:llama").model.double()
    objective = objective_of(system, name, beta=0.3, delta=0.2)
    for seed in range(3):
        items = make_pairs(seed)
        with torch.no_grad():
            expected = slow_loss(model, items, name, 0.3, 0.2).item()
        assert value_of(objective, model, items) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_dpo_agrees_with_trl(system: Any) -> None:
    """TRL's own loss on the same padded batch: ours is 2 / beta times its sigmoid loss."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    items, beta = make_pairs(3), 0.2
    batch = collate([*(item.row("idk") for item in items), *(item.forget for item in items)], 3)

    def model(input_ids: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
        logp = system.model(input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        target, known = labels[:, 1:], labels[:, 1:] != -100
        picked = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(picked)
        return MagicMock(log_probs=picked * known, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = MagicMock()
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.ld_alpha = ["sigmoid"], [1.0], beta, None
    trainer.f_divergence_type, trainer.precompute_ref_logps, trainer.aux_loss_enabled = (
        "reverse_kl",
        True,
        False,
    )
    trainer.use_weighting, trainer.args.rpo_alpha, trainer.label_smoothing = False, None, 0.0
    trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    inputs = {
        "input_ids": batch.ids_BT,
        "attention_mask": batch.mask_BT.long(),
        "completion_mask": batch.scored_BT.long(),
        "ref_chosen_logps": torch.tensor([item.idk_ref for item in items]),
        "ref_rejected_logps": torch.tensor([item.forget_ref for item in items]),
    }
    with torch.no_grad():
        theirs = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
        ours = value_of(objective_of(system, "dpo", beta=beta), system.model, items)
    assert ours == pytest.approx(2 / beta * float(theirs), rel=1e-6)


def test_departure_4_any_split_of_a_step_gives_its_loss_and_gradient(system: Any) -> None:
    items = make_pairs(5)
    for name in ("npo+rt", "ga+kl", "dpo+kl", "ga+fkl"):
        for which in ("nonpad", "answer", "all"):
            objective = objective_of(system, name, kl_positions=which)
            model = system.model
            counts = objective.counts(items)

            def loss_of(
                split: list[list[Pair]], objective: Any = objective, counts: Any = counts, model: Any = model
            ) -> Any:
                terms = [objective(model, part) for part in split]
                return sum(
                    objective.weights[n] * t.total / counts[n] for part in terms for n, t in part.items()
                )

            weight = model.model.layers[0].mlp.up_proj.weight
            (whole,) = torch.autograd.grad(loss_of([items]), weight)
            (parts,) = torch.autograd.grad(loss_of([items[:1], items[1:]]), weight)
            assert torch.allclose(whole, parts, atol=1e-6), (name, which)


def test_kto_compares_the_rows_of_a_step_and_says_so(system: Any) -> None:
    assert objective_of(system, "kto").unsplittable
    assert not objective_of(system, "dpo").unsplittable


# ---- departures


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


# ---- pairing, scoring, the reference's identity


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


# ---- bad input, and a user's own files


def save(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fit_on_own_files(tmp_path: Path) -> None:
    forget = save(tmp_path / "my.jsonl", [{"question": "Who is Orla?", "answer": "A pilot."}])
    retain = save(tmp_path / "other.jsonl", [{"prompt": "Two and two?", "completion": "Four."}])
    settings = {"mode": "lora", "rank": 2, "num_epochs": 2, "min_steps": 0, "lr": 1e-3, "watch_every": 1}
    run = Run(folder=tmp_path / "run")
    artefact = temper.fit("npo", "tiny:llama", {"forget": forget, "retain": retain}, run=run, **settings)
    assert artefact.method == "npo"
    curves = json.loads((tmp_path / "run" / "figures.json").read_text())["curves"]
    trade = curves["Kept against forgotten"]["lines"]["npo+rt"]
    assert len(trade["x"]) == len(trade["y"]) == 3, "before the first step and after each"
    with pytest.raises(DataError, match=r"keeps a retain set, and there is none.*loss=npo"):
        temper.fit("npo", "tiny:llama", {"forget": forget}, **settings)
    assert temper.fit("npo", "tiny:llama", {"forget": forget}, loss="npo", **settings)


def test_bad_rows_are_named(system: Any) -> None:
    def data(*turns: tuple[str, str]) -> Data:
        return Data({"forget": [Dialogue(tuple(Message(*turn) for turn in turns), id="bad-7")]})

    long = ("user", "word " * 60), ("assistant", "Yes.")
    with pytest.raises(DataError, match=r"truncated away.*bad-7"):
        fit(system, data(*long), quick(loss="npo", max_tokens=20), Run())
    with pytest.raises(DataError, match=r"no token to score.*bad-7"):
        fit(system, data(("user", "Who?")), quick(loss="npo"), Run())
    with pytest.raises(DataError, match="empty"):
        temper.fit("npo", "tiny:llama", {"forget": []}, loss="npo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "npoo"}, "no forget loss 'npoo'.*npo"),
        ({"loss": "npo+rtt"}, "'rtt' in 'npo\\+rtt' is no term"),
        ({"loss": "npo+rt+rt"}, "stands twice"),
        ({"loss": "learn+rt"}, "takes no further term"),
        ({"beta": 0}, "beta must be above 0"),
        ({"levels": [0.5, 2]}, "between 0 and 1"),
        ({"kl_positions": "padding"}, "not a valid value"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core_config.build(Config, [("test", settings)])


def test_little_movement_is_said(system: Any, people: Data, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(system, people, quick(loss="npo", lr=1e-6, num_epochs=1), Run())
    assert "hardly moved in 1 steps" in caplog.text


def test_path_needs_something_to_keep(system: Any, people: Data) -> None:
    forget_only = Data({"forget": people["forget"]})
    with pytest.raises(ConfigError, match="needs an unlearning loss and a part retain"):
        list(measure(system, forget_only, quick(loss="npo", path=True, watch_every=1), Run()))


def values(rows: list[Row], metric: str) -> list[float | None]:
    return [row.value for row in rows if row.metric == metric and row.item is None]


def test_path_reads_retain_at_forget_levels(people: Data) -> None:
    system = load_base("tiny:llama")
    learnt = fit(system, people, quick(loss="learn", mode="full", num_epochs=60), Run())
    config = quick(
        loss="npo", mode="full", path=True, watch_every=1, levels=(0.2, 0.9999), reply_tokens=4, num_epochs=25
    )
    with learnt.apply(system) as target:
        rows = list(measure(target, people, config, Run()))
    (start,), (end,) = values(rows, "forget_probability_start"), values(rows, "forget_probability_end")
    assert start > 0.4 > end
    (kept,) = values(rows, "retain_probability_at_0.2")
    items = [row for row in rows if row.metric == "retain_probability_at_0.2" and row.item]
    assert [row.item for row in items] == [record.id for record in people["retain"]]
    assert sum(row.value or 0 for row in items) / len(items) == pytest.approx(kept)
    (never,) = [row for row in rows if row.metric == "retain_probability_at_0.9999"]
    assert never.value is None
    assert "not crossed" in never.note
