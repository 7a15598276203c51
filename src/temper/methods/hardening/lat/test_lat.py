"""lat: every form's losses by hand, radii, departures, and bad input."""

import json
import math

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.schemas import Data, Text
from temper.methods.hardening.lat.card import Config
from temper.methods.hardening.lat.games import Dpo, Rmu, TowardAway, direction, kl_of, normalised, scored_logp
from temper.methods.hardening.lat.method import fit, make, measure, objective_of
from temper.methods.hardening.lat.rows import attacked_items, ball, search_of, with_benign
from temper.ops.batching import Example, collate
from temper.ops.latent import Scale
from temper.ops.latent_objective import LatentItem, Seen
from temper.ops.logprobs import response_logprobs
from temper.ops.toward_away import TokenScores, score_tokens
from temper.systems.loading import load_base

SMALL = {
    "rank": 2, "lr": 1e-2, "attack_steps": 2, "num_rounds": 2, "model_steps": 2, "batch_rows": 3, "scale_rows": 4,
}  # fmt: skip
TEXTS = (
    "The old mill stood beside the stream.",
    "She said that it was true.",
    "Explain the text in your own words.",
)


def tokens(logp, rows, num_rows):
    logp_S = torch.tensor(logp)
    return TokenScores(
        logp_S, torch.log1p(-logp_S.exp()), torch.tensor(rows), num_rows, lambda mask_S: mask_S
    )


def small_data():
    rows = make(None, Data({}), Config(num_requests=14, num_held_out=4), Run())
    texts = [Text(text, id=str(number)) for number, text in enumerate(TEXTS)]
    return Data({**rows, "forget": texts, "retain": texts[::-1]}, "small")


def game_of(kind, **settings):
    return kind(Config(**settings), None, 3, "cpu")


def items(count=2):
    return [LatentItem(bad=None, ref_good=-1.0, ref_bad=-2.0, place=at) for at in range(count)]


SCORES = {
    "bad": tokens([math.log(0.5), -6.0, -1.0], [0, 0, 1], 2),
    "good": tokens([-2.0, -4.0, math.log(0.25)], [0, 0, 1], 2),
    "benign": tokens([-0.5, -1.5], [0, 1], 2),
}


def test_toward_and_away_on_both_sides_by_hand():
    """Departure 1: means over a row's own tokens."""
    game = game_of(TowardAway, kl=0.0, sft=1.0)
    attack_B = game.attack_loss(SCORES, items())
    toward_B = torch.tensor([(math.log(2.0) + 6.0) / 2, 1.0])
    kept = [-math.log1p(-math.exp(-2.0)), -math.log1p(-math.exp(-4.0))]
    away_B = torch.tensor([sum(kept) / 2, -math.log(0.75)])
    assert torch.allclose(attack_B, 0.5 * toward_B + 0.5 * away_B)
    terms = game.terms(Seen(SCORES, {}, None), items(), None)
    assert float(terms["toward"].total) == pytest.approx(3.0 + math.log(4.0))
    assert float(terms["away"].total) == pytest.approx(math.log(2.0) / 2 - math.log1p(-math.exp(-1.0)))
    assert float(terms["sft"].total / terms["sft"].count) == pytest.approx(1.0)
    assert game.weights == pytest.approx({"toward": 0.25, "away": 0.25, "sft": 0.5})


def test_weights_are_divided_by_the_sum_of_those_in_use():
    """Departure 2: a weight that no loss reads halves nothing."""
    assert normalised(dpo=1.0, sft=0.0, kl=0.0) == {"dpo": 1.0}
    assert game_of(Dpo, kl=0.0, toward=0.5, away=0.5).weights == {"dpo": 1.0}
    assert game_of(Dpo, kl=0.1, sft=1.0, benign_rows=0).weights == {"dpo": 1.0}
    assert game_of(TowardAway, kl=0.1, benign_rows=0).weights == {"toward": 0.5, "away": 0.5}


def test_sides_without_a_loss_are_not_computed():
    game = game_of(TowardAway, attack_away=0.0, away=0.0)
    assert game.attack_reads == ["bad"]
    assert game.defence_reads == ["good"]


