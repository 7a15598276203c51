"""The losses by hand, one test a departure, what a fit leaves, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from temper.artefacts import Stack, Weights, load_artefact
from temper.core.errors import ConfigError, DataError, ModelError, NumericsError
from temper.core.types import Run
from temper.data.schemas import Data, Labelled, Text
from temper.methods.diffusion.sfd import distil, losses
from temper.methods.diffusion.sfd.card import Config
from temper.methods.diffusion.sfd.conftest import EMPTY, QUICK, tiny
from temper.methods.diffusion.sfd.method import fit, measure, problem_of
from temper.ops.diffusion import counting, snr
from temper.systems.diffusion import Diffusion, load_diffusion
from temper.systems.noise import eps_from_v, level
from temper.systems.wanted import Wanted


def distiller(system: Diffusion, **settings: Any) -> Any:
    config = Config(**{**QUICK, **settings})
    return distil._Distiller(problem_of(system, EMPTY, config, Run()), config, 0)


# the maths


def test_sid_loss_by_hand() -> None:
    """One picture with p = 3, s = 1, x = 2 and p = 1, s = 0, x = 3: omega = (1 + 2) / 2."""
    p, s, x = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])
    loss = losses.sid_loss(p, s, x, alpha=1.2)
    hand = (2 * (1 - 1.2 * 2) + 1 * (-2 - 1.2 * 1)) / 1.5
    assert (loss.total.item(), loss.count) == (pytest.approx(hand, rel=1e-6), 1)


def test_alpha_one_is_the_short_form() -> None:
    p, s, x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    omega = (p - x).abs().flatten(1).mean(1)[:, None, None]
    assert losses.sid_loss(p, s, x, 1.0).total.item() == pytest.approx(
        ((p - s) * (s - x) / omega).sum().item(), rel=1e-4, abs=1e-4
    )


def test_omega_has_a_floor_and_no_gradient() -> None:
    p = torch.zeros(1, 2)
    assert torch.isfinite(losses.sid_loss(p, p + 1, p, 1.0).total)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    losses.sid_loss(p, torch.tensor([[0.5, 0.5]]), x, 1.0).total.backward()
    # d/dx of (p - s)(s - x) / omega with omega = 1.5 held: -(p - s) / omega
    assert x.grad is not None
    assert x.grad.tolist() == [pytest.approx([0.5 / 1.5, 0.5 / 1.5])]


def test_one_step_by_hand_and_a_perfect_network() -> None:
    """With ab = 0.64 and z = 1: x_init = 0.6; eps = 0.5 gives (0.6 - 0.6 * 0.5) / 0.8. eps = z gives 0."""
    ab, z = torch.tensor(0.64), torch.ones(1, 1)
    assert losses.one_step(lambda x: torch.full_like(x, 0.5), z, ab).item() == pytest.approx(0.375)
    assert losses.one_step(lambda x: z, z, ab).item() == pytest.approx(0.0, abs=1e-7)


def test_override_labels_leave_the_forgotten_one_out() -> None:
    rng = torch.Generator().manual_seed(0)
    assert set(losses.other_labels(500, 4, 2, rng).tolist()) == {0, 1, 3}
    logits = torch.tensor([[5.0, 9.0, 4.0]]).expand(300, 3)
    assert set(losses.pseudo_labels(logits, 1, False, rng).tolist()) == {0}
    drawn = losses.pseudo_labels(logits, 1, True, rng)
    assert set(drawn.tolist()) == {0, 2}
    assert (drawn == 0).float().mean().item() == pytest.approx(
        torch.sigmoid(torch.tensor(1.0)).item(), abs=0.1
    )
    assert logits[0, 1].item() == 9.0


def test_esd_target_by_hand() -> None:
    assert losses.esd_target(torch.tensor(3.0), torch.tensor(1.0), 1.0).item() == -1.0
    assert losses.esd_target(torch.tensor(3.0), torch.tensor(1.0), 0.0).item() == 1.0


def test_gradient_runs_through_the_scores_unless_diff_instruct() -> None:
    """With alpha = 1 both start alike: the loss is that of s = p, so all of it comes by way of the networks."""
    both = {flag: distiller(tiny(), diff_instruct=flag, alpha=1.0) for flag in (False, True)}
    grads = {}
    for flag, each in both.items():
        torch.nn.init.normal_(each.fake.conv_out.bias, generator=torch.Generator().manual_seed(1))
        condition = each.problem.remain(4, each.rng)
        each.generator_term(condition, condition, False).backward()
        grads[flag] = torch.cat([p.grad.flatten() for p in each.generator.parameters() if p.grad is not None])
    assert torch.isfinite(grads[True]).all()
    assert not torch.allclose(grads[False], grads[True], rtol=1e-2)


# the steps


def test_the_fake_score_sees_what_is_drawn_and_its_condition() -> None:
    """Only its own weights move by its loss, and only the generator's by the other."""
    both = distiller(tiny())
    pairs = {"fake": both.fake, "generator": both.generator, "teacher": both.teacher}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in pairs.items()}
    condition = both.problem.remain(4, both.rng)
    both._update(both.optimizers[0], both.fake, both.fake_term(condition, False))
    moved = {
        name: any(not torch.equal(before[name][k], v) for k, v in m.state_dict().items())
        for name, m in pairs.items()
    }
    assert moved == {"fake": True, "generator": False, "teacher": False}
    both.step(forgets=True, is_wide=False)
    assert all(torch.equal(before["teacher"][k], v) for k, v in both.teacher.state_dict().items())


