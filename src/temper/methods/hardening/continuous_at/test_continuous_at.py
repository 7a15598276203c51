"""continuous-at: both losses by hand, the attack's radius, every departure, and bad input."""

import json
import math
from dataclasses import replace

import pytest
import torch

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue, Preference
from temper.methods.hardening.continuous_at.card import Config
from temper.methods.hardening.continuous_at.games import AdvIPO, AdvUL, away_rows, toward_rows
from temper.methods.hardening.continuous_at.method import adversarial_items, fit, make, measure, objective_of
from temper.ops.latent import EMBEDDINGS
from temper.ops.latent_objective import LatentItem, Seen
from temper.ops.logprobs import response_logprobs
from temper.ops.toward_away import TokenScores
from temper.systems.loading import load_base

SMALL = {
    "rank": 2,
    "lr": 1e-2,
    "attack_steps": 2,
    "attack_lr": 1e-2,
    "batch_rows": 3,
    "utility_rows": 1,
    "num_epochs": 1,
}


def tokens(logp, rows, num_rows):
    logp_S = torch.tensor(logp)
    return TokenScores(
        logp_S, torch.log1p(-logp_S.exp()), torch.tensor(rows), num_rows, lambda mask_S: mask_S
    )


def small_data():
    return make(None, Data({}), Config(num_prompts=9, num_requests=10), Run())


def items(count=2):
    return [LatentItem(bad=None, good=None, ref_good=-1.0, ref_bad=-2.0, place=at) for at in range(count)]


def test_toward_and_away_by_hand_and_softened_row_by_row():
    # Departure 1: a row's own mean decides whether its loss is softened, whatever the other rows are.
    config = Config()
    bad = tokens([-1.0, -3.0, -6.0, -8.0], [0, 0, 1, 1], 2)
    assert away_rows(bad, config).tolist() == pytest.approx([-2.0, -5.0 - 0.007])
    good = tokens([-1.0, -0.2, -0.2], [0, 1, 1], 2)
    assert toward_rows(good, config).tolist() == pytest.approx([1.0, 0.5 + 0.0002])


def test_the_other_away_loss_by_hand():
    bad = tokens([math.log(0.5), -6.0], [0, 0], 1)
    config = Config(away_loss="log_1_minus_p")
    assert away_rows(bad, config).tolist() == pytest.approx([math.log(2.0) / 2])


def test_adv_ul_is_the_weighted_sum_of_three_terms():
    game = AdvUL(Config())
    scores = {
        "bad": tokens([-1.0, -2.0], [0, 1], 2),
        "good": tokens([-2.0, -4.0], [0, 1], 2),
        "benign": tokens([-0.5, -1.5, -1.0], [0, 0, 1], 2),
    }
    terms = game.terms(Seen(scores, {}, None), items(), None)
    means = {name: float(term.total / term.count) for name, term in terms.items()}
    assert means == pytest.approx({"away": -1.5, "toward": 3.0, "utility": 1.0})
    assert game.weights == {"away": 0.5, "toward": 0.5, "utility": 1.0}


def test_adv_ipo_by_hand_with_its_cutoffs():
    game = AdvIPO(Config(ipo_toward_cutoff=0.5), None, 3, "cpu")
    scores = {"good": tokens([-0.1, -2.0], [0, 0], 1), "bad": tokens([-6.0, -2.0], [0, 0], 1)}
    terms = game.terms(Seen(scores, {}, None), items(1), game.reference(None, items(1), None))
    # a = (0 - 2)/2 = -1, b = (0 - 2)/2 = -1; the reference's gap is 1; 1/(2 beta) = 2.
    assert float(terms["ipo"].total) == pytest.approx(((-1.0 + 1.0) - 1.0 - 2.0) ** 2)
    assert terms["ipo"].count == 1


def test_reference_log_probabilities_stay_with_their_rows():
    """Departure 2: in order, and means a token."""
    system = load_base("tiny:llama")
    pairs = small_data()["train"]
    found = adversarial_items(system, pairs, Config(), Run(), reference=True)
    for item in found:
        slow = [
            float(response_logprobs(system, [row], reduce="mean", run=Run())) for row in (item.good, item.bad)
        ]
        assert [item.ref_good, item.ref_bad] == pytest.approx(slow, abs=1e-5)
    assert len({item.ref_good for item in found}) > 1


def test_token_id_0_is_a_token_like_any_other():
    """Departure 3: an end-of-text id of 0 within a prompt is attended to and perturbed."""
    system = load_base("tiny:llama")
    item = adversarial_items(system, small_data()["train"], Config(), Run())[0]
    item = replace(
        item,
        bad=item.bad._replace(ids=[0, *item.bad.ids[1:]]),
        good=item.good._replace(ids=[0, *item.good.ids[1:]]),
    )
    found = objective_of(system, Config(attack_lr=1e-2)).find(system.model, [item])
    start = item.bad.scored.index(True)
    assert found.perturbation.mask_NP[0].int().tolist() == [1] * start + [0] * (len(item.bad.ids) - start)
    assert found.perturbation.deltas[EMBEDDINGS][0, 0].norm() > 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_radius_follows_the_rows_and_the_delta_is_float32(kind):
    """Departures 4, 5 and 6: the delta stands behind the lookup; where that scales its rows, so is the delta."""
    system = load_base(f"tiny:{kind}")
    module = system.model.get_input_embeddings()
    rows_VD = module.weight.detach()
    factor = float(module(torch.tensor([7])).detach()[0, 0] / rows_VD[7, 0])
    assert factor == pytest.approx({"llama": 1.0, "gemma": 32**0.5}[kind], rel=1e-5)
    objective = objective_of(system, Config(attack_lr=1.0))
    (ball,) = objective.search.balls.values()
    assert ball.radius == pytest.approx(0.05 * factor * float(rows_VD.norm(dim=-1).mean()), rel=1e-4)
    assert ball.lr == pytest.approx(factor, rel=1e-4)
    found = objective.find(
        system.model.to(torch.bfloat16), adversarial_items(system, small_data()["train"], Config(), Run())
    )
    delta_NPD = found.perturbation.deltas[EMBEDDINGS]
    assert delta_NPD.dtype == torch.float32
    assert found.boundary_share > 0.5
    assert float(delta_NPD.norm(dim=-1).max()) <= ball.radius * 1.001


