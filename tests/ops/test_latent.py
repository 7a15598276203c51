"""Perturbations inside a model: where they stand, that they stay in their ball, and that nothing of them is left."""

import math

import pytest
import torch

from temper.core.errors import ConfigError, DataError, ModelError, NumericsError
from temper.ops.batching import Example, collate
from temper.ops.latent import (
    EMBEDDINGS,
    Ball,
    Perturbation,
    attack,
    embedding_scale,
    frozen,
    shared_prompt,
    site_scales,
    spread_sites,
)
from temper.ops.toward_away import mean_rows, score_tokens, toward_tokens
from temper.systems.loading import load_base

SITES = (EMBEDDINGS, "layers.1.mlp.output", "layers.0.output")


def row(*ids, start):
    return Example(list(ids), [place >= start for place in range(len(ids))])


ROWS = [row(5, 6, 7, 8, 9, 10, start=4), row(11, 12, 13, 14, start=2)]
MASK = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])


def balls(system, eps=0.2, lr=0.02, sites=SITES):
    scales = site_scales(system.model, [collate(ROWS, 3)], sites)
    return {name: Ball(eps * scale.norm, scale.width, lr) for name, scale in scales.items()}


def losses_of(system, rows=ROWS):
    batch = collate(rows, 3)

    def losses():
        scores = score_tokens(system.model, batch)
        return mean_rows(toward_tokens(scores), scores)

    return losses


def logits(system, rows=ROWS):
    with torch.no_grad():
        return system.model(input_ids=collate(rows, 3).ids_BT, use_cache=False).logits.clone()


def search(system, **changes):
    settings = {"num_steps": 8, "step": "adamw"} | changes
    return attack(system.model, losses_of(system), MASK, [0, 1], balls(system), **settings)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("step", ["adamw", "sign"])
def test_the_loss_falls_and_every_token_stays_in_its_ball(lively, kind, step):
    system = lively(kind)
    found = search(system, step=step)
    assert (found.after_N < found.before_N).all()
    assert found.way[-1] < found.way[0]
    assert len(found.way) == 9
    assert (found.num_forward, found.num_backward) == (9, 8)
    for site, ball in balls(system).items():
        delta_NPD = found.perturbation.deltas[site]
        assert (delta_NPD.norm(dim=-1) <= ball.radius * 1.0001).all()
        assert delta_NPD.dtype == torch.float32
        assert not delta_NPD.requires_grad
        assert not delta_NPD[~MASK].any()


def test_outputs_flags_and_modes_are_bit_identical_afterwards_also_after_an_error(lively):
    system = lively("llama")
    calm, flags = logits(system), [p.requires_grad for p in system.model.parameters()]
    system.model.train()
    found = search(system)

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attack(system.model, broken, MASK, [0, 1], balls(system), num_steps=1)
    with pytest.raises(ZeroDivisionError), found.perturbation.applied(system.model, [0, 1]):
        raise ZeroDivisionError
    with found.perturbation.applied(system.model, [0, 1]):
        assert not torch.equal(logits(system), calm)
    assert all(part.training for part in system.model.modules())
    assert [p.requires_grad for p in system.model.parameters()] == flags
    assert all(p.grad is None for p in system.model.parameters())
    system.model.eval()
    assert torch.equal(logits(system), calm)


def test_a_row_is_attacked_the_same_alone_and_in_company(lively):
    system = lively("llama")
    together = search(system).perturbation.deltas
    alone = attack(
        system.model, losses_of(system, ROWS[1:]), MASK[1:, :4], [0], balls(system), num_steps=8
    ).perturbation.deltas
    for site in alone:
        assert torch.allclose(together[site][1:, :4], alone[site], atol=2e-4)


