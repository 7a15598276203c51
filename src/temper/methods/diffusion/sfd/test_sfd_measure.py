"""What is measured: rates by hand, the detector, real pictures, strips of drawings, and the toy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from temper.core.errors import ConfigError, ModelError
from temper.core.types import Run
from temper.data.schemas import Data, Labelled
from temper.methods.diffusion.sfd import method, quality, toy
from temper.methods.diffusion.sfd.card import Config
from temper.methods.diffusion.sfd.conftest import EMPTY, QUICK, tiny
from temper.methods.diffusion.sfd.method import SLUG, measure
from temper.systems.diffusion import Condition


def wanted_of(shows: list[int]) -> quality.Wanted:
    return quality.Wanted(tuple(shows), torch.tensor(shows), ("a", "b", "c"), 0, 1)


def test_rates_by_hand() -> None:
    """Asked a a b b c; seen a b b c c."""
    scores = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 2, 2]), 3).float() * 50
    rows = {(r.metric, r.group): r.value for r in quality.rate_rows(scores, wanted_of([0, 0, 1, 1, 2]))}
    assert rows["forget_rate", ""] == rows["unlearning_accuracy", ""] == rows["override_rate", ""] == 0.5
    assert rows["retain_rate", ""] == pytest.approx(2 / 3)
    assert (rows["class_rate", "b"], rows["class_rate", "c"]) == (0.5, 1.0)
    assert rows["forget_entropy_nats", ""] == pytest.approx(0, abs=1e-6)
    assert rows["forget_probability", ""] == pytest.approx(0.5, abs=1e-6)


def test_a_detector_goes_by_names_or_by_order() -> None:
    by_order = quality.load_detector("tiny:resnet", ("w", "x", "y", "z"), Run())
    assert by_order.columns == [0, 1, 2, 3]
    classes = by_order.system.classes
    assert quality.load_detector("tiny:resnet", classes[2:], Run()).columns == [2, 3]
    with pytest.raises(ModelError, match="no class"):
        quality.load_detector("tiny:resnet", ("w", "x"), Run())


def test_real_pictures_leave_the_forgotten_class_out() -> None:
    system = tiny()
    pictures = system.draw(system.conditions([0, 1]), num_steps=2)
    records = [
        Labelled("", label, image=picture)
        for label, picture in zip(("circle", "square"), pictures, strict=True)
    ]
    shown = quality.Wanted((), torch.tensor([]), system.labels, 0, 1)
    assert quality.real_pictures(records, shown) == [pictures[1]]
    numbered = [dataclasses.replace(record, label=at) for at, record in enumerate(records)]
    assert quality.real_pictures(numbered, shown) == [pictures[1]]
    written = [dataclasses.replace(record, label=str(at)) for at, record in enumerate(records)]
    assert quality.real_pictures(written, shown) == [pictures[1]]
    digits = dataclasses.replace(shown, names=("7", "0"))
    named = [dataclasses.replace(record, label=name) for name, record in zip("70", records, strict=True)]
    assert quality.real_pictures(named, digits) == [pictures[1]], "a text that is a name is no number"
    config = Config(detector="tiny:resnet", num_samples=2, sample_steps=2)
    rows = list(measure(system, Data({"real": [*records, records[1]]}), config, Run()))
    assert {"frechet", "mmd"} <= {row.metric for row in rows}


def test_strips_are_of_each_name_the_forgotten_one_first() -> None:
    """At one place every model draws from the same noise, so strips of several models can be laid side by side."""
    system = tiny()
    config = Config(forget="square", override="circle", num_samples=3, sample_steps=2)
    wanted = method._wanted(system, EMPTY, config)
    pictures, _ = quality.draw_all(system, wanted, config, 0)
    shown = quality.strips(pictures, wanted, num_each=2)
    assert list(shown) == ["square (forgotten)", "circle", "triangle", "star"]
    assert all(strip.array().shape == (8, 16, 3) for strip in shown.values())
    assert (shown["circle"].array()[:, 8:] == pictures[1].array()).all()


# the toy


def test_the_toys_truth_is_seen_as_it_is() -> None:
    label_N = torch.arange(8).repeat(50)
    points_N2 = toy.real(label_N, torch.Generator().manual_seed(0))
    assert (toy.scores(points_N2).argmax(1) == label_N).float().mean() > 0.99
    assert toy.centres()[2].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)


def test_the_toy_is_the_same_for_the_same_seed() -> None:
    config = Config(toy=True, toy_steps=3, num_samples=3, **QUICK)
    first, second = ([(r.metric, r.value) for r in toy.measure(config, Run(seed=2))[0]] for _ in range(2))
    assert [r for r in first if not r[0].endswith("_s")] == [r for r in second if not r[0].endswith("_s")]
    assert all(row.split == "toy" for row in toy.measure(config, Run(seed=2))[0])


def test_only_the_toy_says_what_it_takes() -> None:
    toy_s = [
        method.estimate({}, None, Config(toy=True, objective=name))["seconds"] for name in ("sfd", "sid")
    ]
    assert toy_s[0] > toy_s[1] > 0
    assert method.estimate({}, None, Config()) == {}


def test_the_toys_classes_are_numbers() -> None:
    for wrong in ("star", 8):
        with pytest.raises(ConfigError, match="toy has no class"):
            toy.measure(Config(toy=True, toy_steps=2, forget=wrong, **QUICK), Run())


def test_the_toy_asks_its_own_detector_for_overrides() -> None:
    config = Config(toy=True, override_mode="amax", **QUICK)
    problem = toy.problem_of(toy.teach(2, 0), config)
    assert problem.pseudo is not None
    rng = torch.Generator().manual_seed(0)
    assert problem.pseudo(toy.centres()[[3, 0]], rng).values.tolist()[0] == 3
    assert problem.pseudo(toy.centres()[[0]], rng).values.tolist()[0] in (1, 7)
    assert isinstance(problem.pair(2, rng)[0], Condition)
    assert dataclasses.is_dataclass(problem)
    assert SLUG == "sfd"
