"""Axes of the matrix over methods: what fits gives arms, what attacks gives lines of the map, missing cells run alone."""

import pytest

from temper.core.errors import ConfigError
from temper.core.types import Row
from temper.report.against import attack_maps
from temper.report.page import render_report
from temper.report.tables import summary_table
from temper.run.cells import expand
from temper.run.compare import compare_runs
from temper.run.execute import run_recipe
from temper.run.plan import Request, make_plan
from temper.run.ranking import Column, rank_arms
from temper.run.recipe import parse_recipe
from temper.run.settings import split_sets
from temper.run.strict_yaml import load_yaml
from temper.store import lines
from temper.store.folders import RunFolder
from temper.store.records import row_record

CHAIN = """
system: tiny:llama
data: builtin:people
steps:
  - {id: forget, fit: npo, settings: {loss: ga, lr: 0.5}}
  - {id: red, attack: gcg, system: base+forget, data: "builtin:behaviours:neutral", settings: {num_steps: 3}}
  - {id: score, measure: npo, system: base+forget}
"""


def pipeline(text, method=""):
    return parse_recipe(load_yaml(text, "test.yaml"), name="test", where="test.yaml", method=method)


def configs(cell):
    return {spec.step.id: (spec.step.method, spec.config) for spec in cell.steps}


def test_methods_that_fit_are_arms_and_settings_are_started_anew():
    text = CHAIN + "matrix: {seed: [0, 1], forget.fit: [npo, {flat: {divergence: tv}}]}\n"
    cells = expand(pipeline(text), {})
    assert [(cell.arm, cell.seed, cell.matrix) for cell in cells] == [
        (arm, seed, {}) for arm in ("npo", "flat") for seed in (0, 1)
    ]
    (npo, old), (flat, new) = (configs(cell)["forget"] for cell in cells[::2])
    assert (npo, old.loss, old.lr) == ("npo", "ga", 0.5)
    assert (flat, new.divergence, new.lr) == ("flat", "tv", type(new)().lr)
    chosen = expand(pipeline(text), split_sets(["forget.lr=0.25"], pipeline(text)), arms=["flat"], seeds=[3])
    assert [(cell.arm, cell.seed, configs(cell)["forget"][1].lr) for cell in chosen] == [("flat", 3, 0.25)]
    assert next(s for s in cells[2].steps if s.step.id == "forget").origins["divergence"] == "arm flat"


def test_an_arm_keeps_its_changes_and_one_without_the_step_comes_once():
    text = (
        CHAIN.replace("  - {id: red", "  #")
        + "arms: {slow: {forget: {settings: {lr: 0.1}}}, before: {forget: null, score: {system: base}}}\n"
        + "matrix: {forget.fit: [npo, flat, {flat: {lr: 0.2, divergence: tv}}]}\n"
    )
    cells = expand(pipeline(text), {})
    names = ["slow/npo", "slow/flat", "slow/flat lr=0.2 divergence=tv", "before"]
    assert [cell.arm for cell in cells] == names
    assert [configs(cell)["forget"][1].lr for cell in cells[:3]] == [0.1, 0.1, 0.2]


def test_methods_that_attack_stay_a_choice_of_the_matrix():
    text = CHAIN + "matrix: {red.attack: [gcg, {gcg: {num_steps: 7}}], forget.lr: [0.5, 0.6]}\n"
    cells = expand(pipeline(text), {})
    assert [cell.arm for cell in cells] == [""] * 4
    assert cells[3].matrix == {"red.attack": "gcg num_steps=7", "forget.lr": 0.6}
    assert [configs(cell)["red"][1].num_steps for cell in cells] == [3, 3, 7, 7]
    assert next(s for s in cells[3].steps if s.step.id == "red").origins["num_steps"] == "matrix"


