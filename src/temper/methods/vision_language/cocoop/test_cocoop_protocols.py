"""CoOp and CoCoOp: which classes are base and new, few-shot draws, what is measured, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from temper.core import config as core_config
from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.pictures import Picture
from temper.data.schemas import Data, Labelled
from temper.data.worlds import load_world
from temper.methods.vision_language.cocoop.card import Config
from temper.methods.vision_language.cocoop.conftest import quick, shapes
from temper.methods.vision_language.cocoop.method import fit, measure
from temper.methods.vision_language.cocoop.probe import probe_accuracy
from temper.methods.vision_language.cocoop.protocols import (
    class_names,
    draw_shots,
    harmonic_mean,
    split_classes,
)
from temper.systems.dual_encoder import DualEncoder

# ---- protocols


def test_halves_are_by_label_and_rounded_up() -> None:
    assert split_classes("abcde") == (("a", "b", "c"), ("d", "e"))
    records = [
        Labelled("", label, extra={"name": name})
        for label, name in ((10, "ten_things"), (9, "nine"), (11, "eleven"))
    ]
    assert class_names(records) == ("nine", "ten things", "eleven"), "as numbers, not as texts"
    assert split_classes("abcde", base="ec") == (("c", "e"), ("a", "b", "d"))
    assert split_classes("abcde", base="ec", new="ea") == (("c", "e"), ("a",))


def test_shots_are_drawn_by_the_seed() -> None:
    records = [Labelled("", "ab"[at % 2], id=str(at)) for at in range(20)]
    drawn = [[r.id for r in draw_shots(records, ("a", "b"), 3, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [int(each) % 2 for each in drawn[0]] == [0, 0, 0, 1, 1, 1]
    assert len(draw_shots(records, ("a",), 50, 0)) == 10
    with pytest.raises(DataError, match="'c' has no training picture"):
        draw_shots(records, ("a", "c"), 3, 0)


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(0.8, 0.4) == pytest.approx(0.64 / 1.2)
    assert harmonic_mean(0.0, 0.9) == 0
    paper = [(69.34, 74.22, 71.70), (82.69, 63.22, 71.66), (80.47, 71.69, 75.83)]
    for base, new, mean in paper:
        assert harmonic_mean(base, new) == pytest.approx(mean, abs=0.006)


def values(system: DualEncoder, data: Data, config: Config) -> dict[str, Any]:
    return {row.metric + row.group: row.value for row in measure(system, data, config, Run())}


def test_groups_are_measured_among_their_own_names(system: DualEncoder) -> None:
    data = shapes(limit=40, part="test")
    found = values(system, data, quick())
    names = class_names(data["test"])  # type: ignore[arg-type]
    rows = [r for r in data["test"] if r.extra["name"] in names[5:]]
    scores = system.class_logits(system.pixels([r.image for r in rows]), names[5:])  # type: ignore[attr-defined]
    right = [names[5:][best] == r.extra["name"] for best, r in zip(scores.argmax(1), rows, strict=True)]
    assert found["accuracy_new"] == pytest.approx(np.mean(right))
    assert found["gap"] == pytest.approx(found["accuracy_base"] - found["accuracy_new"])
    assert found["harmonic_mean"] == pytest.approx(
        harmonic_mean(found["accuracy_base"], found["accuracy_new"])
    )
    assert found["trained_parameters"] == 0


def test_classes_without_test_pictures_keep_the_halves(system: DualEncoder) -> None:
    """Ten classes in train, the last of which has no test picture: five are base all the same."""
    train, test = shapes()["train"], [r for r in shapes(40, "test")["test"] if r.label != 9]  # type: ignore[attr-defined]
    found = values(system, Data({"train": train, "test": test}), quick())
    names = class_names(train)  # type: ignore[arg-type]
    rows = [r for r in test if r.extra["name"] in names[:5]]
    scores = system.class_logits(system.pixels([r.image for r in rows]), names[:5])  # type: ignore[attr-defined]
    right = [names[best] == r.extra["name"] for best, r in zip(scores.argmax(1), rows, strict=True)]
    assert found["accuracy_base"] == pytest.approx(np.mean(right))


def test_learned_classes_are_not_new(system: DualEncoder) -> None:
    artefact = fit(system, shapes(), quick(protocol="all"), Run())
    with artefact.apply(system) as changed:
        with pytest.raises(ConfigError, match=r"5 of 5 new classes were learned, 'star' among them"):
            values(changed, shapes(part="test"), quick())
        assert "accuracy" in values(changed, shapes(part="test"), quick(protocol="all"))


def test_domains(system: DualEncoder) -> None:
    rows = load_world("captions:DOM32:test", 80)["test"]
    config = quick(protocol="all", domain_column="style", source_domain="flat", label="there")
    found = values(system, Data({"test": rows}), config)
    others = [value for name, value in found.items() if name.startswith("there_accuracy_domain")]
    assert len(others) == 8
    mean = (sum(others) - found["there_accuracy_domainflat"]) / 7
    assert found["there_accuracy_shifted"] == pytest.approx(mean)
    assert found["there_accuracy"] == pytest.approx(sum(others) / 8)
    with pytest.raises(DataError, match="no column 'where'"):
        values(system, Data({"test": rows}), quick(protocol="all", domain_column="where"))


def test_a_linear_probe_separates_what_can_be_separated(system: DualEncoder) -> None:
    rows = [
        Labelled(
            "",
            ("dark", "light")[at % 2],
            Picture.from_array(np.full((16, 16, 3), 40 + 160 * (at % 2) + at, np.uint8)),
            id=str(at),
        )
        for at in range(12)
    ]
    assert probe_accuracy(system, rows[:8], rows[8:]) == 1.0
    few = [row for row in shapes()["train"] if row.label > 7]  # type: ignore[attr-defined]
    data = Data({"train": few, "test": shapes(part="test")["test"]})
    with pytest.raises(DataError, match=r"no training picture"):
        values(system, data, quick(probe=True))
    with pytest.raises(DataError, match="needs the part train"):
        values(system, shapes(part="test"), quick(probe=True))


def test_figures_for_the_report(system: DualEncoder, tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    fit(system, shapes(), quick(), run)
    list(measure(system, shapes(40, "test"), quick(), run))
    figures = json.loads((tmp_path / "figures.json").read_text())
    line = figures["curves"]["Training loss"]["lines"]["cocoop"]
    assert len(line["x"]) == len(line["y"]) == 6, "ten pictures of five classes in batches of four, twice"
    assert [title.split(":")[0] for title in figures["pictures"]] == ["Base classes", "New classes"]
    (first, *_) = figures["pictures"].values()
    shown = Picture.from_bytes(base64.b64decode(first["png"])).array()
    assert shown.shape == (2 * 72, 12 * 72, 3), "twenty pictures, twelve in a row"


# ---- bad input


def test_departure_8_classes_without_names(system: DualEncoder) -> None:
    picture = Picture.from_array(np.zeros((16, 16, 3), np.uint8))
    data = Data({"train": [Labelled("", at % 3, picture, id=f"row-{at}") for at in range(6)]})
    with pytest.raises(DataError, match=r"class 0 has no name.*row-0.*column `name`"):
        fit(system, data, quick(), Run())


def test_bad_classes(system: DualEncoder) -> None:
    def record(label: int | str, name: str = "", image: bool = True) -> Labelled:
        picture = Picture.from_array(np.zeros((16, 16, 3), np.uint8)) if image else None
        return Labelled("", label, picture, id="row-5", extra={"name": name} if name else {})

    with pytest.raises(DataError, match="two names, 'star' and 'ring'"):
        class_names([record(0, "star"), record(0, "ring")])
    with pytest.raises(DataError, match="Two classes have the name 'star'"):
        class_names([record(0, "star"), record(1, "star")])
    with pytest.raises(DataError, match="1 class names are too few"):
        fit(system, Data({"train": [record("star")]}), quick(), Run())
    with pytest.raises(DataError, match=r"at least two classes in each group"):
        values(system, Data({"test": [record("star"), record("ring")]}), quick())
    with pytest.raises(DataError, match=r"holds a text and no image.*row-5"):
        fit(
            system,
            Data({"train": [record("star", image=False), record("ring")]}),
            quick(protocol="all"),
            Run(),
        )
    with pytest.raises(DataError, match="'zebra' is not among"):
        fit(system, Data({"train": [record("zebra"), record("star")]}), quick(protocol="all"), Run())
    with pytest.raises(ConfigError, match=r"No row is of the class 'comet'"):
        fit(system, shapes(), quick(base=("circle", "comet")), Run())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "coop2"}, "not a valid value"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"per_class": True}, "per_class belongs to coop"),
        ({"source_domain": "flat"}, "needs domain_column"),
        ({"new": ["star"]}, "new needs base"),
        ({"lr": 0}, "lr must be above 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core_config.build(Config, [("test", settings)])
