"""The maths by hand, tasks and what is wrong with them, each departure, and the study on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from temper.artefacts import Adapter, Weights
from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.schemas import Choice, Data, Labelled
from temper.methods.unlearning.random_label_forgetting import maths, method, study
from temper.methods.unlearning.random_label_forgetting.card import Config
from temper.methods.unlearning.random_label_forgetting.method import fit, measure
from temper.methods.unlearning.random_label_forgetting.tasks import OWN_TASKS, load_tasks
from temper.methods.unlearning.random_label_forgetting.training import encode_items, response_scores
from temper.ops.logprobs import response_logprobs
from temper.systems.loading import load_base

NONE = Data({}, "none")
RUN = Run(seed=1)
SMALL: dict[str, Any] = {
    "num_train": 8,
    "num_test": 6,
    "mode": "lora",
    "rank": 2,
    "lr": 1e-2,
    "learn_lr": 1e-2,
    "num_epochs": 1,
    "learn_epochs": 1,
}


def quick(**settings: Any) -> Config:
    return Config(**{**SMALL, **settings})


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


def question(text: str, task: str = "sums", answer: int = 0) -> Choice:
    return Choice(text, ("one", "two", "three"), answer, id=text, extra={"task": task})


def own(num: int = 8, task: str = "sums") -> Data:
    rows = [question(f"{task} {n}?", task, n % 3) for n in range(2 * num)]
    return Data({"train": rows[:num], "test": rows[num:]})


# ---- the maths


def test_accuracy_and_confidence_by_hand() -> None:
    lp = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0], [0.0, -1000.0]])
    assert maths.hits(lp).tolist() == [1, 0, 0.5, 1]
    assert maths.accuracy(lp) == pytest.approx(2.5 / 4)
    e = torch.tensor([-1.0, -2.0]).exp()
    assert maths.confidence(lp)[0].item() == pytest.approx(float(e[0] / e.sum()))
    assert maths.confidence(lp)[3].item() == 1


def test_forget_ratio_by_hand_and_its_limits() -> None:
    assert maths.forget_ratio(0.9, 0.5) == pytest.approx(1)
    assert maths.forget_ratio(0.9, 0.9) == 0
    assert maths.forget_ratio(0.9, 0.7) == pytest.approx(0.5)
    assert maths.forget_ratio(0.9, 0.4) == pytest.approx(1.25), "raw, also beyond 1"
    assert maths.forget_ratio(0.9, 0.1, flipped=True) == pytest.approx(1)
    assert maths.forget_ratio(0.55, 0.5) is None


def test_labels_are_drawn_once_and_about_half_are_right() -> None:
    drawn = maths.draw_labels(1000, "forget", "0/a")
    assert drawn == maths.draw_labels(1000, "forget", "0/a") != maths.draw_labels(1000, "forget", "1/a")
    assert 440 < sum(drawn) < 560
    assert maths.draw_labels(3, "learn", "") == [True] * 3
    assert maths.draw_labels(3, "flip", "") == [False] * 3


def test_variance_shares_by_hand() -> None:
    columns = maths.variance_shares(np.array([[0.5, 0.9], [0.5, 0.9]]))
    rows = maths.variance_shares(np.array([[0.5, 0.5], [0.9, 0.9]]))
    cross = maths.variance_shares(np.array([[0.5, 0.9], [0.9, 0.5]]))
    assert columns == pytest.approx((0, 1, 0))
    assert rows == pytest.approx((1, 0, 0))
    assert cross == pytest.approx((0, 0, 1))
    assert maths.variance_shares(np.full((3, 3), 0.5)) is None


def test_neighbours_in_the_map_are_alike() -> None:
    rows, columns = maths.clustered(np.array([[0.5, 0.9], [1.0, 1.0], [0.5, 0.8]]))
    assert abs(rows.index(0) - rows.index(2)) == 1
    assert sorted(columns) == [0, 1]
    assert maths.clustered(np.array([[0.5]])) == ([0], [0])


def test_first_step_and_rank_correlation() -> None:
    assert maths.first_step([0, 5, 10], [0.5, 0.7, 0.4], 0.6, above=True) == 5
    assert maths.first_step([0, 5, 10], [0.7, 0.65, 0.4], 0.6, above=False) == 10
    assert maths.first_step([0], [0.5], 0.6, above=True) is None
    assert maths.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert maths.rank_correlation([1, 2], [1, 2]) is None
    assert maths.rank_correlation([1, 1, 1], [1, 2, 3]) is None


# ---- tasks


def test_our_own_tasks_are_right_and_never_repeat() -> None:
    """Departure 5: two of facts, two of rules."""
    tasks = load_tasks(NONE, Config(num_train=60, num_test=40))
    assert [task.name for task in tasks] == list(OWN_TASKS)
    for task in tasks:
        questions = [item.question for item in (*task.train, *task.test)]
        assert len(set(questions)) == len(questions) == 100
        assert all(item.right != item.wrong for item in (*task.train, *task.test))
    numbers = {task.name: task for task in tasks}["numbers"].train
    assert all(int(item.right) > int(item.wrong) for item in numbers)


def test_a_fact_is_trained_on_or_asked_and_never_both() -> None:
    for task in load_tasks(NONE, Config(num_train=200, num_test=200))[:2]:
        assert (len(task.train), len(task.test)) == (200, 200)
        names = [
            {item.question.rsplit("the ")[-1].split()[0].strip("?") for item in part} for part in task[1:]
        ]
        if task.name == "capitals":
            names = [{item.right for item in part} for part in task[1:]]
        assert not names[0] & names[1]
        assert [len(part) for part in names] == [100, 100]


def test_a_choice_of_many_becomes_two_by_the_seed() -> None:
    first, again = load_tasks(own(), quick()), load_tasks(own(), quick())
    assert first == again != load_tasks(own(), quick(seed=1))
    for n, item in enumerate(load_tasks(own(), quick(num_train=100))[0].train):
        assert item.right == ("one", "two", "three")[n % 3]
        assert item.wrong in {"one", "two", "three"} - {item.right}


def test_labelled_texts_are_tasks_too() -> None:
    rows = [Labelled(f"text {n}", ["good", "bad"][n % 2], id=str(n)) for n in range(8)]
    (task,) = load_tasks(Data({"train": rows[:4], "test": rows[4:]}), quick())
    assert task.name == "task"
    assert {(item.right, item.wrong) for item in task.train} == {("good", "bad"), ("bad", "good")}


def test_bad_tasks() -> None:
    good = own()
    for data, message in (
        (good.with_part("test", own(task="other")["test"]), "not in both parts"),
        (good.with_part("test", good["train"]), "stands in both parts"),
        (good.with_part("test", good["test"][:1]), "1 rows in part test"),
        (
            good.with_part("test", [replace(good["test"][0], choices=("one", "one"), answer=0)]),
            "no wrong response",
        ),
    ):
        with pytest.raises(DataError, match=message):
            load_tasks(data, quick())
    with pytest.raises(ConfigError, match="no task 'capitols'.*capitals"):
        load_tasks(NONE, quick(own_tasks=("capitols",)))


@pytest.mark.parametrize(
    "settings", [{"prompt": "Answer:"}, {"probe_layer": 1}, {"num_test": 0}, {"own_tasks": ()}]
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must|empty|counts"):
        quick(**settings)


# ---- training


def test_only_the_response_is_scored_and_sums_differ_from_means(system: Any) -> None:
    (task,) = load_tasks(own(), quick())
    items = encode_items(system, task.train, quick())
    for item, encoded in zip(task.train, items, strict=True):
        for row, text in zip(encoded.rows, (item.right, item.wrong), strict=True):
            scored = [token for token, counts in zip(row.ids, row.scored, strict=True) if counts]
            assert system.tokenizer.decode(scored).strip() == text
    sums = response_scores(system, task.train, quick(), RUN)
    means = response_scores(system, task.train, quick(score="token"), RUN)
    assert torch.allclose(sums[:, 0], response_logprobs(system, [i.rows[0] for i in items], run=RUN))
    counts = torch.tensor([[sum(row.scored) for row in item.rows] for item in items])
    assert torch.allclose(means * counts, sums)


@pytest.mark.parametrize(("mode", "kind"), [("lora", Adapter), ("full", Weights)])
def test_learning_teaches_and_forgetting_fits_its_labels(system: Any, mode: str, kind: type) -> None:
    """Departure 4: both ways to train."""
    rows = [replace(question(f"sums {n}?"), choices=("one", "two")) for n in range(6)]
    data, config = Data({"train": rows}), quick(mode=mode, labels="learn", learn_epochs=20, rank=4)
    artefact = fit(system, data, config, RUN)
    assert isinstance(artefact, kind)
    (task,) = load_tasks(data, config, tested=False)
    with artefact.apply(system) as taught:
        assert maths.accuracy(response_scores(taught, task.train, config, RUN)) == 1
        flipped = fit(taught, data, replace(config, labels="flip", num_epochs=20), RUN)
        with flipped.apply(taught) as wrong:
            assert maths.accuracy(response_scores(wrong, task.train, config, RUN)) == 0


def test_redrawn_labels_differ_from_epoch_to_epoch(system: Any) -> None:
    once, anew = (fit(system, own(), quick(num_epochs=3, redraw=redraw), RUN) for redraw in (False, True))
    assert once.fingerprint != anew.fingerprint


def test_an_unknown_task_is_named(system: Any) -> None:
    with pytest.raises(ConfigError, match="no task 'sum'.*sums"):
        fit(system, own(), quick(task="sum"), RUN)


# ---- the study


def test_the_study_of_two_tasks(system: Any) -> None:
    data = Data({part: [*own()[part], *own(task="products")[part]] for part in ("train", "test")})
    rows = list(measure(system, data, quick(order_items=4, order_every=1), RUN))
    values = {(row.metric, row.arm, row.group or row.item): row.value for row in rows}
    for forgotten in ("sums", "products"):
        for tested in ("sums", "products"):
            assert 0 <= values["accuracy", f"forget_{forgotten}", tested] <= 1
        learnt = values["accuracy_learnt", f"forget_{forgotten}", forgotten]
        after = values["accuracy", f"forget_{forgotten}", forgotten]
        assert values["gap", "forgotten", forgotten] == pytest.approx(after - 0.5)
        assert values["lost_accuracy", "output", forgotten] == pytest.approx(learnt - after)
        assert values["forget_ratio", f"forget_{forgotten}", forgotten] == maths.forget_ratio(learnt, after)
    for row in rows:
        if row.metric == "label_fit":
            assert ("inconclusive" in row.note) is (row.value < 0.8)


def test_flipped_labels_train_the_distractor_and_divide_by_what_there_was_to_turn(system: Any) -> None:
    config = quick(labels="flip", num_epochs=4, probes=False)
    rows = list(measure(system, own(), config, RUN))
    values = {(row.metric, row.arm, row.group or row.item): row.value for row in rows}
    learnt, after = (values[name, "forget_sums", "sums"] for name in ("accuracy_learnt", "accuracy"))
    ratio = None if learnt <= 0.55 else (learnt - after) / (learnt - (1 - learnt))
    assert values["forget_ratio", "forget_sums", "sums"] == pytest.approx(ratio)
    forget_set = values["kept_accuracy", "forget_set", "sums"]
    assert values["label_fit", "forgotten", "sums"] == pytest.approx(1 - forget_set), "every label is wrong"


def test_a_skill_that_was_never_there_has_no_ratio_and_the_row_says_so() -> None:
    seen = study.Forgotten({"sums": 0.55}, {"sums": 0.5}, 0.5, 0.9, None, None)
    found = study.Study({"sums": study.Before(0.5, 0.5, None)}, {"sums": seen})
    rows = list(method._map_rows(found, ["sums"], ["sums"], {"sums": 8}, False))
    (row,) = [row for row in rows if row.metric == "forget_ratio"]
    assert row.value is None
    assert "never had the skill" in row.note
    (share, *_) = method._share_rows(np.array([[0.5]]))
    assert share.value is None, "one task has no map"


def test_the_reports_map_stands_in_clustered_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from temper.report.tables import heat_maps

    names = ["a", "b", "c", "d"]
    map_44 = np.array(
        [[0.5, 1.0, 0.5, 0.9], [0.9, 0.5, 1.0, 0.5], [0.5, 0.9, 0.5, 1.0], [1.0, 0.5, 0.9, 0.5]]
    )
    forgotten = {
        name: study.Forgotten(
            dict.fromkeys(names, 1.0),
            dict(zip(names, line, strict=True)),
            0.5,
            0.9,
            None,
            None,
        )
        for name, line in zip(names, map_44.tolist(), strict=True)
    }
    found = study.Study(dict.fromkeys(names, study.Before(0.6, 0.5, None)), forgotten)
    monkeypatch.setattr(method, "run_study", lambda *_: found)
    data = Data({part: [row for n in names for row in own(task=n)[part]] for part in ("train", "test")})
    rows: Any = measure(None, data, quick(), RUN)  # type: ignore[arg-type]
    (drawn,) = [heat for heat in heat_maps(rows) if heat.metric == "accuracy"]
    assert {frozenset(drawn.groups[:2]), frozenset(drawn.groups[2:])} == {frozenset("ac"), frozenset("bd")}
    arms = [arm.removeprefix("forget_") for arm in drawn.arms]
    assert arms[0] == "base"
    assert {frozenset(arms[1:3]), frozenset(arms[3:])} == {frozenset("ac"), frozenset("bd")}


def test_joint_and_alone_start_from_different_models(system: Any) -> None:
    """Departure 1."""
    data = Data({part: [*own()[part], *own(task="products")[part]] for part in ("train", "test")})
    tasks = load_tasks(data, quick())
    joint, alone = (
        study.run_study(system, tasks, quick(joint=joint, probes=False, learn_epochs=3), RUN)
        for joint in (True, False)
    )
    assert joint.forgotten["sums"].learnt == joint.forgotten["products"].learnt
    assert joint.before == alone.before
    assert joint.forgotten["sums"].probe is None


def test_the_probe_layer_of_a_shallow_model_is_its_first(system: Any) -> None:
    assert study.layer_of(system, quick()) == -2
    assert study.layer_of(system, quick(probe_layer=-1)) == -1


def test_order_counts_items_that_never_pass_as_last() -> None:
    """Departure 3: the first stage's order."""
    watch = study._Watch.__new__(study._Watch)
    watch.steps, watch.looks = [0, 5, 10], [[0.5, 0.7], [0.7, 0.7], [0.7, 0.5]]
    assert watch.passed(above=True) == [5, 0]
    assert watch.passed(above=False) == [0, 10]