def test_a_recipe_of_one_step_need_not_name_it(methods):
    short = pipeline("matrix: {measure: [fake-measure, npo]}", method="fake-measure")
    assert list(short.arms) == ["fake-measure", "npo"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("matrix: {forget.fit: [npo, flta]}", r"no method 'flta'.*test.yaml: matrix forget.fit.*mean flat"),
        ("matrix: {forget.fit: [npo, gcg]}", r"'gcg' has no verb 'fit'.*matrix forget.fit.*attack"),
        ("matrix: {forgett.fit: [npo]}", r"no step 'forgett'.*matrix forgett.fit.*Did you mean forget"),
        ("matrix: {fit: [npo]}", "no step"),
        ("matrix: {score.fit: [npo]}", r"verb of step 'score' is not fit.*Write score.measure"),
        ("matrix: {forget.fit: [npo, npo]}", r"'npo' stands twice"),
        ("matrix: {forget.fit: [{npo: {}, flat: {}}]}", "no method with its settings"),
        ("matrix: {forget.fit: [{npo: 3}]}", "no method with its settings"),
        ("matrix: {forget.fit: [[npo]]}", "no method with its settings"),
        ("matrix: {forget.fit: npo}", "not a list"),
        ("matrix: [forget.fit]", "not a mapping"),
        ("matrix: {forget.fit: [npo]}\narms: {a: {forget: {fit: flat}}}", r"arm 'a' and the matrix both.*forget"),
        ("matrix: {red.attack: [gcg]}\narms: {a: {red: {attack: gcg}}}", r"arm 'a' and the matrix both"),
        ("matrix: {fgt.lr: [1]}", r"matrix key 'fgt.lr' is unknown.*STEP.VERB"),
        ("matrix: {forget.fit: [{flat: {los: ga}}]}", r"Unknown setting 'los'.*arm flat"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_clear_error(more, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        expand(pipeline(CHAIN + more), {})


def test_an_opponent_is_no_step():
    text = CHAIN.replace("lr: 0.5}}", "lr: 0.5}, against: [{id: relearn, fit: tampering}]}")
    with pytest.raises(ConfigError, match="a list already"):
        pipeline(text + "matrix: {relearn.fit: [tampering]}")


ATTACK = """
from temper.core.types import Attempt

def attack(system, data, config, run):
    for number in range(3):
        yield Attempt(goal=f"g{number}", attack="ask", input="x", reply="y", success=number < config.luck,
                      cost={"queries": 1})
"""
CARD = '''"""Ask.

Paper         None; a stand-in.
"""
from dataclasses import dataclass
from temper.core.card import Card

@dataclass(frozen=True, kw_only=True)
class Config:
    luck: int = LUCK
    """How many goals are reached."""

CARD = Card(title="Ask", paper="none", verbs=("attack",), config=Config, needs=frozenset(), kinds=("CausalLM",),
            data={}, produces=(), claims=())
'''
HOLD = """
system: tiny:llama
limit: 3
options: {batch_tokens: 512}
steps:
  - id: forget
    fit: npo
    data: builtin:people:forget
    settings: {loss: ga, mode: lora, rank: 2, batch_rows: 3, num_epochs: 1, min_steps: 0, watch_every: 0, lr: 0.01}
AGAINST  - {id: score, measure: npo, system: base+forget, data: "builtin:people:forget", settings: {reply_tokens: 0}}
RED
matrix: {forget.fit: [METHODS]ATTACKS}
"""
FLAT = "{flat: {mode: lora, rank: 2, batch_rows: 3, num_epochs: 1, min_steps: 0, watch_every: 0}}"


def hold(path, methods, **parts):
    text = HOLD.replace("METHODS", methods)
    for name in ("AGAINST", "RED", "ATTACKS"):
        text = text.replace(name, parts.get(name.lower(), ""))
    path.write_text(text)
    return str(path)


@pytest.fixture
def attacks(tmp_path, monkeypatch):
    """Two attacks on language models: ask reaches one goal of three, beg two."""
    for slug, luck in (("ask", 1), ("beg", 2)):
        folder = tmp_path / "methods" / "askers" / slug
        folder.mkdir(parents=True)
        (folder / "card.py").write_text(CARD.replace("LUCK", str(luck)))
        (folder / "method.py").write_text(ATTACK)
    monkeypatch.setenv("TEMPER_METHODS", str(tmp_path / "methods"))


def outcomes(result):
    names = {step.name: f"{step.id} {step.method}" for step in result.plan.steps}
    found = {"ran": [], "reused": []}
    for name, outcome in result.outcomes.items():
        found[outcome].append(names[name])
    return found


def test_two_defences_by_two_attacks_are_a_map_and_missing_cells_run_alone(tmp_path, attacks):
    path, out = tmp_path / "hold.yaml", str(tmp_path / "runs")
    red = "  - {id: red, attack: ask, system: base+forget}"
    run_recipe(hold(path, "npo", red=red, attacks=", red.attack: [ask]"), out=out)
    hold(path, f"npo, {FLAT}", red=red, attacks=", red.attack: [ask, beg]")
    planned = make_plan(Request(source=str(path), out=out))
    assert [cell.label for cell in planned.cells] == [
        f"{arm}, red.attack={attack}, seed 0" for attack in ("ask", "beg") for arm in ("npo", "flat")
    ]
    result = run_recipe(str(path), out=out)
    assert outcomes(result) == {
        "reused": ["forget npo", "score npo", "red ask"],
        "ran": ["forget flat", "score npo", "red ask", "red beg", "red beg"],
    }
    rows = list(result.folder.rows())
    (rate,) = [found for found in attack_maps(rows) if found.metric == "attack_success_rate"]
    assert (rate.arms, rate.groups) == (["npo", "flat"], ["ask", "beg"])
    assert [[cell.value for cell in line] for line in rate.cells] == [
        [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    ] * 2
    assert all(cell.low < cell.value < cell.high for line in rate.cells for cell in line)
    page = render_report(result.folder.path)
    assert '<th scope="col">npo</th><th scope="col">flat</th>' in page
    assert '<th scope="row">beg</th>' in page
    ranked = rank_arms(rows, [Column(metric="attack_success", name="asked", under="ask", better="lower"),
                              Column(metric="forget_probability", name="forgotten")])  # fmt: skip
    # Three rows, though two cells hold them.
    assert {line.arm for line in ranked.lines} == {"npo", "flat"}
    assert [cell.n for cell in ranked.lines[1].cells] == [3, 3]


def test_methods_of_an_axis_meet_the_opponents_of_against(tmp_path):
    path, out = tmp_path / "hold.yaml", str(tmp_path / "runs")
    opponents = (
        "    against:\n      - {id: 4-bit, fit: tampering, settings: {how: quantise}}\n"
        "      - {id: prune, fit: tampering, settings: {how: prune}}\n"
    )
    run_recipe(hold(path, "npo", against=opponents), out=out)
    result = run_recipe(hold(path, f"npo, {FLAT}", against=opponents), out=out)
    ran = outcomes(result)["ran"]
    assert sorted(ran) == sorted(
        ["forget flat", "score npo", *(f"forget-{name} tampering" for name in ("4-bit", "prune")),
         *(f"score-forget-{name} npo" for name in ("4-bit", "prune"))]
    )  # fmt: skip
    (found,) = [m for m in attack_maps(list(result.folder.rows())) if m.metric == "forget_probability"]
    assert (found.arms, found.groups) == (["npo", "flat", "plain"], ["none", "4-bit", "prune"])
    assert all(cell is not None and cell.low is not None for line in found.cells for cell in line)


def test_a_step_that_choices_share_counts_once():
    def row(item, choice, value, name="a"):
        facts = {"seed": 0, "step": "score", "step_hash": name, "matrix": {"red.attack": choice}}
        return Row(metric="kept", value=value, item=item, arm=name, higher_is_better=True, facts=facts)

    rows = [row(str(n), choice, n / 10, arm) for arm in "ab" for choice in ("x", "y") for n in range(4)]
    (line,) = summary_table(rows).rows
    assert {(cell.n, cell.num_seeds, cell.spread) for cell in line.cells.values()} == {(4, 1, "items")}
    assert rank_arms(rows, [Column(metric="kept", name="kept")]).lines[1].cells[0].n == 4


@pytest.mark.parametrize(("axis", "other"), [("red.attack", "yz"), ("forget.lr", "xy")])
def test_two_runs_pair_what_an_axis_does_not_touch_once(tmp_path, axis, other):
    def run(name, values, choices):
        out = RunFolder.create(tmp_path, name, {})
        facts = {"seed": 0, "step": "score", "step_hash": name}
        lines.append(out.path / "rows.jsonl", [
            row_record(Row(metric="kept", value=value, item=str(n),
                           facts={**facts, "matrix": {axis: choice}}))
            for choice in choices for n, value in enumerate(values)
        ])  # fmt: skip
        return out

    (found,) = compare_runs(run("a", [0.0] * 6, "xy"), run("b", [1.0, 2.0] * 3, other))
    assert (found.n, found.pairing) == (6, "items")
