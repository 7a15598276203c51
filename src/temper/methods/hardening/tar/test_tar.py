"""Tamper resistance: losses by hand, the red team's report, the facts, the cost, bad input."""

import logging
import math

import pytest
import torch

from temper.core import config as settings_of
from temper.core.errors import ConfigError, DataError, NumericsError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue, Text
from temper.methods.hardening.tar.card import CARD, Config, num_passes, step_weight
from temper.methods.hardening.tar.conftest import MEASURE, PAIRS, SMALL, example, size
from temper.methods.hardening.tar.facts import FIELDS, VALUES
from temper.methods.hardening.tar.losses import (
    EntropyObjective,
    MappingObjective,
    MappingPair,
    entropy,
    mapping_loss,
    random_rows,
)
from temper.methods.hardening.tar.method import estimate, fit, make, measure
from temper.methods.hardening.tar.redteam import recovery
from temper.ops.inner_loop import gradient
from temper.systems.loading import load_base

# ---- losses


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -99.0, -99.0]])
    half = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy(logits).tolist() == pytest.approx([math.log(4), 0.0, half], abs=1e-5)
    assert entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))


def test_padding_has_no_entropy(system):
    """Departure 1: a row's term is the same in any company, and a mean over real tokens alone."""
    short, long = example(5, 6, 7), example(8, 9, 10, 11, 12, 13)
    objective = EntropyObjective(system.pad_id)
    both = objective(system.model, [short, long])["entropy"]
    alone = [objective(system.model, [row])["entropy"] for row in (short, long)]
    assert float(both.total.detach()) == pytest.approx(
        sum(float(term.total.detach()) for term in alone), rel=1e-5
    )
    assert both.count == objective.counts([short, long])["entropy"] == 9.0
    logits = system.model(input_ids=torch.tensor([short.ids])).logits[0]
    assert float(alone[0].total.detach()) == pytest.approx(-float(entropy(logits).sum().detach()), rel=1e-5)
    assert -math.log(512) <= float(both.total.detach()) / 9 < 0


def test_entropy_of_a_capped_head_and_in_chunks(system, monkeypatch):
    gemma = load_base("tiny:gemma2", attention="eager")
    row = example(5, 6, 7)
    logits = gemma.model(input_ids=torch.tensor([row.ids])).logits[0]
    found = EntropyObjective(gemma.pad_id)(gemma.model, [row])["entropy"].total
    assert float(found.detach()) == pytest.approx(-float(entropy(logits).sum().detach()), rel=1e-5)
    parameters = list(system.model.parameters())

    def at_once():
        return gradient(system.model, parameters, EntropyObjective(3), [row], Run(), length=size)

    whole = at_once()
    monkeypatch.setattr("temper.methods.hardening.tar.losses.CHUNK_LOGITS", 512)
    for one, other in zip(whole.grads, at_once().grads, strict=True):
        torch.testing.assert_close(one, other)


