"""Tasks and metrics of label-agnostic forgetting: what is drawn, what is stamped, what the numbers mean."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.loading import load_data, write_jsonl
from temper.data.pictures import Picture
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.method import fit, make, measure
from temper.methods.unlearning.laf.metrics import (
    Part,
    Seen,
    attack_accuracy,
    membership,
    prepare,
    probe,
    report,
    total_variation,
)
from temper.methods.unlearning.laf.tasks import TRUE_LABEL, build_task, stamp
from temper.systems.loading import load_base

RUN = Run(seed=0)


def grey(value: int, side: int = 8) -> Picture:
    return Picture.from_array(np.full((side, side), value, np.uint8))


def rows(num: int, prefix: str, num_classes: int = 5) -> list[Labelled]:
    return [Labelled("", i % num_classes, grey(i % 256), id=f"{prefix}{i}") for i in range(num)]


DATA = Data({"train": rows(100, "a"), "test": rows(20, "b")})


def task(seed: int = 0, data: Data = DATA, **settings) -> Data:
    return build_task(data, Config(**settings), seed)


# Tasks


def test_a_class_goes_whole_and_its_test_rows_stand_apart():
    parts = task(task="class", classes=("2", "3"))
    assert {part: len(found) for part, found in parts.items()} == {
        "forget": 40, "retain": 60, "test": 12, "test_forget": 8,
    }  # fmt: skip
    assert {record.label for part in ("forget", "test_forget") for record in parts[part]} == {2, 3}


def test_random_rows_come_from_their_classes_by_share():
    parts = task(task="random", classes=("3", "4"), share=0.4)
    assert Counter(record.label for record in parts["forget"]) == {3: 8, 4: 8}
    assert len(parts["retain"]) == 84
    assert set(parts) == {"forget", "retain", "test"}
    assert not {r.id for r in parts["forget"]} & {r.id for r in parts["retain"]}


def test_departure_6_wrong_labels_are_drawn_among_all_others():
    many = Data({"train": rows(2000, "a"), "test": rows(5, "b")})
    parts = task(data=many, task="noisy", classes=("0",), share=0.6)
    drawn = Counter(record.label for record in parts["forget"])
    assert set(drawn) == {1, 2, 3, 4}
    assert min(drawn.values()) > 40
    assert {record.extra[TRUE_LABEL] for record in parts["forget"]} == {0}


def test_departure_9_a_trigger_is_stamped_and_leads_to_the_target():
    parts = task(task="backdoor", share=0.25, target="1")
    assert len(parts["forget"]) == 4 * 5
    for part in ("forget", "triggered"):
        assert {record.label for record in parts[part]} == {1}
        assert 1 not in {record.extra[TRUE_LABEL] for record in parts[part]}
    assert len(parts["triggered"]) == 16
    assert len(parts["test"]) == 20
    picture = parts["forget"][0].image.array()[:, :, 0]
    assert (picture[4:7, 4:7] == 255).all()
    assert (picture != 255).sum() == 64 - 9


def test_stamp_leaves_the_picture_and_fits_colours():
    colour = Picture.from_array(np.zeros((6, 9, 3), np.uint8))
    stamped = stamp(colour, 2).array()
    assert stamped.sum() == 255 * 4 * 3
    assert (stamped[3:5, 6:8] == 255).all()
    assert not colour.pixels.any()
    with pytest.raises(ConfigError, match="A patch of 5 px does not fit a picture of 6 x 9"):
        stamp(colour, 5)


def test_seeds_draw_other_rows_and_the_same_again():
    first, again, other = (task(seed, task="random", share=0.3) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert {r.id for r in first["forget"]} != {r.id for r in other["forget"]}


def test_names_of_an_image_folder_keep_their_places():
    named = [
        dataclasses.replace(r, label=f"c{r.label}", extra={"class_index": r.label}) for r in DATA["train"]
    ]
    data = Data({"train": named, "test": named[:20]})
    system = load_base("new:mlp-w4:1x8x8:5")
    for name in ("noisy", "backdoor"):
        forget = task(data=data, task=name, share=0.5, target="c1")["forget"]
        assert system.class_ids(forget).tolist() == [int(r.label[1:]) for r in forget]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"task": "class"}, ConfigError, "names no class"),
        ({"task": "class", "classes": ("9",)}, ConfigError, "No row is of class '9'"),
        ({"task": "class", "classes": tuple("01234")}, DataError, "100 of 100 rows would be forgotten"),
        ({"task": "random", "share": 0.001}, DataError, "0 of 100 rows would be forgotten"),
        ({"task": "backdoor", "target": "9"}, ConfigError, "No row is of class '9'"),
    ],
)
def test_tasks_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        task(**settings)


def test_texts_and_one_class():
    with pytest.raises(DataError, match="a text and no image"):
        task(data=Data({"train": [Labelled("words", 1)], "test": rows(2, "b")}), task="random")
    one = Data({"train": rows(20, "a", 1), "test": rows(2, "b", 1)})
    with pytest.raises(DataError, match="no label can be wrong"):
        task(data=one, task="noisy", share=0.5)


def test_a_written_task_reads_back(tmp_path):
    parts = task(task="backdoor", share=0.25)
    for part, found in parts.items():
        write_jsonl(tmp_path / f"{part}.jsonl", found)
    assert load_data(f"{tmp_path}/")["forget"][0].image.array().max() == 255


# Metrics


def part(labels, true=None) -> Part:
    classes = torch.tensor(labels)
    ids = [f"i{i}" for i in range(len(labels))]
    return Part(
        ids, torch.zeros(len(labels), 1, 1, 1), classes, classes if true is None else torch.tensor(true)
    )


def says(labels, sure: float = 5.0, num_classes: int = 3) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(torch.tensor(labels), num_classes).float()


def values(found) -> dict[str, float]:
    return {row.metric: row.value for row in found if row.item is None}


def tell(labels: dict[str, list[int]], **parts: Part) -> tuple[Seen, dict[str, Part]]:
    logits = {name: says(found) for name, found in labels.items()}
    return Seen(
        logits, {name: found + torch.rand(found.shape) * 0.01 for name, found in logits.items()}
    ), parts


def test_accuracies_by_hand():
    parts = {
        "retain": part([0, 1, 2, 0]), "forget": part([1, 1], true=[2, 1]), "test": part([0, 1, 2, 1]), "test_forget": part([2, 2]),
        "triggered": part([0, 0]),
    }  # fmt: skip
    seen, parts = tell(
        {
            "retain": [0, 1, 2, 1],
            "forget": [2, 2],
            "test": [0, 0, 0, 0],
            "test_forget": [2, 0],
            "triggered": [0, 1],
        },
        **parts,
    )
    retrained, _ = tell(
        {
            "retain": [0, 1, 2, 0],
            "forget": [2, 1],
            "test": [0, 1, 2, 1],
            "test_forget": [0, 0],
            "triggered": [1, 1],
        },
        **parts,
    )
    found = list(report(seen, parts, RUN, retrained))
    got = values(found)
    expected = {
        "train_r_accuracy": 0.75, "train_f_accuracy": 0.0, "test_r_accuracy": 0.25, "test_f_accuracy": 0.5,
        "trigger_success": 0.5, "train_f_true_accuracy": 0.5, "train_r_gap": 0.25, "train_f_gap": 0.5, "test_r_gap": 0.75,
        "test_f_gap": 0.5, "retrained_gap": 0.5,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert [(row.item, row.value) for row in found if row.item] == [("i0", 1.0), ("i1", 0.0)]


def test_total_variation():
    assert total_variation(says([0, 1]), says([0, 1])) == 0
    assert total_variation(says([0], 50), says([1], 50)) == pytest.approx(1)
    half = torch.tensor([[0.0, 0.0]])
    assert total_variation(half, torch.tensor([[100.0, 0.0]])) == pytest.approx(0.5)


def test_an_attacker_finds_sure_members_and_guesses_otherwise():
    generator = torch.Generator().manual_seed(0)
    unsure = [torch.randn(200, 4, generator=generator) for _ in range(4)]
    assert 0.35 < attack_accuracy(*unsure, seed=0) < 0.65
    sure = [unsure[0] * 10, unsure[1], unsure[2] * 10, unsure[3]]
    assert attack_accuracy(*sure, seed=0) > 0.9
    forgotten = [unsure[0] * 10, unsure[1], unsure[2], unsure[3]]
    assert attack_accuracy(*forgotten, seed=0) < 0.65


def test_departure_8_the_attacks_rows_are_as_many_and_apart(monkeypatch):
    from temper.methods.unlearning.laf import metrics

    given = []
    monkeypatch.setattr(metrics, "attack_accuracy", lambda *logits, seed=0: given.extend(logits[:4]) or 0.5)
    logits = {
        "retain": torch.arange(30.0)[:, None], "forget": torch.arange(100.0, 108)[:, None], "test": torch.arange(200.0, 220)[:, None],
    }  # fmt: skip
    membership(Seen(logits, {}), seed=0)
    seen_in_training, tried = (set(given[place].flatten().tolist()) for place in (1, 3))
    assert not seen_in_training & tried
    assert len(seen_in_training) == len(tried) == 10
    assert set(given[2].flatten().tolist()) == set(range(100, 108))


def test_a_probe_reads_what_embeddings_hold():
    parts = {
        "retain": part([0, 1] * 10),
        "forget": part([1] * 5, true=[2] * 5),
        "test": part([0, 1]),
        "test_forget": part([2, 2]),
    }
    held, _ = tell({"retain": [0, 1] * 10, "forget": [2] * 5, "test": [0, 1], "test_forget": [2, 2]}, **parts)
    assert probe(held, parts) == {"probe_r_accuracy": 1.0, "probe_f_accuracy": 1.0}
    gone, _ = tell({"retain": [0, 1] * 10, "forget": [0] * 5, "test": [0, 1], "test_forget": [0, 0]}, **parts)
    assert probe(gone, parts)["probe_f_accuracy"] == 0.0


def test_true_classes_come_from_the_other_rows():
    system = load_base("new:mlp-w4:1x8x8:5")
    parts = prepare(system, task(task="noisy", classes=("0",), share=0.5), Config())
    assert set(parts["forget"].true_N.tolist()) == {0}
    assert 0 not in parts["forget"].class_N.tolist()
    assert torch.equal(parts["retain"].true_N, parts["retain"].class_N)


def test_distances_to_a_named_reference(tmp_path):
    data = make(None, load_data("builtin:quadrants"), Config(task="class", classes=("0",)), RUN)  # type: ignore[arg-type]
    system = load_base("tiny:cnn")
    learnt = fit(system, data, Config(technique="retrain", learn_epochs=2, learn_lr=1e-2), RUN)  # type: ignore[arg-type]
    folder = learnt.save(tmp_path / "retrained")
    spec = f"tiny:cnn+{folder}"
    far = values(measure(system, data, Config(reference=spec), RUN))  # type: ignore[arg-type]
    assert far["retrained_distance"] > 0
    with learnt.apply(system) as same:
        near = values(measure(same, data, Config(reference=spec), RUN))
    assert near["retrained_gap"] == near["retrained_distance"] == near["membership_gap"] == 0
    assert "retrained_gap" not in values(measure(system, data, Config(), RUN))  # type: ignore[arg-type]