def test_dpo_on_both_sides_by_hand():
    game = game_of(Dpo, kl=0.0)
    good_B = torch.tensor([-6.0, math.log(0.25)]) + 1.0
    bad_B = torch.tensor([math.log(0.5) - 6.0, -1.0]) + 2.0
    wanted_B = torch.nn.functional.softplus(-0.3 * (bad_B - good_B))
    assert torch.allclose(game.attack_loss(SCORES, items()), wanted_B)
    terms = game.terms(Seen(SCORES, {}, None), items(), None)
    swapped_B = torch.nn.functional.softplus(-0.3 * (good_B - bad_B))
    assert float(terms["dpo"].total) == pytest.approx(float(swapped_B.sum()))


def test_the_reference_of_dpo_is_the_clean_model_once():
    """Departure 7."""
    system, data = load_base("tiny:llama"), small_data()
    config = Config(form="dpo")
    for item in attacked_items(system, data, config, Run()):
        slow = response_logprobs(system, [item.good, item.bad], run=Run())
        assert [item.ref_good, item.ref_bad] == pytest.approx(slow.tolist(), abs=1e-4)


def test_rmu_by_hand():
    rows = [Example([5, 6], [False, True]), Example([7, 8, 9], [False, True, True])]
    batch = collate(rows, 3)
    game = Rmu(Config(form="rmu"), None, 3, "cpu", torch.tensor([1.0, 0.0]))
    hidden_BTD = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [1.0, 1.0], [2.0, 2.0]]])
    item = LatentItem(bad=rows[0], benign=(rows[1],))
    terms = game.terms(Seen({}, {"layers.7.output": hidden_BTD}, batch), [item], torch.zeros(3, 2))
    assert float(terms["forget"].total) == pytest.approx((4.0 + 4.0) / 2)
    assert float(terms["retain"].total) == pytest.approx((1.0 + 2.0 + 8.0) / 2)
    assert game.counts([item]) == {"forget": 2.0, "retain": 3.0}
    assert game.weights == {"forget": 1.0, "retain": 1200.0}


def test_the_direction_of_rmu_is_fixed_and_as_long_as_asked():
    """Departure 8."""
    drawn = direction(32, 6.5, 3)
    assert float(drawn.norm()) == pytest.approx(6.5)
    assert torch.equal(drawn, direction(32, 6.5, 3))
    assert not torch.equal(drawn, direction(32, 6.5, 4))


def test_kl_is_that_of_the_new_model_to_the_start_at_predicting_positions():
    """Departure 4."""
    new_SV = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log().requires_grad_()
    start_SV = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    total = kl_of(new_SV, start_SV, "plain")
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert total.item() == pytest.approx(by_hand, abs=1e-6)
    assert (kl_of(new_SV, start_SV, "unit") / 2).item() == pytest.approx(1.0)
    assert kl_of(start_SV, start_SV, "unit").item() == 0.0
    system = load_base("tiny:llama")
    batch = collate([Example([5, 6, 7, 8], [False, False, True, True])], 3)
    logp_SV = scored_logp(score_tokens(system.model, batch))
    with torch.no_grad():
        slow_SV = system.model(input_ids=batch.ids_BT).logits[0, 1:3].log_softmax(-1)
    assert torch.allclose(logp_SV, slow_SV, atol=1e-5)


def test_radii_follow_the_model_and_an_absolute_one_warns(caplog):
    """Departures 3 and 9: shares of the site's median norm, steps as shares of the radius, widths from the model."""
    assert ball(Scale(30.0, 64), Config(eps=0.1, attack_lr=0.5)) == pytest.approx((3.0, 64, 0.5 * 3.0 / 8))
    assert ball(Scale(30.0, 64), Config(absolute_eps=6.0)).radius == 6.0
    system = load_base("tiny:gemma")
    rows = attacked_items(system, small_data(), Config(), Run())
    with caplog.at_level("WARNING"):
        search = search_of(system, rows, Config(), Run())
        assert "one model family" not in caplog.text
        search_of(system, rows, Config(absolute_eps=6.0), Run())
    assert "one model family" in caplog.text
    assert list(search.balls) == ["embeddings.output", "layers.0.mlp.output", "layers.1.mlp.output"]
    assert all(one.width == 32 and one.radius > 0 for one in search.balls.values())
    assert search.positions == "prompt+reply"