def test_every_adversarial_row_gets_its_utility_rows(monkeypatch):
    """Departure 7: seven to one, as published, at every step."""
    from temper.methods.hardening.continuous_at import method

    system, data = load_base("tiny:llama"), small_data()
    utility = method._utility(system, data, Config())
    rows = adversarial_items(system, data["train"], Config(), Run())
    drawn = method._with_utility(rows, utility, Config(), 0, 0)
    assert [len(item.benign) for item in drawn] == [7] * len(rows)
    assert drawn != method._with_utility(rows, utility, Config(), 0, 1)


def test_adapters_are_plain_lora():
    """Departure 8."""
    artefact = fit(load_base("tiny:llama"), small_data(), Config(**SMALL), Run())
    assert type(artefact).__name__ == "Adapter"
    assert artefact.config["r"] == 2


@pytest.mark.parametrize("variant", ["ul", "ipo", "online", "learn"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_every_variant_trains_and_leaves_the_system_alone(variant, kind, tmp_path):
    system = load_base(f"tiny:{kind}")
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    settings = SMALL | ({"variant": "ipo", "online": True} if variant == "online" else {"variant": variant})
    fit(system, small_data(), Config(**settings), Run(folder=tmp_path))
    after = system.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    if variant != "learn":
        curves = json.loads((tmp_path / "figures.json").read_text())["curves"]
        lines = curves["Attack loss"]["lines"]
        assert lines["attacked"]["y"][0] < lines["without"]["y"][0]
        assert curves["Passes of one row for each item"]["lines"]["backward"]["y"][0] > 2


def test_the_reference_of_online_ipo_reads_the_perturbed_prompt():
    system, seen = load_base("tiny:llama"), []
    config = Config(variant="ipo", online=True, attack_steps=2, attack_lr=1.0, eps=2.0)
    rows = adversarial_items(system, small_data()["train"], config, Run(), reference=True)
    from temper.artefacts import Tune, tuning

    with tuning(system, Tune(r=2), Run()) as tuned, objective_of(tuned.system, config, tuned) as objective:
        found = objective.find(tuned.system.model, rows)
        good_B, bad_B = objective.game.reference(tuned.system.model, rows, found)
        seen = bad_B.tolist()
    assert seen == pytest.approx((-found.after_N).tolist(), abs=1e-4)
    assert seen != pytest.approx([item.ref_bad for item in rows], abs=1e-3)
    assert not good_B.requires_grad


def test_measuring_reads_every_metric():
    system, data = load_base("tiny:llama"), small_data()
    config = Config(attack_steps=2, attack_lr=1e-2, reply_tokens=3)
    rows = list(measure(system, data, config, Run()))
    means = {row.metric: row.value for row in rows if row.item is None}
    assert set(means) == {
        "clean_loss_nats", "attacked_loss_nats", "boundary_share", "benign_loss_nats", "refusal_rate",
        "refusal_rate_benign",
    }  # fmt: skip
    assert means["attacked_loss_nats"] < means["clean_loss_nats"]
    assert len([row for row in rows if row.item and row.metric == "attacked_loss_nats"]) == len(data["test"])


def test_a_ball_that_never_binds_is_said(caplog):
    with caplog.at_level("WARNING"):
        fit(load_base("tiny:llama"), small_data(), Config(**(SMALL | {"attack_lr": 1e-7})), Run())
    assert "raise attack_lr" in caplog.text


def test_no_utility_rows_is_an_error_for_ul_alone():
    data = Data({"train": small_data()["train"]}, "mine.jsonl")
    with pytest.raises(DataError, match="ordinary replies"):
        fit(load_base("tiny:llama"), data, Config(**SMALL), Run())
    fit(load_base("tiny:llama"), data, Config(**SMALL, variant="ipo"), Run())


def test_a_reply_that_is_cut_away_is_an_error():
    data = small_data()
    with pytest.raises(DataError, match="truncated away"):
        fit(load_base("tiny:llama"), data, Config(**SMALL, max_tokens=10), Run())


def test_own_rows_with_a_system_turn_and_several_turns():
    prompt = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hi."),
        Message("user", "Word?"),
    )
    train = [Preference(prompt, "I cannot help.", "Sure, it is lamp.", id=str(at)) for at in range(3)]
    utility = [Dialogue((Message("user", "Say yes."), Message("assistant", "Yes.")), id="u")]
    fit(load_base("tiny:gemma"), Data({"train": train, "utility": utility}), Config(**SMALL), Run())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"away_cutoff": 1.0}, "log-probability below 0"),
        ({"online": True}, "online belongs"),
        ({"attack_steps": -1}, "may not be negative"),
        ({"num_prompts": 3}, "6 to 96"),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=text):
        Config(**settings)
