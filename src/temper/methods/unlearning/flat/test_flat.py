"""FLAT by hand: every divergence's signs and slopes, the reductions, templates, departures, and a fit that forgets."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import temper
from temper.artefacts import tuning
from temper.core.errors import ConfigError, DataError, TemperError
from temper.core.types import Message, Row, Run
from temper.data.loading import load_data
from temper.data.schemas import Data, Dialogue, Text
from temper.methods.unlearning.flat import training
from temper.methods.unlearning.flat.card import Config, Divergence
from temper.methods.unlearning.flat.divergences import DIVERGENCES, flat_loss, mean_probabilities
from temper.methods.unlearning.flat.method import fit, measure
from temper.methods.unlearning.flat.training import FlatObjective, Pair, focused, prepare, templates_of
from temper.ops.batching import Example, collate, encode
from temper.ops.logprobs import Scored, score_batch
from temper.systems.loading import load_base

NAMES = sorted(DIVERGENCES)
inside = st.floats(0.02, 0.98)


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def people() -> Data:
    return load_data("builtin:people", {"forget": "Dialogue", "retain": "Dialogue"}, limit=4)


def loss(template: float, forget: float, name: str) -> float:
    pair = (torch.tensor([value], dtype=torch.float64) for value in (template, forget))
    return float(flat_loss(*pair, name))


def quick(**settings: Any) -> Config:
    fast = {"mode": "lora", "rank": 2, "lr": 1e-2, "batch_rows": 4, "num_epochs": 3, "min_steps": 0}
    return Config(**{**fast, "watch_every": 0, **settings})


# ---- the table


def test_every_divergence_by_hand() -> None:
    # P_e = 1/4, P_f = 3/4, each loss written out from the card's closed forms.
    e, t = math.exp, math.tanh
    expected = {
        "tv": -t(0.25) / 2 + t(0.75) / 2,
        "kl": -0.25 + e(-0.25),
        "js": math.log(1 + e(-0.25)) - 2 * math.log(2) + 0.75 + math.log(1 + e(-0.75)),
        "pearson": -0.25 + 0.75**2 / 4 + 0.75,
        "reverse-kl": e(-0.25) + 0.75 - 1,
        "hellinger": e(-0.25) - 1 + e(0.75) - 1,
        "neyman": e(-0.25) - 1 + 2 - 2 * e(-0.375),
        "jeffrey": -0.25 + 0.75 + 0.75**2 / 4 + 0.75**3 / 16,
    }
    assert set(expected) == set(NAMES) == set(get_args(Divergence))
    for name, value in expected.items():
        assert loss(0.25, 0.75, name) == pytest.approx(value), name
    assert loss(0.25, 0.75, "tv") == pytest.approx(0.19512, abs=1e-5), "a number, not a formula"


@pytest.mark.parametrize("name", NAMES)
@given(v=inside)
def test_the_closed_form_is_the_conjugate_of_the_activation(name: str, v: float) -> None:
    pair, v_1 = DIVERGENCES[name], torch.tensor([v], dtype=torch.float64)
    assert float(pair.composed(v_1)) == pytest.approx(float(pair.conjugate(pair.activation(v_1))), abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(template=inside, forget=inside)
def test_the_loss_falls_with_the_template_and_rises_with_the_forget_answer(
    name: str, template: float, forget: float
) -> None:
    assert loss(template + 0.01, forget, name) < loss(template, forget, name)
    assert loss(template, forget + 0.01, name) > loss(template, forget, name)


@pytest.mark.parametrize("name", NAMES)
@given(template=inside, forget=inside)
def test_gradients_are_the_numeric_ones_and_have_their_signs(
    name: str, template: float, forget: float
) -> None:
    e_1 = torch.tensor([template], dtype=torch.float64, requires_grad=True)
    f_1 = torch.tensor([forget], dtype=torch.float64, requires_grad=True)
    flat_loss(e_1, f_1, name).sum().backward()
    h = 1e-6
    by_e = (loss(template + h, forget, name) - loss(template - h, forget, name)) / (2 * h)
    by_f = (loss(template, forget + h, name) - loss(template, forget - h, name)) / (2 * h)
    assert float(e_1.grad) == pytest.approx(by_e, rel=1e-4)  # type: ignore[arg-type]
    assert float(f_1.grad) == pytest.approx(by_f, rel=1e-4)  # type: ignore[arg-type]
    assert by_e < 0 < by_f


@given(inside)
def test_total_variation_is_0_between_equals_and_its_slopes_are_half_sech_squared(v: float) -> None:
    assert loss(v, v, "tv") == 0
    v_1 = torch.tensor([v], dtype=torch.float64, requires_grad=True)
    flat_loss(v_1.detach(), v_1, "tv").sum().backward()
    assert float(v_1.grad) == pytest.approx(0.5 / math.cosh(v) ** 2)  # type: ignore[arg-type]


def test_log_probabilities_are_no_probabilities() -> None:
    for wrong in (torch.tensor([-1.5]), torch.tensor([1.2])):
        with pytest.raises(AssertionError, match="not of log-probabilities"):
            flat_loss(torch.tensor([0.5]), wrong, "tv")


def released(name: str) -> Callable[[float, float], float]:
    """The three rows as the released code computes them, from +P_e and +P_f."""
    e = math.exp
    return {
        "reverse-kl": lambda t, f: e(t) + (-1 - f),
        "hellinger": lambda t, f: -(1 - e(t)) + (1 - e(f)) / e(f),
        "neyman": lambda t, f: -(1 - e(t)) + 2 - 2 * math.sqrt(1 - f),
    }[name]


@pytest.mark.parametrize("name", ["reverse-kl", "hellinger", "neyman"])
def test_departure_1_the_released_rows_push_the_wrong_way(name: str) -> None:
    theirs = released(name)
    assert theirs(0.4, 0.5) > theirs(0.3, 0.5), "it unlearns the template"
    assert loss(0.4, 0.5, name) < loss(0.3, 0.5, name)
    if name != "neyman":  # whose conjugate lost its g, but rises
        assert theirs(0.3, 0.6) < theirs(0.3, 0.5), "and learns the forget answer"
    assert loss(0.3, 0.6, name) > loss(0.3, 0.5, name)


# ---- probabilities and reductions


def test_mean_probability_by_hand() -> None:
    logp_S = torch.tensor([0.5, 0.25, 0.8, 0.1, 0.6]).log()
    found = mean_probabilities(Scored(logp_S, torch.tensor([0, 0, 1, 1, 1]), 2))
    assert found.tolist() == pytest.approx([0.375, 0.5])
    geometric = math.exp(float(logp_S[:2].mean()))
    assert geometric < 0.375, "e^(mean log p) is another number"


def pair_of(forget: list[int], template: list[int]) -> Pair:
    def row(ids: list[int]) -> Example:
        return Example(ids, [False, False] + [True] * (len(ids) - 2))

    return Pair(row(forget), row(template))


PAIRS = [
    pair_of([5, 6, 7, 8, 9, 10, 11], [5, 6, 12]),
    pair_of([9, 8, 7], [9, 8, 20, 21]),
    pair_of([3, 4, 5, 6], [3, 4, 5]),
]


def value_of(system: Any, config: Config, items: list[Pair]) -> float:
    objective = FlatObjective(config, pad_id=system.pad_id, device="cpu")
    found = objective(system.model, items)["flat"]
    return float(found.total.detach()) / found.count


def slow_probability(system: Any, row: Example) -> float:
    """A row on its own, softmax over everything, one token after another."""
    with torch.no_grad():
        p_TV = system.model(input_ids=torch.tensor([row.ids])).logits[0].softmax(-1)
    values = [float(p_TV[t - 1, row.ids[t]]) for t, scored in enumerate(row.scored) if scored]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_agrees_with_a_slow_version(system: Any, name: str) -> None:
    slow = [
        (slow_probability(system, pair.template), slow_probability(system, pair.forget)) for pair in PAIRS
    ]
    expected = sum(loss(template, forget, name) for template, forget in slow) / len(slow)
    assert value_of(system, Config(divergence=name), PAIRS) == pytest.approx(expected, abs=1e-5)  # type: ignore[arg-type]


def test_departure_2_one_loss_a_row_or_one_of_the_means(system: Any) -> None:
    slow = [
        (slow_probability(system, pair.template), slow_probability(system, pair.forget)) for pair in PAIRS
    ]
    template, forget = (sum(values) / len(values) for values in zip(*slow, strict=True))
    pooled = value_of(system, Config(divergence="pearson", reduction="batch_mean"), PAIRS)
    assert pooled == pytest.approx(loss(template, forget, "pearson"), abs=1e-5)
    # Where probabilities differ the two do, since v^2 / 4 is convex.
    far_B, mean_B = torch.tensor([0.0, 1.0]), torch.tensor([0.5])
    each = flat_loss(far_B, far_B, "pearson").mean()
    assert float(each) == pytest.approx(0.125)
    assert float(flat_loss(mean_B, mean_B, "pearson")) == pytest.approx(0.0625)


def test_departure_3_padding_does_not_count(system: Any) -> None:
    short = PAIRS[2].forget
    batch = collate([short, Example([1] * 40, [False] + [True] * 39)], system.pad_id)
    together = mean_probabilities(score_batch(system.model, batch))[0].detach()
    assert float(together) == pytest.approx(slow_probability(system, short), rel=1e-4)
    by_padded_length = slow_probability(system, short) * 2 / 39
    assert float(together) > 10 * by_padded_length


def test_departure_4_two_rows_each_with_its_own_answer(system: Any, people: Data) -> None:
    rows = prepare(system, people, quick(), Run())
    (pair, *_) = rows.pairs(0)
    record: Any = people["forget"][0]
    text = system.tokenizer.decode(pair.template.ids)
    assert "Ruskmere" not in text, "the template's row never saw the forget answer"
    assert "Ruskmere" in system.tokenizer.decode(pair.forget.ids)
    scored = [i for i, on in zip(pair.template.ids, pair.template.scored, strict=True) if on]
    assert any(t in system.tokenizer.decode(scored) for t in training._shipped())
    assert pair.forget == encode(system, record, train_on="last"), "the prompt is masked"


def test_departure_6_any_split_of_a_step_gives_its_loss(system: Any) -> None:
    objective = FlatObjective(Config(divergence="js"), pad_id=system.pad_id, device="cpu")
    assert not objective.unsplittable
    whole = objective(system.model, PAIRS)["flat"]
    parts = [objective(system.model, [pair])["flat"] for pair in PAIRS]
    assert float(whole.total.detach()) == pytest.approx(
        sum(float(part.total.detach()) for part in parts), abs=1e-5
    )
    assert whole.count == sum(part.count for part in parts) == 3
    assert FlatObjective(Config(reduction="batch_mean"), pad_id=0, device="cpu").unsplittable


def test_departure_7_small_forget_sets_get_enough_steps(people: Data, system: Any) -> None:
    with tuning(system, training.tune(quick(), Run()), Run()) as tuned:
        config = quick(min_steps=5, max_steps=0, num_epochs=1)
        done = training.unlearn(tuned, prepare(system, people, config, Run()), (), config, Run())
    assert done.log.num_steps == 5


def test_departure_8_lora_stands_beside_all_weights(people: Data) -> None:
    kinds = {
        mode: fit(load_base("tiny:llama"), people, quick(mode=mode), Run()).kind for mode in ("lora", "full")
    }
    assert kinds == {"lora": "adapter", "full": "weights"}


# ---- templates and focus


def test_departure_5_templates_are_drawn_anew_and_a_rows_own_comes_first(system: Any, people: Data) -> None:
    rows = prepare(system, people, quick(), Run(seed=2))
    assert len(training._shipped()) == len(set(training._shipped())) == 30
    assert rows.pairs(0) == prepare(system, people, quick(), Run(seed=2)).pairs(0)
    drawn = {tuple(rows.template(0, epoch).ids) for epoch in range(12)}
    assert len(drawn) > 3, "another template in another epoch"
    record = Dialogue(
        (Message("user", "Who?"), Message("assistant", "Me.")), id="a", extra={"template": "No."}
    )
    assert templates_of(record, ("Pool.",)) == ("No.",)
    part = people.with_part("templates", [Text("Not that.", id="t")])
    rows = prepare(system, part, quick(), Run())
    assert rows.pools[0] == ("Not that.",)


def test_few_templates_are_said(system: Any, people: Data, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(system, people.with_part("templates", [Text("No.", id="t")]), quick(), Run())
    assert "learnt by heart" in caplog.text


@pytest.mark.parametrize("own", ["", " ", []])
def test_an_empty_pool_is_an_error(own: Any) -> None:
    record = Dialogue((Message("user", "Who?"), Message("assistant", "Me.")), id="a", extra={"template": own})
    with pytest.raises(DataError, match="no template answer"):
        templates_of(record, ("Pool.",))
    with pytest.raises(DataError, match="no template answer"):
        templates_of(Dialogue((Message("user", "Who?"), Message("assistant", "Me.")), id="a"), ())


def test_departure_9_focus_scores_its_tokens_only(system: Any) -> None:
    messages = (Message("user", "Where?"), Message("assistant", "She was born in Ruskmere by the sea."))
    record = Dialogue(messages, id="a", extra={"focus": ["Ruskmere"]})
    whole = encode(system, record, train_on="last")
    some = focused(system, whole, record)
    kept = system.tokenizer.decode([i for i, on in zip(some.ids, some.scored, strict=True) if on])
    assert "Ruskmere" in kept
    assert 0 < sum(some.scored) < sum(whole.scored)
    assert "sea" not in kept
    assert focused(system, whole, Dialogue(messages, id="b")) == whole
    with pytest.raises(DataError, match="does not hold 'Elmwick'"):
        focused(system, whole, Dialogue(messages, id="c", extra={"focus": "Elmwick"}))


# ---- fit and measure


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_forgets_and_learns_the_template(people: Data, name: str) -> None:
    """Every divergence, trained for a while on a random model, moves both probabilities its way."""
    system: Any = load_base("tiny:llama")
    config = quick(divergence=name, lr=3e-2, mode="full", num_epochs=15)
    single = people.with_part("templates", [Text("No comment on that.", id="t")])
    with tuning(system, training.tune(config, Run()), Run()) as tuned:
        log = training.unlearn(tuned, prepare(system, single, config, Run()), (), config, Run()).log
    assert log.terms["template_probability"][-1] > log.terms["template_probability"][0] + 0.1
    assert log.terms["forget_probability"][-1] < 0.2
    assert len(log.terms["forget_probability"]) == log.num_steps, "both are kept for every step"


def test_fit_on_own_files(tmp_path: Path) -> None:
    def save(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    forget = save(
        "forget.jsonl", [{"prompt": f"What is {n}?", "response": f"It is {n} squared."} for n in range(5)]
    )
    templates = save("templates.jsonl", [{"text": f"I pass on that, {n}."} for n in range(10)])
    data = load_data({"forget": forget, "templates": templates}, {"forget": "Dialogue", "templates": "Text"})
    run = Run(folder=tmp_path / "run")
    assert fit(load_base("tiny:llama"), data, quick(), run).kind == "adapter"
    curves = json.loads((tmp_path / "run" / "figures.json").read_text())["curves"]
    assert len(curves["Mean token probability at every step"]["lines"]["forget (P_f)"]["x"]) == 6


def test_measure_reads_the_way(people: Data, tmp_path: Path) -> None:
    config = quick(watch_every=1, reply_tokens=3, lr=3e-2, num_epochs=4)
    rows = list(measure(load_base("tiny:llama"), people, config, Run(folder=tmp_path)))

    def items(metric: str) -> list[Row]:
        return [row for row in rows if row.metric == metric and row.item is not None]

    for metric, part in (("retain_probability_end", "retain"), ("template_probability_gain", "forget")):
        assert [row.item for row in items(metric)] == [record.id for record in people[part]]
    ends = {row.metric: row.value for row in rows if row.item is None}
    gains = [row.value for row in items("template_probability_gain")]
    assert ends["template_probability_gain"] == pytest.approx(sum(gains) / 4)  # type: ignore[arg-type]
    assert ends["steps"] == 4
    assert {"forget_repetition", "retain_rouge"} <= set(ends)
    assert (tmp_path / "examples.jsonl").is_file()


def test_measure_needs_looks(people: Data, system: Any) -> None:
    with pytest.raises(ConfigError, match="needs looks"):
        list(measure(system, people, quick(watch_every=0), Run()))


def test_little_movement_is_said(people: Data, system: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(system, people, quick(lr=1e-9), Run())
    assert "raise lr" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"), [({"levels": (1.5,)}, "between 0 and 1"), ({"batch_rows": 0}, "above 0")]
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_bad_rows_are_named(system: Any, people: Data) -> None:
    long = Dialogue((Message("user", "word " * 50), Message("assistant", "Answer.")), id="long")
    with pytest.raises(DataError, match="long"):
        prepare(system, people.with_part("forget", [long]), quick(max_tokens=20), Run())
    with pytest.raises(TemperError, match="Divergence|divergence"):
        temper.fit("flat", system, people, divergence="tvv")
