from __future__ import annotations

import pytest

from temper.core.errors import ConfigError
from temper.run.cells import expand
from temper.run.recipe import load_recipe, parse_recipe
from temper.run.settings import split_sets
from temper.run.strict_yaml import load_yaml


def pipeline(text, method=""):
    return parse_recipe(load_yaml(text, "test.yaml"), name="test", where="test.yaml", method=method)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1.5E3", 1500.0), ("-2", -2), ("0.1", 0.1), ("010", "010"), ("1:30", "1:30"), ("no", "no"),
        ("on", "on"), ("none", "none"), ("null", None), ("~", None), ("true", True), ("False", "False"),
        ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("builtin:x", "builtin:x"), ("'1'", "1"), (".5", 0.5),
    ],
)  # fmt: skip
def test_plain_values_mean_what_they_look_like(text, value):
    found = load_yaml(f"a: {text}", "t")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "stands twice"),
        ("a: {b: 1, b: 2}", "stands twice"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !include x", "tag"),
        ("a: &x {b: 1}\nc: {<<: *x}", "merge keys"),
        ("1: a", "not text"),
        ("a: [1", "line 1"),
        ("a: 1\nb: : :\n", "line 2"),
        ("a: &a [x]\nb: [" + ", ".join(["*a"] * 21) + "]", "aliases"),
        ("a: " + "[" * 3000, "Not valid YAML"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_what_is_no_plain_value_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        load_yaml(text, "t")


def test_a_few_aliases_are_values():
    assert load_yaml("a: &a [1]\nb: *a", "t") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: []", "Did you mean steps"),
        ("steps: []", "not a list of steps"),
        ("steps: [{id: a}]", "exactly one verb"),
        ("steps: [{id: a, fit: x, measure: y}]", "exactly one verb"),
        ("steps: [{id: a, fit: fake-fit, setings: {}}]", "Did you mean settings"),
        ("steps: [{id: a, fit: fake-fit, against: b}]", "against is not a list"),
        ("steps: [{id: base, fit: fake-fit}]", "not a step id"),
        ("steps: [{id: a b, fit: fake-fit}]", "not a step id"),
        ("steps: [{id: a, fit: x}, {id: a, fit: x}]", "stands twice"),
        ("steps: [{id: a, fit: x}]\nsettings: {}", "beside steps"),
        ("steps: [{id: a, fit: x}]\nmatrix: {seed: 1}", "not a list"),
        ("steps: [{id: a, fit: x}]\nmatrix: {seed: [-1]}", "whole number"),
        ("steps: [{id: a, fit: x, limit: 0}]", "limit"),
        ("steps: [{id: a, fit: x}]\noptions: {exakt: true}", "Did you mean exact"),
        ("steps: [{id: a, fit: x}]\noptions: {exact: 1}", "not bool"),
        ("steps: [{id: abc, fit: x}, {id: d, fit: x}]\narms: {one: {abd: {}}}", "Did you mean abc"),
        ("steps: [{id: a, fit: x}]\ndata: {}", "names no part"),
        ("system: x", "no steps"),
    ],
)
def test_a_malformed_recipe_says_what_and_where(text, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(text)


def test_short_form_is_the_first_verb(methods):
    short = load_recipe("fake-measure", "tiny")
    (step,) = short.steps
    assert (step.id, step.verb, step.method, step.settings) == (
        "measure",
        "measure",
        "fake-measure",
        {"num_items": 3},
    )


def test_unknown_recipe_and_file_are_clear(methods):
    with pytest.raises(ConfigError, match="Did you mean small"):
        load_recipe("fake-measure", "smal")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe("none.yaml")


CHAIN = """
system: tiny:llama+runs/old@0.5
steps:
  - {id: rows, make: fake-make, settings: {num_items: 2}}
  - {id: sums, fit: fake-fit, data: rows, settings: {scale: 2, num_items: 3}}
  - {id: score, measure: fake-measure, system: base+sums@0.3, data: rows}
matrix: {seed: [0, 1], sums.pause_s: [0, 1e-3]}
arms:
  all: {}
  set: {sums: {settings: {scale: 3}}}
  less: {sums: null, score: {system: base}}
"""


def test_cells_are_matrix_times_arms_times_seeds(methods):
    cells = expand(pipeline(CHAIN), {})
    assert len(cells) == 2 * 3 * 2
    assert [(c.arm, c.seed) for c in cells[:6]] == [(a, s) for a in ("all", "set", "less") for s in (0, 1)]
    by = {(c.arm, c.seed, c.matrix["sums.pause_s"]): c for c in cells}
    assert [s.step.id for s in by["less", 0, 0].steps] == ["rows", "score"]
    sums = by["set", 1, 1e-3].steps[1]
    assert (sums.config.scale, sums.config.num_items, sums.config.pause_s) == (3.0, 3, 0.001)
    assert sums.origins == {"scale": "arm set", "num_items": "test.yaml, step sums", "pause_s": "matrix"}
    assert str(by["all", 0, 0].steps[2].system) == "tiny:llama+runs/old@0.5+sums@0.3"
    assert by["all", 0, 0].steps[2].uses == ("sums",)


def test_set_wins_over_the_arm_and_names_a_step(methods):
    chain = pipeline(CHAIN)
    cells = expand(chain, split_sets(["sums.scale=9"], chain), arms=["set"], seeds=[5])
    sums = cells[0].steps[1]
    assert (cells[0].seed, sums.config.scale, sums.origins["scale"]) == (5, 9.0, "--set")
    with pytest.raises(ConfigError, match="names no step"):
        split_sets(["scale=9"], chain)
    with pytest.raises(ConfigError, match=r"Did you mean sums"):
        split_sets(["sum.scale=9"], chain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("base+sums@0.3", "base+rows"), "leaves no artefact"),
        (("base+sums@0.3", "sums"), "Write base"),
        (("data: rows, settings", "data: sums, settings"), "neither a spec nor an earlier step"),
        (("{scale: 2,", "{scael: 2,"), "Did you mean scale"),
        (("{scale: 2,", "{scale: two,"), "'two' is not a valid value"),
        (("sums.pause_s", "sumz.pause_s"), "matrix key"),
        (("make: fake-make", "make: fake-mak"), "no method 'fake-mak'"),
    ],
)
def test_what_a_pipeline_names_must_be_there(methods, change, message):
    with pytest.raises(ConfigError, match=message):
        expand(pipeline(CHAIN.replace(*change)), {})


def test_data_for_a_verb_that_takes_none_is_refused(methods):
    text = "steps: [{id: a, make: fake-make, data: x.jsonl}]"
    with pytest.raises(ConfigError, match="takes no data"):
        expand(pipeline(text), {})


def test_an_unknown_arm_names_the_nearest(methods):
    with pytest.raises(ConfigError, match="Did you mean less"):
        expand(pipeline(CHAIN), {}, arms=["les"])