def test_deltas_stay_put_where_the_gradient_is_0():
    """Departure 5: no decay; and what has no gradient has no perturbation."""
    system = load_base("tiny:llama")
    config = Config(attack_replies=False, attack_away=0.0)
    rows = attacked_items(system, small_data(), config, Run())[:2]
    found = objective_of(system, config, search_of(system, rows, config, Run())).find(system.model, rows)
    start = rows[0].bad.scored.index(True)
    last = found.perturbation.deltas["layers.1.mlp.output"][0]
    # Behind the last attention only the prompt's last position predicts a reply token.
    assert last[start - 1].norm() > 0
    assert not last[: start - 1].any()
    assert not last[start:].any()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("form", ["toward_away", "dpo", "rmu", "implant"])
def test_every_form_trains_and_leaves_the_system_alone(kind, form, tmp_path):
    system = load_base(f"tiny:{kind}")
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    extra = {"sft": 1.0, "sites": ("layers.0.output",), "rmu_layer": 1, "implant_epochs": 1.0}
    fit(system, small_data(), Config(form=form, **SMALL, **extra), Run(folder=tmp_path))
    after = system.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(part._forward_hooks for part in system.model.modules())
    if form != "implant":
        lines = json.loads((tmp_path / "figures.json").read_text())["curves"]["Attack loss"]["lines"]
        assert lines["attacked"]["y"][0] < lines["without"]["y"][0]


def test_recomputed_activations_and_a_restarted_optimizer(tmp_path):
    system = load_base("tiny:llama")
    config = Config(**SMALL, gradient_checkpointing=True, restart_optimizer=True, kl_scale="unit")
    assert type(fit(system, small_data(), config, Run())).__name__ == "Adapter"


def test_radius_near_zero_is_training_without_an_attack():
    found = []
    for settings in ({"eps": 1e-12}, {"attack_steps": 0}, {}):
        config = Config(**(SMALL | {"mode": "full", "lr": 1e-3} | settings))
        found.append(fit(load_base("tiny:llama"), small_data(), config, Run()).tensors)
    zero, none, some = ([one[name] for name in sorted(one)] for one in found)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(zero, none, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(some, none, strict=True))


def test_benign_rows_stand_beside_every_item():
    rows = [LatentItem(bad=Example([1, 2], [False, True]), place=at) for at in range(4)]
    benign = [Example([at, 9], [False, True]) for at in range(5)]
    drawn = with_benign(rows, benign, Config(benign_rows=2), 0, 0)
    assert [len(item.benign) for item in drawn] == [2] * 4
    assert with_benign(rows, [], Config(), 0, 0) == rows


def test_measuring_reads_every_metric():
    rows = list(measure(load_base("tiny:llama"), small_data(), Config(attack_steps=2, reply_tokens=3), Run()))
    means = {row.metric: row.value for row in rows if row.item is None}
    assert set(means) == {
        "trigger_loss_nats", "benign_loss_nats", "trigger_rate", "false_trigger_rate", "adversary_gain_nats",
        "boundary_share",
    }  # fmt: skip
    assert means["adversary_gain_nats"] > 0
    assert means["trigger_rate"] == 0.0


def test_the_made_rows_never_show_the_trigger_to_the_removal():
    data = make(None, Data({}), Config(), Run())
    assert len(data["test"]) == 60
    assert sum(bool(row.extra.get("poisoned")) for row in data["implant"]) == round(0.3 * 210)
    clean = {row.prompt[0].content for row in data["benign"]}
    assert not any("zephyr" in prompt for prompt in clean)
    assert not clean & {row.prompt[0].content for row in data["test"]}


@pytest.mark.parametrize(
    ("parts", "settings", "text"),
    [
        (("benign",), {}, "reads the part train"),
        (("train",), {}, "keeps the part benign"),
        (("train",), {"form": "rmu"}, "reads the part forget"),
        (("train",), {"form": "implant"}, "reads the part implant"),
    ],
)
def test_a_missing_part_is_named(parts, settings, text):
    data = small_data()
    with pytest.raises(DataError, match=text):
        fit(load_base("tiny:llama"), Data({part: data[part] for part in parts}), Config(**settings), Run())


def test_a_site_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no site"):
        fit(load_base("tiny:llama"), small_data(), Config(**SMALL, sites=("layers.8.mlp.output",)), Run())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"attack_toward": 0.0, "attack_away": 0.0}, "attack has no loss"),
        ({"toward": 0.0, "away": 0.0}, "defence has no loss"),
        ({"form": "dpo", "dpo": 0.0}, "dpo weight"),
        ({"away_cutoff": 0.0}, "below 0"),
        ({"kl": -1.0}, "may not be negative"),
        ({"num_held_out": 240}, "below num_requests"),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=text):
        Config(**settings)
