"""Adversaries, the outer step's gradient, that attacks leave no trace, and the departures of the training."""

import json
import math
import random
import shutil
from collections import Counter

import pytest
import torch

from temper.artefacts import Tune, tuning
from temper.core.types import Run
from temper.data.schemas import Data, Text
from temper.methods.hardening.tar import method, training
from temper.methods.hardening.tar.card import Config
from temper.methods.hardening.tar.conftest import MEASURE, PAIRS, SMALL, example, size
from temper.methods.hardening.tar.losses import EntropyObjective
from temper.methods.hardening.tar.method import fit, measure
from temper.methods.hardening.tar.training import Resistance, Rows, TamperGradient, draw_adversary
from temper.ops.objectives import SftObjective
from temper.ops.retain import RetainObjective
from temper.ops.train import TrainSettings, train


def tensors(artefact):
    return artefact.tensors


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- adversaries


def labelled():
    part = {
        name: [example(at, at + 1) for at in range(start, start + 10)]
        for name, start in (("f", 100), ("s", 200), ("r", 300))
    }
    return Rows(
        {"forget": part["f"], "second": part["s"]}, part["r"], [example(400 + at, 9) for at in range(10)]
    )


def test_the_mix_of_adversaries():
    rows, config = labelled(), Config(forget_weight=1.0, second_weight=2.0, switch_weight=1.0)
    drawn = [draw_adversary(rows, config, random.Random(f"{seed}")) for seed in range(800)]
    counts = Counter(one.source for one in drawn)
    assert {name: round(count / 800, 1) for name, count in counts.items()} == {
        "forget": 0.2,
        "second": 0.5,
        "switch": 0.3,
    } or all(
        abs(counts[name] / 800 - share) < 0.06
        for name, share in (("forget", 0.25), ("second", 0.5), ("switch", 0.25))
    )
    assert {one.lr for one in drawn} == set(config.adversary_lrs)
    for one in drawn[:40]:
        assert len(one.batches) == 64
        assert {len(batch) for batch in one.batches} == {4}
        assert len(one.held_out) == 8
        assert all(row.ids[0] >= 400 for row in one.held_out)
        seen = [
            "r" if batch[0].ids[0] >= 300 else "s" if batch[0].ids[0] >= 200 else "f" for batch in one.batches
        ]
        if one.source == "switch":
            assert seen == sorted(seen, reverse=True)
            assert set(seen) <= {"r", "f"}
        else:
            assert set(seen) == {one.source[0]}


def test_where_a_switch_lies():
    rows = labelled()
    config = Config(forget_weight=0.0, second_weight=0.0)
    retain = [
        sum(
            batch[0].ids[0] >= 300 for batch in draw_adversary(rows, config, random.Random(str(seed))).batches
        )
        for seed in range(400)
    ]
    assert sum(retain) / len(retain) == pytest.approx(64 * 6 / 9, abs=2.0)
    only = draw_adversary(
        Rows({"forget": rows.sources["forget"]}, rows.retain, rows.held_out), config, random.Random(0)
    )
    assert only.source == "switch"


# ---- the outer step


def tamper_of(tuned, rows, **changes):
    config = Config(**{**SMALL, **changes})
    resistance = Resistance(EntropyObjective(tuned.system.pad_id), size)
    return TamperGradient(tuned, rows, resistance, config, Run(seed=4), lower_bound=config.lower_bound)


def small_rows():
    forget = [example(*range(start, start + 5)) for start in range(20, 30)]
    retain = [example(*range(start, start + 6)) for start in range(60, 70)]
    return Rows({"forget": forget}, retain, [example(40, 41, 42), example(43, 44)])