def test_gradients_are_cut_number_by_number() -> None:
    both = distiller(tiny(), clip_value=1e-9)
    both.step(forgets=True, is_wide=False)
    assert (
        max(p.grad.abs().max().item() for p in both.generator.parameters() if p.grad is not None) <= 1.001e-9
    )


@pytest.mark.parametrize(
    ("forgets", "expected"), [(True, [{1, 2, 3}, {0}]), (False, [{0, 1, 2, 3}])], ids=["sfd", "sid"]
)
def test_what_the_fake_score_is_shown(
    forgets: bool, expected: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, seen = distiller(tiny(), batch_rows=64), []
    original = both.fake_term
    monkeypatch.setattr(
        both, "fake_term", lambda *args: seen.append(set(args[0].values.tolist())) or original(*args)
    )
    terms = both.step(forgets=forgets, is_wide=False)
    assert seen == expected
    assert ("generator forget" in terms) == forgets


def test_warm_up_widens_the_times() -> None:
    both = distiller(tiny(), t_min=0.3, t_max=0.4)
    x_B = torch.zeros(500, 3, 8, 8)
    narrow, wide = both.noised(x_B, False)[1], both.noised(x_B, True)[1]
    assert (narrow.min().item(), narrow.max().item()) == (30, 39)
    assert (wide.min().item(), wide.max().item()) == (2, 97)


# the departures


def test_departure_1_times_are_shares_of_the_levels() -> None:
    assert distil.init_level(Config(), 1000) == 440
    assert distil.init_level(Config(), 200) == 88
    assert distiller(tiny()).range == (4, 71)


def test_departure_2_guidance_one_is_none() -> None:
    system = tiny().with_(labels=("a", "b", "c", "d", "e"))  # no row for nothing: guidance would raise
    distiller(system).step(forgets=True, is_wide=False)
    with pytest.raises(ConfigError, match="unconditional prediction"):
        distiller(system, guidance_teacher=4.5).step(forgets=True, is_wide=False)
    for name in ("guidance_fake_train", "guidance_fake_eval", "guidance_teacher"):
        plain, guided = (
            distiller(tiny(), **{name: scale}).step(forgets=True, is_wide=False) for scale in (1.0, 4.5)
        )
        assert any(plain[key].item() != guided[key].item() for key in plain)


def test_departure_3_the_teacher_stays_the_pretrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = distil._Distiller
    monkeypatch.setattr(distil, "_Distiller", lambda *args: made.append(original(*args)) or made[-1])
    system = tiny()
    fit(system, EMPTY, Config(**{**QUICK, "distil_steps": 3}), Run())
    assert len(made) == 1
    assert all(torch.equal(v, system.model.state_dict()[k]) for k, v in made[0].teacher.state_dict().items())


def test_departure_4_eps_error_is_the_weighted_velocity_error() -> None:
    table = tiny().alpha_bar_N
    x_t, v, other, t = *torch.randn(3, 2, 3, 4, 4).double(), torch.tensor([20, 80])
    ab = level(table, t, x_t)
    of_eps = (eps_from_v(x_t, v, ab) - eps_from_v(x_t, other, ab)).square().flatten(1).sum(1)
    weight = snr(table)[t] / (snr(table)[t] + 1)
    assert torch.allclose(of_eps, weight * (v - other).square().flatten(1).sum(1))


def test_departure_5_a_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(NumericsError, match="nan|inf"):
        fit(tiny(), EMPTY, Config(**{**QUICK, "lr": 1e30, "fake_lr": 1e30, "num_steps": 4}), Run())


@pytest.mark.parametrize("objective", ["sfd", "relabel"])
def test_departure_5_on_a_cpu_it_stops_before_that_step(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's loss is spoilt: no weight has moved since the second."""
    system, found = tiny(), []
    original = distil.noise_loss

    def spoilt(*args: Any) -> Any:
        loss = original(*args)
        found.append(copy.deepcopy(system.model.state_dict()))
        return loss._replace(total=loss.total * float("nan")) if len(found) == 5 else loss

    monkeypatch.setattr(distil, "noise_loss", spoilt)
    config = Config(**{**QUICK, "objective": objective, "num_steps": 9})
    with pytest.raises(NumericsError, match=r"is nan; its last finite value was \d.*step 2.*Lower lr"):
        distil.train(problem_of(system, EMPTY, config, Run()), config, Run())
    assert len(found) == 6, "two such terms a step"
    assert all(torch.equal(found[-1][name], value) for name, value in system.model.state_dict().items())


def test_departure_5_elsewhere_it_is_looked_for_at_the_steps_kept() -> None:
    log, seen = distil.Log(every=5), torch.tensor
    log.add(0, {"fake": seen(2.0)}, 100)
    log.pending.append((3, "fake", seen(float("inf"))))  # what an accelerator's third step leaves
    with pytest.raises(NumericsError, match=r"'fake' is inf; its last finite value was 2\.0 \(step 3\)"):
        log.add(5, {"fake": seen(1.0)}, 100)


def test_departure_6_the_average_is_what_is_kept() -> None:
    weights = {}
    for ema in (0.0, 0.5):
        artefact = fit(tiny(), EMPTY, Config(**{**QUICK, "ema": ema}), Run())
        assert isinstance(artefact, Stack)
        assert isinstance(artefact.members[0], Weights)
        weights[ema] = artefact.members[0].tensors["conv_in.weight"]
    first = fit(tiny(), EMPTY, Config(**{**QUICK, "num_steps": 1}), Run())
    assert isinstance(first, Stack)
    assert isinstance(first.members[0], Weights)
    half = (first.members[0].tensors["conv_in.weight"] + weights[0.0]) / 2
    assert torch.allclose(weights[0.5], half, atol=1e-6)


def test_departure_7_the_baselines_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Diffusion.draw_pixels
    monkeypatch.setattr(
        Diffusion, "draw_pixels", lambda self, *a: calls.append(len(a[0])) or original(self, *a)
    )
    for objective in ("relabel", "esd"):
        artefact = fit(tiny(), EMPTY, Config(**{**QUICK, "objective": objective, "sample_steps": 2}), Run())
        assert isinstance(artefact, Weights)
    assert calls == [4] * 4


def test_what_the_baselines_draw_differs_from_seed_to_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not the measurement's noise, which is that of the run's seed and the next."""
    seeds: list[int] = []
    original = Diffusion.draw_pixels
    monkeypatch.setattr(
        Diffusion,
        "draw_pixels",
        lambda self, condition, num_steps, seed, *a: (
            seeds.append(seed) or original(self, condition, num_steps, seed, *a)
        ),
    )
    config = Config(**{**QUICK, "objective": "relabel", "sample_steps": 2})
    for seed in (0, 1, 0):
        fit(tiny(), EMPTY, config, Run(seed=seed))
    assert seeds[:2] == seeds[4:]
    assert len(set(seeds)) == 4
    assert not set(seeds) & set(range(4))


# what a fit leaves


def test_it_draws_in_one_call_and_replaces_the_sampler(tmp_path: Any) -> None:
    system = tiny()
    artefact = fit(system, EMPTY, Config(**QUICK), Run())
    artefact.save(tmp_path / "a")
    condition = system.conditions([0, 1, 2])
    with load_artefact(tmp_path / "a").apply(system) as changed:
        with counting(changed.model) as calls:
            once = changed.draw_pixels(condition, num_steps=7, seed=3, guidance=4.0)
        assert calls.rows == 3
        assert torch.equal(once, changed.draw_pixels(condition, num_steps=20, seed=3))
        with pytest.raises(ConfigError, match="no teacher"):
            fit(changed, EMPTY, Config(**QUICK), Run())
    with pytest.raises(ConfigError, match="no strength"), artefact.apply(system, 0.5):
        pass


@pytest.mark.parametrize("mode", ["rand", "amax", "prob"])
def test_override_modes_run(mode: str) -> None:
    config = Config(**{**QUICK, "override_mode": mode, "classifier": "tiny:resnet"})
    assert isinstance(fit(tiny(), EMPTY, config, Run()), Stack)


def test_a_model_of_texts_forgets_a_phrase() -> None:
    system = load_diffusion("tiny:textunet", Wanted())
    prompts = Data({"prompts": [Text("a red circle"), Text("a blue star"), Text("a green ring")]})
    settings = {**QUICK, "forget": "star", "override": "circle", "alpha": 1.0, "guidance_teacher": 4.5}
    artefact = fit(system, prompts, Config(**settings), Run())
    with artefact.apply(system) as changed:
        shown = Data({"prompts": [Labelled("a red circle", "circle"), Labelled("a green ring", "ring")]})
        config = Config(**{**settings, "detector": "tiny:resnet", "num_samples": 2})
        with pytest.raises(ModelError, match="no class"):
            list(measure(changed, shown, config, Run()))
    with pytest.raises(DataError, match="No prompt without"):
        fit(system, Data({"prompts": [Text("a blue star")]}), Config(**settings), Run())
    with pytest.raises(ConfigError, match="needs classes"):
        fit(system, prompts, Config(**{**settings, "override_mode": "rand"}), Run())


def test_a_word_that_the_texts_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of whole words reads every word it does not know alike."""
    system = load_diffusion("tiny:textunet", Wanted())
    prompts = Data({"prompts": [Text("a ring")]})
    read = type(system.tokenizer).__call__

    def whole_words(tokenizer: Any, text: Any, **settings: Any) -> Any:
        if settings.get("add_special_tokens", True):
            return read(tokenizer, text, **settings)
        return {"input_ids": [7 if text in ("star", "circle") else tokenizer.unk_token_id]}

    monkeypatch.setattr(type(system.tokenizer), "__call__", whole_words)
    for words in ({"forget": "red sta"}, {"forget": "star", "override": "zebra"}):
        with pytest.raises(ConfigError, match=f"does not know '{[*words.values()][-1]}'"):
            fit(system, prompts, Config(**QUICK, **words), Run())


def test_a_teacher_of_velocities_serves() -> None:
    from diffusers import DDIMScheduler

    system = tiny()
    velocity = DDIMScheduler.from_config(system.scheduler.config, prediction_type="v_prediction")
    assert isinstance(fit(system.with_(scheduler=velocity), EMPTY, Config(**QUICK), Run()), Stack)


# wrong input


@pytest.mark.parametrize(("forget", "override"), [(0, "circle"), ("star", "3")])
def test_override_and_forget_may_not_be_the_same(forget: int | str, override: int | str) -> None:
    with pytest.raises(ConfigError, match="forgotten class"):
        fit(tiny(), EMPTY, Config(**QUICK, forget=forget, override=override), Run())
    with pytest.raises(ValueError, match="the same"):
        Config(forget=0, override=0)


@pytest.mark.parametrize("label", ["4", "stra", -1])
def test_a_label_that_does_not_exist_is_refused(label: int | str) -> None:
    with pytest.raises(ConfigError, match="no class"):
        fit(tiny(), EMPTY, Config(**QUICK, forget=label), Run())


@pytest.mark.parametrize(
    "wrong",
    [{"t_min": 0.8}, {"t_init": 1.5}, {"lr": 0.0}, {"override_mode": "amax"}, {"templates": ("a star",)}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0].rstrip("s")):
        Config(**wrong)


@pytest.mark.parametrize("mode", ["amax", "prob"])
def test_relabel_has_no_pictures_for_a_classifier_to_see(mode: str) -> None:
    with pytest.raises(ValueError, match="relabel needs override_mode fixed or rand"):
        Config(objective="relabel", override_mode=mode, classifier="tiny:resnet")
    assert Config(objective="relabel", override_mode="rand").override_mode == "rand"


def test_untouched_is_for_the_toy() -> None:
    with pytest.raises(ConfigError, match="untouched"):
        fit(tiny(), EMPTY, Config(**QUICK, objective="untouched"), Run())