def test_the_delta_at_the_embeddings_is_what_inputs_embeds_would_hold(lively):
    """Some models multiply embeddings inside (Gemma): the delta stands where `inputs_embeds` does."""
    for kind in ("llama", "gemma"):
        system = lively(kind)
        ids_BT = collate(ROWS, 3).ids_BT
        delta_NPD = 0.3 * torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
        perturbation = Perturbation({EMBEDDINGS: delta_NPD}, torch.ones(2, 6, dtype=torch.bool))
        with perturbation.applied(system.model, [0, 1]):
            hooked = logits(system)
        embeds_BTD = system.model.get_input_embeddings()(ids_BT) + delta_NPD
        with torch.no_grad():
            direct = system.model(inputs_embeds=embeds_BTD, use_cache=False).logits
        assert torch.allclose(hooked, direct, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma3"])
def test_the_embedding_scale_is_the_mean_norm_of_what_the_module_gives(kind):
    model = load_base(f"tiny:{kind}").model
    module = model.get_input_embeddings()
    rows_VD = module(torch.arange(module.weight.shape[0])).detach()
    scale = embedding_scale(model, chunk=100)
    assert scale.norm == pytest.approx(float(rows_VD.norm(dim=-1).mean()), rel=1e-5)
    assert scale.width == 32
    own = float(module.weight.detach().norm(dim=-1).mean())
    assert scale.factor == pytest.approx(scale.norm / own, rel=1e-5)
    assert (scale.factor > 5) == kind.startswith("gemma")


def test_one_delta_stands_on_the_prompt_of_several_rows_and_none_on_others(lively):
    system = lively("llama")
    good = [row(5, 6, 7, 8, 20, start=4), row(11, 12, 30, 31, 32, 33, 34, start=2)]
    benign = [row(40, 41, 42, start=1)]
    delta_NPD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    perturbation = Perturbation({"layers.0.output": delta_NPD}, MASK)
    rows = [*ROWS, *good, *benign]
    calm = logits(system, rows)
    with perturbation.applied(system.model, [0, 1, 0, 1, None]):
        moved = logits(system, rows)
    assert torch.allclose(moved[4, :3], calm[4, :3], atol=1e-6)
    assert torch.allclose(moved[0, :4], moved[2, :4], atol=1e-5)
    assert torch.allclose(moved[1, :2], moved[3, :2], atol=1e-5)
    assert not torch.allclose(moved[0, :4], calm[0, :4], atol=1e-3)


def test_decoding_steps_are_left_alone_and_a_pass_of_another_size_is_an_error(lively):
    system = lively("llama")
    perturbation = search(system).perturbation
    one = torch.tensor([[7], [8], [9]])
    with torch.no_grad():
        calm = system.model(input_ids=one, use_cache=False).logits
        with perturbation.applied(system.model, [0, 1]):
            assert torch.equal(system.model(input_ids=one, use_cache=False).logits, calm)
            with pytest.raises(ModelError, match="laid out for 2"):
                system.model(input_ids=torch.tensor([[7, 8]] * 3), use_cache=False)


def test_recomputed_activations_get_the_same_perturbation(lively):
    system = lively("llama")
    perturbation = search(system).perturbation
    found = []
    for recompute in (False, True):
        system.model.train(recompute)
        if recompute:
            system.model.activation_checkpointing_enable({"use_reentrant": False})
        with perturbation.applied(system.model, [0, 1]):
            losses_of(system)().sum().backward()
        found.append([p.grad.clone() for p in system.model.parameters()])
        system.model.zero_grad()
    for plain, again in zip(*found, strict=True):
        assert torch.allclose(plain, again, atol=1e-5)


def test_radius_zero_changes_nothing_and_no_steps_find_nothing(lively):
    system = lively("llama")
    calm = logits(system)
    found = attack(system.model, losses_of(system), MASK, [0, 1], balls(system, eps=0.0), num_steps=3)
    with found.perturbation.applied(system.model, [0, 1]):
        assert torch.equal(logits(system), calm)
    assert torch.equal(found.before_N, found.after_N)
    none = search(system, num_steps=0)
    assert not any(delta.any() for delta in none.perturbation.deltas.values())


def test_the_share_on_the_boundary(lively):
    system = lively("llama")
    assert search(system, num_steps=1).boundary_share < 1
    wide = balls(system, lr=100.0, sites=(EMBEDDINGS,))
    far = attack(system.model, losses_of(system), MASK, [0, 1], wide, num_steps=2, step="sign")
    assert far.boundary_share == 1.0


def test_the_sign_step_by_hand(lively):
    system = lively("llama")
    found = attack(
        system.model, losses_of(system), MASK, [0, 1], balls(system, 100.0, 1e-3), num_steps=1, step="sign"
    )
    for delta_NPD in found.perturbation.deltas.values():
        moved = delta_NPD[MASK].abs()
        assert ((moved - 1e-3).abs() < 1e-9).logical_or(moved == 0).all()


def test_shared_prompts():
    assert shared_prompt([row(1, 2, 3, start=2), row(1, 2, 9, 9, start=2)]) == 2
    with pytest.raises(DataError, match="different prompt tokens"):
        shared_prompt([row(1, 2, 3, start=2), row(1, 4, 3, start=2)])
    with pytest.raises(DataError, match="different prompt tokens"):
        shared_prompt([row(1, 2, 3, start=2), row(1, 2, 3, start=1)])


def test_sites_spread_as_the_paper_puts_them(lively, monkeypatch):
    assert spread_sites(lively("llama").model) == (EMBEDDINGS, "layers.0.mlp.output", "layers.1.mlp.output")
    monkeypatch.setattr("temper.ops.latent.anchors.layers", lambda model: [None] * 32)
    assert spread_sites(torch.nn.Linear(1, 1))[1:] == tuple(
        f"layers.{number}.mlp.output" for number in (8, 16, 24, 30)
    )


def test_bad_input(lively):
    system = lively("llama")
    with pytest.raises(ConfigError, match="no position"):
        attack(
            system.model,
            losses_of(system),
            torch.zeros(2, 6, dtype=torch.bool),
            [0, 1],
            balls(system),
            num_steps=1,
        )
    with pytest.raises(ConfigError, match="no site"):
        site_scales(system.model, [collate(ROWS, 3)], ["layers.9.output"])
    with pytest.raises(DataError, match="no rows"):
        site_scales(system.model, [], SITES)

    def overflowing():
        return losses_of(system)() * math.inf

    with pytest.raises(NumericsError, match="not finite"):
        attack(system.model, overflowing, MASK, [0, 1], balls(system), num_steps=1)


def test_frozen_models_take_no_gradient(lively):
    system = lively("llama")
    system.model.train()
    with frozen(system.model):
        assert not any(p.requires_grad for p in system.model.parameters())
        assert not any(part.training for part in system.model.modules())
    assert all(p.requires_grad for p in system.model.parameters())