def test_the_gradient_by_the_slow_way(system):
    """Two attack steps by hand with torch's own AdamW; the looks' gradients weighted, summed, and theta put back."""
    rows = small_rows()
    with tuning(system, Tune(mode="full"), Run()) as tuned:
        model, parameters = tuned.system.model, tuned.parameters()
        tamper = tamper_of(tuned, rows, decay=0.5, num_adversaries=1, adversary_decay=0.0)
        before = [parameter.detach().clone() for parameter in parameters]
        tamper.before_step(7)
        found = [parameter.grad.clone() for parameter in parameters]
        assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
        adversary = draw_adversary(rows, tamper.config, random.Random("4/tar/7/0"))
        inner = torch.optim.AdamW(parameters, lr=adversary.lr, weight_decay=0.0)
        wanted = [torch.zeros_like(parameter) for parameter in parameters]
        for step, weight in ((0, math.exp(-0.5)), (1, 1.0)):
            for losses, is_look in ((SftObjective(3), False), (EntropyObjective(3), True)):
                items = adversary.held_out if is_look else adversary.batches[step]
                model.zero_grad()
                (term,) = losses(model, items).values()
                (term.total / term.count).backward()
                if is_look:
                    for total, parameter in zip(wanted, parameters, strict=True):
                        total.add_(parameter.grad, alpha=4.0 * weight)
                else:
                    inner.step()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_several_adversaries_are_averaged_and_weights_scale(system):
    rows = small_rows()
    with tuning(system, Tune(mode="full"), Run()) as tuned:

        def grads(**changes):
            for parameter in tuned.parameters():
                parameter.grad = None
            tamper = tamper_of(tuned, rows, **changes)
            tamper.before_step(0)
            return tamper, [parameter.grad.clone() for parameter in tuned.parameters()]

        once, plain = grads()
        double, twice = grads(resist_weight=8.0)
        many, averaged = grads(num_adversaries=3)
        for one, other in zip(plain, twice, strict=True):
            torch.testing.assert_close(2 * one, other)
        assert double.last == pytest.approx(2 * once.last)
        assert many.last == pytest.approx(once.last, rel=0.05)
        assert not torch.equal(plain[0], averaged[0])


def test_the_guard_of_a_bounded_loss(system):
    """Departure 6: unbounded=false adds nothing once the weighted loss is below the bound."""
    rows = small_rows()
    with tuning(system, Tune(mode="full"), Run()) as tuned:
        for changes, is_added in (
            ({"unbounded": True, "lower_bound": -1e-9}, True),
            ({"unbounded": False, "lower_bound": -1e-9}, False),
            ({"unbounded": False, "lower_bound": -1e9}, True),
        ):
            tamper_of(tuned, rows, **changes).before_step(0)
            assert all((parameter.grad is not None) == is_added for parameter in tuned.parameters())
            for parameter in tuned.parameters():
                parameter.grad = None


def test_the_bound_follows_the_vocabulary(system, data, monkeypatch):
    seen = []
    real = training.TamperGradient
    monkeypatch.setattr(
        training, "TamperGradient", lambda *a, **k: seen.append(k["lower_bound"]) or real(*a, **k)
    )
    fit(system, data, Config(**SMALL), Run())
    assert seen == [pytest.approx(-math.log(512))]


def test_without_attack_steps_it_is_plain_retain_training(system, data):
    """Bit for bit: K = 0, and attacks whose gradient counts nothing, end where plain retain training ends."""
    nothing = fit(system, data, Config(**{**SMALL, "inner_steps": 0}), Run())
    unread = fit(system, data, Config(**{**SMALL, "resist_weight": 0.0}), Run())
    rows = [method._encoded(system, data["retain"], Config())][0]
    with tuning(system, Tune(mode="full"), Run()) as tuned:
        train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: rows,
            RetainObjective(tuned.reference, system.pad_id),
            TrainSettings(lr=1e-2, max_steps=2, batch_rows=3, clip_norm=0.0),
            Run(),
            length=size,
        )
        plain = tuned.finish("tar")
    assert equal(tensors(nothing), tensors(plain))
    assert equal(tensors(unread), tensors(plain))
    assert not equal(tensors(fit(system, data, Config(**SMALL), Run())), tensors(plain))


def test_the_outer_warmup(system, data, monkeypatch):
    """Departure 2: AdamW, linear warm-up, then constant."""
    seen = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    fit(system, data, Config(**{**SMALL, "num_steps": 5, "warmup_steps": 3, "inner_steps": 0}), Run())
    assert seen[0].lr == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])
    for steps in (40, 750, 751, 999):
        settings = training._settings(Config(), 1.0, steps)
        assert math.ceil(settings.warmup_ratio * steps) == 32


