"""Fast certified training: the schedule, the regularisers and the first weights by hand, departures, training, certificates."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from temper.core.errors import DataError, ModelError, NumericsError
from temper.core.types import Run
from temper.data.schemas import Data, Labelled
from temper.methods.certified.fast_ibp import method, report
from temper.methods.certified.fast_ibp.card import Config
from temper.methods.certified.fast_ibp.first_weights import draw_weights, fed_by_sums, ibp_std
from temper.methods.certified.fast_ibp.objective import (
    BoxObjective,
    relu_loss,
    scheduled_eps,
    system_box,
    tightness_loss,
)
from temper.ops.bounds import Box, box_between, robust_losses
from temper.ops.linear_bounds import linear_margins, mixed_margins
from temper.ops.network_bounds import BoundedNetwork
from temper.systems.image_classifier import Examples, ImageClassifier
from temper.systems.networks import build_network

DIGITS = tuple(map(str, range(10)))


def classifier(name="mlp-w16-bn", shape=(1, 8, 8), num_classes=10, **preparation):
    classes = tuple(map(str, range(num_classes)))
    return ImageClassifier(build_network(name, shape, num_classes).eval(), classes, shape, **preparation)


def examples(num=12, shape=(1, 8, 8), num_classes=10):
    draw = torch.Generator().manual_seed(3)
    return Examples(torch.rand(num, *shape, generator=draw), torch.arange(num) % num_classes)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    from temper.data.pictures import Picture

    found = load_digits()
    records = [
        Labelled("", int(label), Picture.from_array((image * 15.9).astype("uint8")), id=str(place))
        for place, (image, label) in enumerate(zip(found.images, found.target, strict=True))
    ]
    return Data({"train": records[:400], "test": records[400:480]})


def quick(**changes):
    chosen = {
        "eps": 0.05, "batch_rows": 100, "num_epochs": 16, "clean_epochs": 1, "ramp_epochs": 6, "lr": 5e-3, "lr_drops": (12,),
        "curve_points": 3, "attack_steps": 5, "attack_restarts": 1, "checked_rows": 16,
    }  # fmt: skip
    return Config(**{**chosen, **changes})


def test_the_schedule_by_hand():
    # One clean epoch of 4 steps, a ramp of 8: M = 2, alpha = 1 / (6 * 4 * 8 + 16) = 1 / 208.
    found = [scheduled_eps(step, 4, 1, 2, 1.0) for step in range(14)]
    wanted = [0, 0, 0, 0, 0, 1, 16, 48, 80, 112, 144, 176, 208, 208]
    assert found == pytest.approx([value / 208 for value in wanted])
    # The slope of the quartic at its end, 4 alpha M^3, is that of the line.
    assert found[7] - found[6] == pytest.approx(4 * 2**3 / 208)
    assert [scheduled_eps(step, 1, 1, 2, 0.5) for step in range(4)] == pytest.approx([0, 0, 0.25, 0.5])
    assert scheduled_eps(0, 10, 0, 0, 0.3) == 0.3


def test_the_regularisers_by_hand():
    boxes = [
        Box(torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [4.0, 8.0]])),
        Box(torch.zeros(1, 2), torch.ones(1, 2)),
    ]
    # mean(D) = 4 and 1, D_0 = 1: max(0, .5 - 1/4) and 0, over tau I = 1.
    assert tightness_loss(torch.tensor(1.0), boxes, 0.5).item() == pytest.approx(0.25)
    box = box_between(torch.tensor([1.0, 2.0, -1.0, -1.0]), torch.tensor([3.0, 4.0, -0.5, 2.0]))
    # Centres 2, 3 (active), -0.75 (inactive), 0.5: a = 5 / .75, min(a, 1/a) = .15.
    centre = torch.tensor([2.0, 3.0, -0.75, 0.5])
    spread = (centre - centre.mean()).square()
    variance = min(spread[:2].sum() / spread[2], spread[2] / spread[:2].sum()).item()
    wanted = (0.5 - 0.15) / 0.5 + max(0.0, 0.5 - variance) / 0.5
    assert relu_loss([box], 0.5).item() == pytest.approx(wanted)
    assert relu_loss([box, box], 0.5).item() == pytest.approx(wanted)


def test_departure_2_a_layer_without_active_or_inactive_neurons_adds_nothing():
    for sign in (1.0, -1.0):
        centre = (sign * torch.ones(3)).requires_grad_()
        loss = relu_loss([Box(centre, torch.full((3,), 0.5))], 0.5)
        assert loss.item() == 0
        loss.backward()
        assert torch.equal(centre.grad, torch.zeros(3))


def growth(init, name="cnn7-w16", seed=0):
    system = classifier(name, (1, 16, 16))
    rows = report.start_rows(system, examples(8, (1, 16, 16)), Config(eps=0.01, init=init), Run(seed=seed))
    return next(row.value for row in rows if row.metric == "start_growth" and not row.group)


def test_ibp_weights_keep_the_size_of_boxes():
    assert ibp_std(9) == pytest.approx(math.sqrt(2 * math.pi) / 9)
    assert all(0.4 < growth("ibp", seed=seed) < 2.5 for seed in range(3))
    assert growth("default") > 20


def test_departure_3_the_last_layer_keeps_its_weights_and_what_a_sum_feeds_gets_half():
    drawn = {}
    for how in ("default", "ibp"):
        bounded = BoundedNetwork(build_network("resnet8-w16", (1, 8, 8), 3))
        draw_weights(bounded, how, seed=5)
        drawn[how] = bounded.network
    assert torch.equal(drawn["ibp"].head.weight, drawn["default"].head.weight)
    names = {module: name for name, module in drawn["ibp"].named_modules()}
    halved = {names[module] for module in fed_by_sums(BoundedNetwork(drawn["ibp"]))}
    assert halved == {f"features.{block}.{part}.0" for block in (3, 4) for part in ("branch", "shortcut")}
    for name, module in drawn["ibp"].named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            wanted = ibp_std(module.weight[0].numel()) / (2 if name in halved else 1)
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.1)


def test_departure_1_only_full_batches_and_another_rest_each_epoch():
    epochs = [method.full_batches(10, 4, seed=0, epoch=epoch) for epoch in range(4)]
    assert [len(places) for places in epochs] == [8] * 4
    assert len({frozenset(places) for places in epochs}) > 1
    assert sorted(method.full_batches(3, 3, 0, 0)) == [0, 1, 2]


def objective_of(system, given, **changes):
    config = Config(**{"eps": 0.1, "batch_rows": 12, **changes})
    return BoxObjective(system, BoundedNetwork(system.model.train()), given, config)


def test_the_terms_of_each_phase():
    system, given = classifier("cnn3-w2-bn"), examples()
    objective, places = objective_of(system, given), list(range(12))
    twin = copy.deepcopy(system.model)
    objective.at_step(0, 4)
    terms = objective(system.model, places)
    assert set(terms) == {"clean", "tight", "relu"} == set(objective.counts(places))
    plain = F.cross_entropy(twin(given.pixels_BCHW), given.class_B, reduction="sum")
    torch.testing.assert_close(terms["clean"].total, plain)
    # Only clean images reach the running statistics.
    for (key, one), two in zip(system.model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=key)
    assert objective.weights["tight"] == 0.5
    objective.at_step(44, 4)
    assert set(objective(system.model, places)) == {"robust", "tight", "relu"}
    assert objective.weights["relu"] == pytest.approx(0.5 * (1 - objective.eps / 0.1))
    objective.at_step(84, 4)
    (robust,) = objective(system.model, places).values()
    assert objective.eps == 0.1
    margins = BoundedNetwork(twin).bounds(system_box(system, given.pixels_BCHW, 0.1), given.class_B).margins
    torch.testing.assert_close(robust.total, robust_losses(margins).sum())


def test_without_eps_it_is_ordinary_training():
    system, given = classifier("cnn3-w2"), examples()
    objective = objective_of(system, given, eps=0.0)
    objective.at_step(50, 4)
    (clean,) = objective(system.model, list(range(12))).values()
    plain = F.cross_entropy(system.model(given.pixels_BCHW), given.class_B, reduction="sum")
    torch.testing.assert_close(clean.total, plain)


def test_dropout_is_off_while_bounds_are_computed():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 10))
    objective = objective_of(ImageClassifier(network, DIGITS, (1, 8, 8)), examples())
    objective.at_step(200, 1)
    one, two = (objective(network, list(range(12)))["robust"].total for _ in range(2))
    assert torch.equal(one, two)


def test_crops_and_mirrors_stay_images():
    system, given = classifier("cnn3-w2"), examples()
    pixels, _ = objective_of(system, given, crop_padding=2, flip=True)._batch(list(range(12)))
    assert pixels.shape == given.pixels_BCHW.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert not torch.equal(pixels, given.pixels_BCHW)


def by_name(rows):
    return {row.metric: row.value for row in rows if row.item is None and not row.group}


def test_training_proves_more_and_nothing_breaks_a_certificate(digits, tmp_path):
    system = classifier("mlp-w32-bn")
    found, before = {}, {key: value.clone() for key, value in system.model.state_dict().items()}
    for name, eps in (("ordinary", 0.0), ("certified", 0.05)):
        artefact = method.fit(system, digits, quick(eps=eps), Run())
        assert any("running_var" in key for key in artefact.tensors)
        assert all(torch.equal(value, before[key]) for key, value in system.model.state_dict().items())
        with artefact.apply(system) as trained:
            rows = list(method.measure(trained, digits, quick(), Run(folder=tmp_path)))
        found[name] = by_name(rows)
        certified = [row for row in rows if row.metric == "certified"]
        assert [row.item for row in certified] == [record.id for record in digits["test"]]
        assert sum(row.value for row in certified) / 80 == pytest.approx(1 - found[name]["verified_error"])
    assert found["certified"]["verified_error"] < 0.6 < 0.9 < found["ordinary"]["verified_error"]
    for values in found.values():
        assert values["standard_error"] <= values["pgd_error"] <= values["verified_error"]
        assert values["broken_certificates"] == values["points_outside"] == 0
        assert values["certificates_confirmed"] in (1.0, None)
        assert values["margin_gap"] < 1e-5
        shares = [values[f"{state}_share"] for state in ("active", "inactive", "unstable")]
        assert sum(shares) == pytest.approx(1)
    lines = json.loads((tmp_path / "figures.json").read_text())["curves"]["Certified accuracy"]["lines"]
    assert list(lines) == ["verified", "withstands PGD (first 80 images)"]
    assert lines["verified"]["x"] == [0, 0.05, 0.1]
    verified, withstood = (line["y"] for line in lines.values())
    assert verified[0] == withstood[0] == pytest.approx(1 - found["certified"]["standard_error"])
    assert withstood[1] == pytest.approx(1 - found["certified"]["pgd_error"])
    assert all(proven <= left for proven, left in zip(verified, withstood, strict=True))
    assert withstood == sorted(withstood, reverse=True)


def test_attacks_at_radii_go_on_where_the_last_batch_stopped(digits, monkeypatch):
    monkeypatch.setattr(report, "CURVE_ATTACKS", 30)
    system = classifier("mlp-w8")
    given = system.examples(digits["test"][:40])
    whole = report.look(system, given, quick(), Run())
    parts = report.look(system, given, quick(), Run(batch_tokens=8 * report.IMAGES_PER_TOKENS))
    assert parts.withstood == whole.withstood
    assert [len(hits) for hits in whole.withstood.values()] == [30] * 3
    assert not report.look(system, given, quick(attack_steps=0), Run()).withstood
    assert not report.look(system, given, quick(curve_points=0), Run()).withstood
    assert [len(hits) for hits in report.look(system, given, quick(eps=0), Run()).curve.values()] == [40]


def test_departure_4_a_classifier_of_ones_own_with_its_normalisation_is_checked_in_pixels(digits):
    system = classifier("cnn3-w2-bn", mean=(0.3,), std=(0.25,))
    found = report.look(
        system, system.examples(digits["test"][:20]), quick(eps=0.001, checked_rows=20), Run()
    )
    assert len(found.confirmed) == sum(found.verified)
    assert all(found.confirmed)
    assert 0 < found.margin_gap < 1e-5
    assert found.num_points == 20 * report.POINTS
    # The radius of the first box is eps / std, less what the limits cut.
    assert 0.001 / 0.25 / 2 <= found.layers[0].radius / found.layers[0].num <= 0.001 / 0.25 * 1.001


def test_the_check_sees_a_wrong_bound(digits):
    system, given = classifier("mlp-w16"), examples()
    bounded = BoundedNetwork(system.model)
    margins = bounded.bounds(system_box(system, given.pixels_BCHW, 0.05), given.class_B).margins.detach()
    found = report.Findings()
    report._check(system, given, margins + 10.0, quick(), found, seed=0)
    assert not all(found.confirmed)
    assert found.margin_gap > 1
    assert found.num_outside > 0


def test_crown_margins_act_while_eps_grows(digits):
    """At eps_t the robust loss is that of f linear + (1 - f) interval margins, f = 1 - eps_t / eps; at eps it is plain IBP."""
    system = classifier("mlp-w8")
    given, bounded, terms = system.examples(digits["train"][:20]), BoundedNetwork(system.model), {}
    for crown in (False, True):
        objective = BoxObjective(system, bounded, given, quick(crown=crown, clean_epochs=0, ramp_epochs=8))
        for step in (6, 8):
            objective.at_step(step, 1)
            terms[crown, step] = objective(system.model, range(20))["robust"].total
    assert torch.equal(terms[True, 8], terms[False, 8])
    assert terms[True, 6] < terms[False, 6]
    objective.at_step(6, 1)
    inputs = system_box(system, given.pixels_BCHW, objective.eps)
    found = bounded.bounds(inputs, given.class_B, hidden=True)
    linear = linear_margins(bounded, inputs, found, given.class_B)
    share = 1 - objective.eps / 0.05
    wanted = robust_losses(mixed_margins(linear, found.margins, share)).sum()
    assert torch.allclose(terms[True, 6], wanted)
    weight = next(system.model.parameters())
    assert not torch.equal(*(torch.autograd.grad(terms[crown, 6], weight)[0] for crown in (True, False)))


def test_crown_training_proves_much(digits):
    system = classifier("mlp-w16-bn")
    with method.fit(system, digits, quick(crown=True), Run()).apply(system) as trained:
        rows = by_name(method.measure(trained, digits, quick(attack_steps=0), Run()))
    assert rows["verified_error"] < 0.7


def test_the_learning_rate_drops_after_the_given_epochs(digits):
    system, config = classifier("mlp-w8"), quick(num_epochs=6, ramp_epochs=2, lr_drops=(3, 5), lr=1e-3)
    given = system.examples(digits["train"])
    model = system.model
    log = method.learn(system, BoundedNetwork(model), list(model.parameters()), given, config, Run())
    assert log.lr[::4] == pytest.approx([1e-3, 1e-3, 1e-3, 2e-4, 2e-4, 4e-5])


def test_a_stopped_run_resumes_to_the_same_weights_and_statistics(digits, tmp_path):
    system, config = classifier("mlp-w8-bn"), quick(num_epochs=8)

    def dying(items, **_):
        for place, item in enumerate(items):
            if place == 20:
                raise KeyboardInterrupt
            yield item

    whole = method.fit(system, digits, config, Run())
    with pytest.raises(KeyboardInterrupt):
        method.fit(system, digits, config, Run(folder=tmp_path, checkpoint_every=8, ticker=dying))
    again = method.fit(system, digits, config, Run(folder=tmp_path, checkpoint_every=8, resume=True))
    assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 8.0}, "divided by 255"),
        ({"more_eps": (0.1, 2.0)}, "divided by 255"),
        ({"num_epochs": 10}, "the ramp must end before"),
        ({"batch_rows": 0}, "at least 1"),
        ({"num_epochs": 0, "init": "keep"}, "draws none"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_bad_inputs_are_refused(digits):
    with pytest.raises(DataError, match="at least 2 images"):
        method.fit(classifier("mlp-w8-bn"), digits, quick(batch_rows=1), Run())
    gelu = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10))
    for call in (method.fit, lambda *given: list(method.measure(*given))):
        with pytest.raises(ModelError, match="No bound rule for GELU"):
            call(ImageClassifier(gelu, DIGITS, (1, 8, 8)), digits, quick(), Run())
    half = classifier("mlp-w8")
    half.model.bfloat16()
    with pytest.raises(ModelError, match="needs weights in float32"):
        list(method.measure(half, digits, quick(), Run()))
    with pytest.raises(NumericsError, match="The bounds exploded: take init=ibp"):
        method.fit(classifier("mlp-w8"), digits, quick(lr=1e30), Run())
    with pytest.raises(DataError, match="is none of the 4 classes"):
        method.fit(classifier("mlp-w8", num_classes=4), digits, quick(), Run())


def test_no_epoch_leaves_the_first_weights():
    data = Data({"train": [Labelled("", 0, picture) for picture in _pictures()]})
    system = classifier("mlp-w8-bn")
    artefact = method.fit(system, data, Config(num_epochs=0), Run(seed=4))
    bounded = BoundedNetwork(copy.deepcopy(system.model))
    draw_weights(bounded, "ibp", seed=4)
    for name, tensor in artefact.tensors.items():
        assert torch.equal(tensor, bounded.network.state_dict()[name])


def _pictures():
    from temper.data.pictures import Picture

    return [Picture.from_array(torch.zeros(8, 8, dtype=torch.uint8).numpy())] * 2
