"""Label-agnostic forgetting: the losses by hand, what moves and what stays, bad input, and each departure."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from temper.artefacts import Tune, tuning
from temper.core.errors import ConfigError, DataError, NumericsError
from temper.core.types import Run
from temper.data.loading import load_data
from temper.data.pictures import Picture
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf import training
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.method import fit, make, measure
from temper.methods.unlearning.laf.vae import (
    Passed,
    Vae,
    alignment_loss,
    batches,
    extractor_loss,
    misfit,
    train_vae,
    vae_loss,
)
from temper.systems.image_classifier import ImageClassifier
from temper.systems.loading import load_base

QUICK = Config(
    latent=2, vae_epochs=2, num_epochs=2, lr_ue=1e-3, lr_ra=1e-3, batch_rows=4, min_rows=2, learn_epochs=30, learn_lr=1e-2,
    repair_lr=1e-2, finetune_epochs=2, ascent_epochs=2, tau=5.0,
)  # fmt: skip
RUN = Run(seed=0)


def quick(**changes) -> Config:
    return dataclasses.replace(QUICK, **changes)


@pytest.fixture(scope="module")
def data() -> Data:
    train = load_data("builtin:quadrants")
    return make(None, train, quick(task="class", classes=("0",)), RUN)  # type: ignore[arg-type]


@pytest.fixture
def system() -> ImageClassifier:
    return load_base("tiny:cnn")  # type: ignore[return-value]


def state(system) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in system.model.state_dict().items()}


def embeddings(system, data, part="retain") -> torch.Tensor:
    pixels = system.pixels([record.image for record in data[part]])
    with torch.no_grad():
        return training.embed(system, pixels, QUICK)


# The losses, by hand


def test_misfit_is_between_1_and_e():
    e_BD = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e6, 0.0]])
    got = misfit(torch.zeros(3, 2), e_BD)
    assert got.tolist() == pytest.approx([1.0, math.exp(0.5), math.e], rel=1e-5)


def test_vae_loss_by_hand():
    passed = Passed(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    loss = vae_loss(passed, torch.tensor([[0.0, 0.0]]), kl_weight=0.1)
    divergence = -0.5 * (math.log(4.0) + 1 - 0.25 - 4)
    assert float(loss.total) == pytest.approx(5 + 0.1 * divergence, rel=1e-6)
    assert loss.count == 1
    at_prior = Passed(torch.zeros(3, 2), torch.zeros(3, 1), torch.ones(3, 1))
    assert float(vae_loss(at_prior, torch.zeros(3, 2), 1.0).total) == pytest.approx(0, abs=1e-6)


class Fixed(nn.Module):
    """An autoencoder that always says the same."""

    def __init__(self, out: float) -> None:
        super().__init__()
        self.out = out

    def forward(self, e_BD, generator):
        return Passed(torch.full_like(e_BD, self.out), e_BD, e_BD)


def test_extractor_loss_keeps_one_and_leaves_the_other():
    retain, forget = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0]]).requires_grad_()
    loss = extractor_loss(Fixed(0.0), Fixed(0.5), retain, forget, torch.Generator())
    assert loss.item() == pytest.approx(2 * math.exp(0.5) - math.exp(0.25 / 1.25), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, forget)
    assert float(grad) < 0  # a step down the loss moves it away from 0.5


def test_alignment_loss_by_hand():
    teacher = torch.tensor([[1.0, 0.0]])
    retain = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # distances 1 and 0
    forget = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # distances 2 and 0
    loss = alignment_loss(retain, teacher.expand(2, 2), forget, teacher.expand(2, 2), tau=2.0)
    assert float(loss) == pytest.approx(1 - 2 * math.log(math.e + 1), rel=1e-6)
    long_form = sum(math.log(math.exp(d) / (math.exp(2 / 2) + math.exp(0))) for d in (1.0, 0.0))
    assert float(loss) == pytest.approx(long_form, rel=1e-6)


def test_temperature_divides_only_the_forget_term():
    teacher, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    same = alignment_loss(other, teacher, teacher, teacher, 1.0)
    assert float(same) == float(alignment_loss(other, teacher, teacher, teacher, 50.0)) == 1.0
    hot = alignment_loss(teacher, teacher, other, teacher, 50.0)
    assert float(hot) == pytest.approx(-1 / 50)


def test_embeddings_of_norm_zero_give_no_nan():
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = alignment_loss(zero, torch.rand(2, 3), zero * 1.0, torch.zeros(2, 3), 5.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, zero)[0].isfinite().all()


# The autoencoders


def test_a_trained_vae_knows_its_embeddings_better_than_others():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(256, 1, generator=generator) @ torch.randn(1, 12, generator=generator)
    vae = train_vae(known, Config(vae_epochs=60), seed=0)
    other = torch.randn(256, 12, generator=generator) * known.std()
    errors = [misfit(vae(x, generator).out_BD, x).mean() for x in (known, other)]
    assert errors[0] + 0.3 < errors[1]
    assert not any(p.requires_grad for p in vae.parameters())


def test_same_seed_same_vae():
    e_ND = torch.rand(20, 5)
    first, again, other = (train_vae(e_ND, QUICK, seed=s).decoder[0].weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_departure_1_the_output_is_linear_unless_asked():
    outs = [
        Vae(3, 2, sigmoid)(torch.full((64, 3), 40.0), torch.Generator()).out_BD for sigmoid in (False, True)
    ]
    assert outs[0].min() < 0
    assert outs[1].min() > 0
    assert outs[1].max() < 1
    far = torch.rand(64, 3) + 4
    errors = {
        decoder: misfit_of(train_vae(far, Config(vae_epochs=100, decoder=decoder), 0), far)
        for decoder in ("linear", "sigmoid")
    }
    assert errors["linear"] < 1.0 < 9 * 3 * 0.9 < errors["sigmoid"]


def misfit_of(vae, e_ND) -> float:
    return float((vae(e_ND, torch.Generator()).out_BD - e_ND).square().sum(1).mean())


def test_departure_2_the_retain_vae_is_fitted_on_retain_rows(system, data, monkeypatch):
    given = []
    monkeypatch.setattr(
        training, "train_vae", lambda e, config, seed: (given.append(e), train_vae(e, config, seed))[1]
    )
    fit(system, data, QUICK, RUN)
    assert torch.allclose(given[0], embeddings(system, data, "retain"), atol=1e-6)
    assert torch.allclose(given[1], embeddings(system, data, "forget"), atol=1e-6)


# Unlearning


def test_the_head_stays_and_the_extractor_moves(system, data):
    artefact = fit(system, data, QUICK, RUN)
    assert not any(name.startswith("head.") for name in artefact.tensors)
    assert any(name.startswith("features.") for name in artefact.tensors)


def test_labels_are_not_read(system, data):
    blank = Data({part: [dataclasses.replace(r, label="?") for r in rows] for part, rows in data.items()})
    assert fit(system, data, QUICK, RUN).fingerprint == fit(system, blank, QUICK, RUN).fingerprint


def test_forget_features_turn_away_and_retain_features_stay(system, data):
    original = fit(system, data, quick(technique="learn"), RUN)
    with original.apply(system) as base:
        before = {part: embeddings(base, data, part) for part in ("forget", "retain")}
        with fit(base, data, quick(num_epochs=40, lr_ue=2e-4, lr_ra=5e-3), RUN).apply(base) as unlearned:
            after = {part: embeddings(unlearned, data, part) for part in before}
    cosine = {part: float(torch.cosine_similarity(before[part], after[part]).mean()) for part in before}
    assert cosine["forget"] + 0.1 < cosine["retain"]


def test_departure_3_one_teacher_and_norms_in_inference_mode(data):
    system = load_base("new:cnn3-w4-bn:1x8x8:4")
    artefact = fit(system, data, QUICK, RUN)
    assert not any("running" in name for name in artefact.tensors)
    learnt = fit(system, data, quick(technique="learn", learn_epochs=1), RUN)
    assert any("running_mean" in name for name in learnt.tensors)
    assert not any("running" in name for name in fit(system, data, quick(technique="ascent"), RUN).tensors)
    assert not system.model.training


def test_departure_4_small_last_steps_are_left_out():
    generator = torch.Generator().manual_seed(0)
    assert [len(rows) for rows in batches(10, 4, 3, generator)] == [4, 4]
    assert [len(rows) for rows in batches(10, 4, 2, generator)] == [4, 4, 2]
    assert [len(rows) for rows in batches(2, 4, 3, generator)] == [2]
    assert sorted(torch.cat(list(batches(8, 4, 4, generator))).tolist()) == list(range(8))


def test_departure_5_any_layer_can_be_the_embedding(system, data):
    pixels = training.pictures(system, data).forget_NCHW
    assert training.embed(system, pixels, QUICK).shape == (3, 100)
    assert training.embed(system, pixels, quick(layer="features.0")).shape == (3, 4 * 64)
    assert fit(system, data, quick(layer="features.0"), RUN).tensors


def test_repair_trains_the_head_alone_on_so_many_rows(system, data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ImageClassifier, "examples", lambda self, rows: seen.append(rows) or examples_of(self, rows)
    )
    repaired = fit(system, data, quick(technique="repair", repair_rows=6), RUN)
    assert set(repaired.tensors) == {"head.weight", "head.bias"}
    assert [len(rows) for rows in seen] == [6]
    assert set(seen[0]) <= set(data["retain"])


examples_of = ImageClassifier.examples


def test_transformers_models_unlearn(data):
    system = load_base("tiny:resnet")
    artefact = fit(system, data, QUICK, RUN)
    assert not any(name.startswith("classifier") for name in artefact.tensors)


@pytest.mark.parametrize(("technique", "sign"), [("ascent", 1), ("finetune", -1), ("learn", -1)])
def test_what_it_is_compared_with_moves_the_loss_its_way(system, data, technique, sign):
    part = {"ascent": "forget", "finetune": "retain", "learn": "retain"}[technique]
    examples = system.examples(data[part])

    def nll(model) -> float:
        return nn.functional.cross_entropy(model.logits(examples.pixels_BCHW), examples.class_B).item()

    before = nll(system)
    with fit(system, data, quick(technique=technique), RUN).apply(system) as changed:
        assert sign * (nll(changed) - before) > 0


def test_micro_batches_change_nothing(system, data):
    config = quick(technique="learn", learn_epochs=2)
    one, many = (fit(system, data, config, Run(seed=0, batch_tokens=tokens)) for tokens in (1, 4096))
    for name, tensor in one.tensors.items():
        assert torch.allclose(tensor, many.tensors[name], atol=1e-5)


def test_departure_7_decay_is_adamws(system, data):
    """One step with decay differs from one without by -lr * decay * weight, whatever the gradient."""
    one_step = quick(technique="retrain", learn_epochs=1, batch_rows=16, learn_lr=1e-3)
    decayed, plain = (
        fit(system, data, dataclasses.replace(one_step, weight_decay=decay), RUN).tensors
        for decay in (0.5, 0.0)
    )
    start = system.model.head.weight.detach()
    gap = decayed["head.weight"] - plain["head.weight"]
    assert torch.allclose(gap, -1e-3 * 0.5 * start, atol=1e-7)
    assert torch.equal(decayed["head.bias"], plain["head.bias"])


# Warnings and bad input


def test_parts_of_one_kind_are_told(system, data, caplog):
    half = Data({"forget": data["retain"][:5], "retain": data["retain"]})
    with caplog.at_level(logging.WARNING):
        fit(system, half, QUICK, RUN)
    assert "expect a small effect" in caplog.text


def test_parts_of_two_kinds_are_not(caplog):
    generator = torch.Generator().manual_seed(0)
    forget, retain = (
        torch.randn(64, 1, generator=generator) @ torch.randn(1, 8, generator=generator) for _ in "ab"
    )
    forget = forget + 3
    vaes = [train_vae(part, Config(vae_epochs=80), 0) for part in (retain, forget)]
    assert training.overlap(forget, *vaes, 0) < 0.9
    assert not caplog.text


def test_too_few_forget_rows(system, data):
    with pytest.raises(DataError, match="There are 3 forget rows, and a step needs 8"):
        fit(system, data, quick(min_rows=8), RUN)


def test_a_text_among_the_images(system, data):
    broken = data.with_part("forget", [*data["forget"], Labelled("words", 0, id="t")])
    with pytest.raises(DataError, match="a text and no image.*row 't'"):
        fit(system, broken, QUICK, RUN)


def test_a_rate_that_breaks_everything_stops(system, data):
    with pytest.raises(NumericsError, match="not finite"):
        fit(system, data, quick(lr_ue=1e30, num_epochs=5), RUN)
    assert all(value.isfinite().all() for value in state(system).values())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tau", 0), ("min_rows", 0), ("share", 0), ("share", 1.5), ("num_epochs", 0), ("repair_rows", 0)],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=setting):
        quick(**{setting: value})


def test_repair_in_a_comparison_goes_on_from_laf(system, data):
    config = quick(compare=("laf_r", "laf"), learn_epochs=1, repair_rows=6)
    rows = {
        (row.arm, row.metric): row.value for row in measure(system, data, config, RUN) if row.item is None
    }
    original = fit(system, data, dataclasses.replace(config, technique="learn"), RUN)
    with original.apply(system) as base, fit(base, data, quick(), RUN).apply(base) as unlearned:
        repaired = fit(unlearned, data, quick(technique="repair", repair_rows=6), RUN)
        with repaired.apply(unlearned) as both:
            by_hand = {row.metric: row.value for row in measure(both, data, quick(), RUN) if row.item is None}
    for metric in ("test_r_accuracy", "train_f_accuracy", "membership_asr"):
        assert rows["laf_r", metric] == by_hand[metric]
    assert rows["laf_r", "fit_s"] > rows["laf", "fit_s"]


def test_measure_says_what_a_fresh_network_is_for(system, data):
    rows = list(measure(system, data, quick(compare=("laf",), learn_epochs=1), RUN))
    assert {row.arm for row in rows} == {"retrained", "original", "laf"}
    assert {row.metric for row in rows if row.arm == "laf"} > {"retrained_gap", "membership_asr", "fit_s"}
    assert "retrained_gap" not in {row.metric for row in rows if row.arm == "retrained"}


def test_pictures_of_other_sizes_and_colours_are_fitted(system):
    draw = np.random.default_rng(0)
    shapes = [(8, 8), (20, 10, 3), (3, 30), (8, 8, 3)]
    rows = [
        Labelled(
            "", i % 2, Picture.from_array(draw.integers(0, 256, shapes[i % 4], dtype=np.uint8)), id=str(i)
        )
        for i in range(8)
    ]
    assert fit(system, Data({"forget": rows[:3], "retain": rows[3:]}), QUICK, RUN).tensors


def test_tuning_leaves_the_system(system, data):
    before = state(system)
    with tuning(system, Tune(mode="full"), RUN) as tuned:
        training.unlearn(tuned, training.pictures(system, data), QUICK, RUN)
    assert all(torch.equal(before[name], value) for name, value in state(system).items())


def test_a_class_nobody_has():
    with pytest.raises(ConfigError, match="No row is of class 'cat'"):
        make(None, load_data("builtin:quadrants"), quick(classes=("cat",)), RUN)  # type: ignore[arg-type]