def test_decay_spares_vectors(system, monkeypatch):
    """Departure 4."""
    seen = []
    real = training.adamw
    monkeypatch.setattr(training, "adamw", lambda *a: seen.append(real(*a)) or seen[-1])
    with tuning(system, Tune(mode="full"), Run()) as tuned:
        tamper_of(tuned, small_rows()).before_step(0)
    decays = {
        parameter.ndim: group["weight_decay"]
        for group in seen[0].param_groups
        for parameter in group["params"]
    }
    assert decays == {2: 0.01, 1: 0.0}
    assert seen[0].param_groups[0]["lr"] == 1e-2


def test_both_stages_in_one_fit(system, data, tmp_path):
    """Departure 5: stage 2 goes on from stage 1 and is held to the model that was given."""
    config = {**SMALL, "mapping_steps": 3}
    first = fit(system, data, Config(**{**config, "num_steps": 0}), Run())
    both = fit(system, data, Config(**config), Run(folder=tmp_path))
    second = fit(system, data, Config(**SMALL), Run())
    assert not equal(tensors(first), tensors(both))
    assert not equal(tensors(second), tensors(both))
    figures = json.loads((tmp_path / "figures.json").read_text())
    hidden = figures["curves"]["Tamper resistance while training"]["lines"]["hidden states"]["y"]
    assert len(hidden) == 2
    assert hidden[0] > 0.1


def test_the_baseline_reads_forget_rows(system, data, monkeypatch):
    """Departure 7: max_entropy raises the entropy of any forget row, at the weights as they stand."""
    seen = []
    real = EntropyObjective.__call__

    def watch(self, model, items):
        seen.extend(system.tokenizer.decode(row.ids) for row in items)
        return real(self, model, items)

    monkeypatch.setattr(EntropyObjective, "__call__", watch)
    fit(system, data, Config(**{**SMALL, "form": "max_entropy", "num_steps": 8}), Run())
    texts = {record.text for record in data["forget"]}
    assert len(set(seen)) > len(texts) / 2
    assert {text.replace("<|im_start|>", "") for text in seen} <= texts


def test_refusal_lowers_the_preference_loss(system):
    """The adversary learns harmful replies only; DPO of held-out pairs is what resists."""
    rows = Data({"pairs": PAIRS, "retain": [Text("The old mill stood beside the stream.", id="0")]}, "pairs")
    pairs = [method.encode_pair(system, pair) for pair in PAIRS]
    seen = []
    real = training.resist

    def watch(tuned, given, resistance, config, run):
        seen.append(given)
        return real(tuned, given, resistance, config, run)

    method.resist, held = watch, method.resist
    try:
        artefact = fit(system, rows, Config(**{**SMALL, "form": "refusal", "num_steps": 6}), Run())
    finally:
        method.resist = held
    assert artefact.kind == "weights"
    assert len(seen[0].held_out) == 1
    assert len(seen[0].sources["forget"]) == 3
    harmful = [pair.rejected for pair in pairs]
    assert all(row in harmful for row in seen[0].sources["forget"])
    assert seen[0].held_out[0].ref_chosen < 0
    found = list(measure(system, rows, Config(**MEASURE), Run()))
    assert next(row.n for row in found if row.metric == "forget_before") == 2


def test_resuming_ends_bit_identical(system, data, tmp_path):
    config = Config(**{**SMALL, "num_steps": 4, "mapping_steps": 2})
    whole = fit(system, data, config, Run())
    first = Run(folder=tmp_path, checkpoint_every=2)
    fit(system, data, config, first)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "figures.json"}
    assert (tmp_path / "checkpoint" / "mapping").is_dir()
    shutil.rmtree(tmp_path / "checkpoint" / "step-00000004")
    again = fit(system, data, config, Run(folder=tmp_path, checkpoint_every=2, resume=True))
    assert equal(tensors(whole), tensors(again))