def test_mapping_by_hand():
    """The cosine's absolute value counts: pointing away from the random vector is as good as along it."""
    wanted = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    state = torch.tensor([[[5.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]])
    assert mapping_loss([state], wanted).tolist() == [[0.0, 0.0, 1.0]]
    mixed = mapping_loss([state, torch.tensor([[[1.0, 1.0]] * 3])], wanted)
    assert mixed[0, 0].item() == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_mapping_reads_retain_words_and_forget_states(system):
    """Departure 3: the first tokens of a row are left out; 0 reads all."""
    retain, forget = example(5, 6, 7), example(8, 9, 10, 11)
    rows_VD = random_rows(512, 32, 0)
    assert torch.equal(rows_VD, random_rows(512, 32, 0))
    assert rows_VD.std().item() == pytest.approx(1, abs=0.02)
    found = {}
    for skipped in (0, 1):
        objective = MappingObjective(rows_VD, system.pad_id, num_skipped=skipped)
        found[skipped] = objective(system.model, [MappingPair(retain, forget)])
        counts = objective.counts([MappingPair(retain, forget)])
        assert (
            counts
            == {name: term.count for name, term in found[skipped].items()}
            == {"retain": 2.0, "mapping": 4.0 - skipped}
        )
    logits = system.model(input_ids=torch.tensor([retain.ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(retain.ids[1:]), reduction="sum")
    assert float(found[1]["retain"].total.detach()) == pytest.approx(float(nll.detach()), rel=1e-5)
    states = system.model(input_ids=torch.tensor([forget.ids]), output_hidden_states=True).hidden_states
    by_hand = mapping_loss(states, rows_VD[forget.ids][None])[0]
    assert float(found[0]["mapping"].total.detach()) == pytest.approx(float(by_hand.sum().detach()), rel=1e-4)
    assert float(found[1]["mapping"].total.detach()) == pytest.approx(
        float(by_hand[1:].sum().detach()), rel=1e-4
    )


def test_weights_of_the_attacks_steps():
    config = Config(inner_steps=64)
    assert step_weight(63, config) == 1.0
    assert step_weight(62, config) == pytest.approx(math.exp(-0.0625))
    assert step_weight(0, config) == pytest.approx(math.exp(-63 * 0.0625))
    assert step_weight(5, Config(inner_steps=64, weighting="uniform")) == 1 / 64


# ---- red teaming


def test_the_report_adds_up(system, data):
    rows = list(measure(system, data, Config(**MEASURE, original=1.0), Run()))
    after = [row for row in rows if row.metric == "forget_after"]
    assert [row.group for row in after] == [
        f"{mode} lr 0.001 step {step}" for mode in ("full", "lora") for step in (1, 2)
    ]
    values = {row.metric: row.value for row in rows if row.item is None and not row.group}
    mean, worst = sum(row.value for row in after) / 4, max(row.value for row in after)
    assert values["tamper_auc"] == pytest.approx(mean)
    assert values["worst_attack"] == worst
    assert values["robustness_gap"] == pytest.approx(worst - mean)
    before = values["forget_before"]
    assert values["recovery"] == pytest.approx((mean - before) / (1 - before))
    items = [row for row in rows if row.metric == "tamper_auc" and row.item]
    assert len(items) == 3
    assert sum(row.value for row in items) / 3 == pytest.approx(mean)


def test_recovery_by_hand():
    assert recovery(0.5, 0.25, 1.0) == pytest.approx(1 / 3)
    assert recovery(0.2, 0.2, 0.9) == 0.0
    assert recovery(0.9, 0.1, 0.9) == 1.0
    assert recovery(0.5, 0.4, 0.4) is None


def test_texts_of_ones_own_are_scored_by_probability(system):
    texts = [Text(f"The fox and the boat number {number}.", id=str(number)) for number in range(4)]
    rows = Data({"attack": texts, "forget": texts, "retain": texts[:2]}, "own")
    config = Config(**{**MEASURE, "attack_steps": 20, "look_every": 20, "attack_lrs": (1e-2,)})
    found = list(measure(system, rows, config, Run()))
    before = next(row.value for row in found if row.metric == "forget_before")
    assert 0 < before < 0.1
    after = {row.group.split()[0]: row.value for row in found if row.metric == "forget_after"}
    assert after["full"] > 2 * before
    assert after["lora"] > before


def test_the_facts():
    rows = make(None, Data({}), Config(num_facts=10), Run(seed=3))
    assert {part: len(records) for part, records in rows.items()} == {
        "learn": 60, "forget": 20, "retain": 30, "attack": 10, "questions": 5, "retain_questions": 10,
    }  # fmt: skip
    held = {text.text for part in ("forget", "retain", "attack") for text in rows[part]}
    learnt = {text.text for text in rows["learn"]}
    for part in ("questions", "retain_questions"):
        for one in rows[part]:
            said = f"{one.question} {one.choices[one.answer]}."
            assert said in learnt
            assert (said in held) == (part == "retain_questions")
            assert one.choices == VALUES
    attacked = {word for text in rows["attack"] for word in text.text.split()}
    assert not any(one.question.split()[3] in attacked for one in rows["questions"])
    assert make(None, Data({}), Config(num_facts=10), Run(seed=3)).fingerprint == rows.fingerprint
    assert len({way for ways in FIELDS.values() for way in ways}) == 6


# ---- cost and bad input


def test_the_cost_is_said_before_work_begins(system, data, caplog):
    config = Config(num_steps=750)
    assert num_passes(config) == 750 * (64 + 64 // 4 + 1)
    with caplog.at_level(logging.INFO):
        fit(system, data, Config(**SMALL), Run())
    assert "2 outer steps of 2 attack steps: 10 forward and backward passes" in caplog.text
    texts = Data({"forget": [Text("a" * 400)] * 3, "retain": [Text("b" * 400)] * 3})
    found = estimate(
        {}, texts, Config(num_steps=10, mapping_steps=0, inner_steps=8, adversary_rows=4, batch_rows=6)
    )
    assert found["tokens"] == pytest.approx(100 * 10 * (8 * 4 + 2 * 6 + 6 * 4 / 3))
    assert estimate({"parameters": 10**9}, texts, config)["memory_bytes"] == pytest.approx(40.6e9)
    assert estimate({}, None, config) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "lora"}, "takes off"),
        ({"inner_steps": 2, "inner_every": 4}, "never comes"),
        ({"mapping_steps": 0, "num_steps": 0}, "nothing is trained"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"adversary_lrs": []}, "learning rates"),
        ({"forget_weight": 0.0, "switch_weight": 0.0}, "no adversary"),
        ({"look_every": 300}, "never looked at"),
        ({"num_facts": 1}, "num_facts"),
        ({"retain_weight": -1.0}, "negative"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(ConfigError, match=says):
        settings_of.build(CARD.config, [("test", changes)])


def test_missing_parts(system, data):
    retain, forget = data["retain"], data["forget"]
    for parts, form, says in (
        ({"forget": forget}, "knowledge", "part retain"),
        ({"retain": retain}, "knowledge", "part forget"),
        ({"retain": retain}, "refusal", "part pairs"),
        ({"retain": retain, "pairs": PAIRS[:1]}, "refusal", "at least two"),
        ({"retain": retain, "forget": forget[:1]}, "knowledge", "cannot be split"),
        ({"retain": retain}, "learn", "part learn"),
    ):
        with pytest.raises(DataError, match=says):
            fit(system, Data(parts, "bad"), Config(**{**SMALL, "form": form}), Run())
    with pytest.raises(DataError, match="an attacker trains on"):
        list(measure(system, Data({"forget": forget}), Config(**MEASURE), Run()))
    with pytest.raises(DataError, match="bring back"):
        list(measure(system, Data({"attack": forget}), Config(**MEASURE), Run()))


def test_dialogues_can_be_kept_too(system, data):
    talk = [Dialogue((Message("user", "Where?"), Message("assistant", "In the valley.")), id="talk")]
    rows = Data({"forget": data["forget"], "dialogues": talk}, "own")
    assert fit(system, rows, Config(**SMALL), Run()).kind == "weights"


def test_a_loss_that_is_not_finite_stops(system, data, monkeypatch):
    monkeypatch.setattr(
        "temper.methods.hardening.tar.losses.entropy", lambda logits: logits.sum(-1) * math.nan
    )
    with pytest.raises(NumericsError, match="outer step 0, after 1 steps of the attack"):
        fit(system, data, Config(**SMALL), Run())


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "neox"])
def test_other_architectures(kind, data):
    other = load_base(f"tiny:{kind}")
    artefact = fit(other, data, Config(**{**SMALL, "mapping_steps": 1, "num_steps": 1}), Run())
    assert artefact.kind == "weights"
