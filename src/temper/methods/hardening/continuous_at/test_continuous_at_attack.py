"""continuous-at's attack beside one written out on `inputs_embeds`, and the bad input that its card names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.methods.hardening.continuous_at import method
from temper.methods.hardening.continuous_at.card import Config
from temper.methods.hardening.continuous_at.method import adversarial_items, fit, make, objective_of
from temper.ops.batching import Example, collate
from temper.ops.latent import EMBEDDINGS
from temper.ops.preference import PreferencePair
from temper.ops.toward_away import mean_rows, score_tokens, toward_tokens
from temper.systems.loading import load_base

KINDS = ("llama", "gpt2", "qwen2", "gemma")
SMALL: dict[str, Any] = {
    "rank": 2, "lr": 1e-2, "attack_steps": 2, "attack_lr": 1e-2, "batch_rows": 3, "utility_rows": 1, "num_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return make(None, Data({}), Config(num_prompts=9, num_requests=10), Run())


def loss_on(model: Any, row: Example, delta_PD: Tensor) -> Tensor:
    """Cross-entropy a token of a row's reply, its prompt's embeddings shifted; one row, nothing padded."""
    ids = torch.tensor([row.ids])
    embeds = model.get_input_embeddings()(ids).detach().clone()
    embeds = torch.cat([embeds[:, : len(delta_PD)] + delta_PD, embeds[:, len(delta_PD) :]], 1)
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    scored = [t for t, flag in enumerate(row.scored) if flag]
    return F.cross_entropy(logits[[t - 1 for t in scored]], ids[0, scored])


def slow_attack(model: Any, row: Example, config: Config) -> Tensor:
    """The card's loop, token by token: a sign step, then back into the L2 ball."""
    module = model.get_input_embeddings()
    rows_VD = module(torch.arange(module.weight.shape[0])).detach()
    factor = float(rows_VD[5].norm() / module.weight[5].detach().norm())
    radius = config.eps * float(rows_VD.norm(dim=-1).mean())
    delta = torch.zeros(row.scored.index(True), rows_VD.shape[1])
    for _ in range(config.attack_steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(loss_on(model, row, delta), delta)
        delta = delta.detach() - config.attack_lr * factor * grad.sign()
        for t in range(len(delta)):
            norm = float(delta[t].norm())
            if norm > radius:
                delta[t] = radius * delta[t] / norm
    return delta


@pytest.mark.parametrize("kind", KINDS)
def test_the_attack_is_the_cards_loop_and_stands_on_both_replies(kind: str, data: Data) -> None:
    system: Any = load_base(f"tiny:{kind}")
    config = Config(attack_steps=4, attack_lr=2e-3, eps=0.3)
    item = adversarial_items(system, data["train"], config, Run())[0]
    for parameter in system.model.parameters():
        parameter.requires_grad_(False)
    found = objective_of(system, config).find(system.model, [item])
    ours = found.perturbation.deltas[EMBEDDINGS][0]
    delta = slow_attack(system.model, item.bad, config)
    start = len(delta)
    assert not ours[start:].any(), "prompt positions only, the template's before the reply among them"
    # A gradient of about 0 may take either sign.
    same = ((ours[:start] - delta).abs() < 1e-6).float().mean()
    assert same > 0.97
    assert float(found.before_N) == pytest.approx(float(loss_on(system.model, item.bad, 0 * delta)), abs=1e-4)
    assert float(found.after_N) == pytest.approx(float(loss_on(system.model, item.bad, delta)), abs=2e-3)
    rows = [item.bad, item.row("good")]
    with found.perturbation.applied(system.model, [0, 0]), torch.no_grad():
        scores = score_tokens(system.model, collate(rows, system.pad_id))
    hand = [float(loss_on(system.model, row, ours[:start])) for row in rows]
    assert mean_rows(toward_tokens(scores), scores).tolist() == pytest.approx(hand, abs=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_train_work_on_every_architecture(kind: str, mode: str, data: Data) -> None:
    artefact = fit(load_base(f"tiny:{kind}"), data, Config(**SMALL, mode=mode), Run())  # type: ignore[arg-type]
    assert artefact.kind == {"full": "weights", "lora": "adapter"}[mode]


def test_a_radius_in_another_models_units_is_said(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    system: Any = load_base("tiny:llama")
    with caplog.at_level("WARNING"):
        objective_of(system, Config(eps=0.075))
        assert not caplog.records
        objective_of(system, Config(eps=6.0))
    assert "not a radius in the units of another model" in caplog.text


def test_replies_behind_different_prompt_tokens_are_refused_by_row(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a tokenizer merges across the boundary one delta cannot stand on both."""
    system: Any = load_base("tiny:llama")
    real = method.encode_pair

    def merged(*args: Any, **kwargs: Any) -> PreferencePair:
        pair = real(*args, **kwargs)
        start = pair.rejected.scored.index(True)
        ids = [*pair.rejected.ids[: start - 1], 9, *pair.rejected.ids[start:]]
        return PreferencePair(pair.chosen, pair.rejected._replace(ids=ids))

    monkeypatch.setattr(method, "encode_pair", merged)
    with pytest.raises(DataError, match="different prompt tokens.*row word-"):
        adversarial_items(system, data["train"], Config(), Run())


def test_a_model_without_a_chat_template_is_warned_about(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    import copy

    system: Any = load_base("tiny:llama")
    bare = copy.deepcopy(system.tokenizer)
    bare.chat_template = None
    plain = system.with_(chat=type(system.chat)(bare))
    with caplog.at_level("WARNING"):
        fit(plain, data, Config(**SMALL), Run())
    assert "no chat template" in caplog.text


def test_an_empty_utility_part_is_a_missing_one(data: Data) -> None:
    with pytest.raises(DataError, match="ordinary replies"):
        fit(load_base("tiny:llama"), data.with_part("utility", []), Config(**SMALL), Run())
