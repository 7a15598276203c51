"""lat's attack and its bad input: the ball after every step, the sixteen steps, architectures, radii of other families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue, Preference
from temper.methods.hardening.lat import rows as rows_module
from temper.methods.hardening.lat.card import Config
from temper.methods.hardening.lat.method import fit, make, objective_of
from temper.methods.hardening.lat.rows import attacked_items, search_of
from temper.ops import latent
from temper.ops.generate import Sampling, generate
from temper.ops.preference import PreferencePair
from temper.systems.loading import load_base

KINDS = ("llama", "gpt2", "qwen2", "gemma", "gemma2")
SMALL: dict[str, Any] = {
    "rank": 2, "lr": 1e-2, "attack_steps": 2, "num_rounds": 2, "model_steps": 2, "batch_rows": 3, "scale_rows": 4,
    "targets": "all-linear",
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return make(None, Data({}), Config(num_requests=14, num_held_out=4), Run())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["toward_away", "dpo"])
def test_sixteen_steps_lower_the_attacks_loss_inside_the_ball_after_every_one(
    kind: str, form: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    system: Any = load_base(f"tiny:{kind}")
    config = Config(form=form)  # type: ignore[arg-type]
    items = attacked_items(system, data, config, Run())[:3]
    objective = objective_of(system, config, search_of(system, items, config, Run()))
    balls, longest, move = objective.search.balls, [], latent._move

    def watched(deltas: Any, *args: Any) -> None:
        move(deltas, *args)
        longest.append(
            max(float(d.detach().norm(dim=-1).max()) / balls[site].radius for site, d in deltas.items())
        )

    monkeypatch.setattr(latent, "_move", watched)
    found = objective.find(system.model, items)
    assert len(longest) == 16 == found.num_backward
    assert max(longest) <= 1 + 1e-5
    assert max(longest) > 0.4, "half a radius a step"
    assert (found.after_N < found.before_N).all()
    # Half a radius a step: it goes to and fro near the boundary, below where it began.
    assert max(found.way[4:]) < found.way[0]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_train_work_on_every_architecture(kind: str, mode: str, data: Data) -> None:
    system: Any = load_base(f"tiny:{kind}")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        calm = system.model(input_ids=ids, use_cache=False).logits.clone()
    artefact = fit(system, data, Config(**(SMALL | {"mode": mode})), Run())
    assert artefact.kind == {"full": "weights", "lora": "adapter"}[mode]
    with torch.no_grad():
        assert torch.equal(system.model(input_ids=ids, use_cache=False).logits, calm), (
            "bit-identical afterwards"
        )
        with artefact.apply(system) as hardened:
            assert not torch.equal(hardened.model(input_ids=ids, use_cache=False).logits, calm)


def test_modules_of_another_architecture_are_named(data: Data) -> None:
    with pytest.raises(ConfigError, match="'q_proj' matches no linear module"):
        fit(load_base("tiny:gpt2"), data, Config(**(SMALL | {"targets": Config().targets})), Run())


def test_a_published_radius_in_the_place_of_a_share_is_said(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """6.0 and 1.5 are lengths on Llama; as shares they are several times what they perturb."""
    system: Any = load_base("tiny:llama")
    items = attacked_items(system, data, Config(), Run())
    with caplog.at_level("WARNING"):
        search_of(system, items, Config(eps=0.2), Run())
        assert not caplog.records
        search_of(system, items, Config(eps=6.0), Run())
    assert "belongs in absolute_eps" in caplog.text


def test_a_share_gives_each_model_its_own_radius(data: Data) -> None:
    radii = {}
    for kind in ("llama", "gemma"):
        system: Any = load_base(f"tiny:{kind}")
        items = attacked_items(system, data, Config(), Run())
        search = search_of(system, items, Config(), Run())
        radii[kind] = search.balls["embeddings.output"].radius
    assert radii["gemma"] > 3 * radii["llama"], "Gemma's embeddings are sqrt(D) times as long"


def test_replies_behind_different_prompt_tokens_are_refused_by_row(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    system: Any = load_base("tiny:llama")
    real = rows_module.encode_pair

    def shifted(*args: Any, **kwargs: Any) -> PreferencePair:
        pair = real(*args, **kwargs)
        return PreferencePair(pair.chosen, pair.rejected._replace(ids=[9, *pair.rejected.ids[1:]]))

    monkeypatch.setattr(rows_module, "encode_pair", shifted)
    with pytest.raises(DataError, match="different prompt tokens.*row "):
        attacked_items(system, data, Config(), Run())


def test_an_empty_part_is_a_missing_one(data: Data) -> None:
    with pytest.raises(DataError, match="keeps the part benign"):
        fit(load_base("tiny:llama"), data.with_part("benign", []), Config(**SMALL), Run())
    rmu = Data({"forget": [], "retain": []}, "none")
    with pytest.raises(DataError, match="reads the part forget"):
        fit(load_base("tiny:llama"), rmu, Config(**SMALL, form="rmu"), Run())


def test_generating_under_a_perturbation_perturbs_the_prefill_alone(data: Data) -> None:
    """A decoding step is one token long: what was found for the prompt has no place there."""
    system: Any = load_base("tiny:llama")
    config = Config(eps=1.0)
    items = attacked_items(system, data, config, Run())[:1]
    found = objective_of(system, config, search_of(system, items, config, Run())).find(system.model, items)
    prompt = items[0].bad.ids[: items[0].bad.scored.index(True)]
    sampling = Sampling(max_new_tokens=3)
    (calm,) = generate(system, [prompt], sampling, Run())
    with found.perturbation.applied(system.model, [0]), torch.no_grad():
        out = system.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
        )
    assert out.shape[1] > len(prompt)
    (again,) = generate(system, [prompt], sampling, Run())
    assert again.ids == calm.ids


def test_kl_and_dpo_need_no_adapter(data: Data) -> None:
    """The starting model is kept beside whole weights as beside adapters."""
    for form in ("toward_away", "dpo"):
        config = Config(**(SMALL | {"mode": "full", "lr": 1e-3}), form=form, kl=1.0)  # type: ignore[arg-type]
        assert fit(load_base("tiny:llama"), data, config, Run()).kind == "weights"


def test_rows_with_a_system_turn() -> None:
    prompt = (Message("system", "Be brief."), Message("user", "Hi"))
    train = [Preference(prompt, "I cannot help.", "Sure, it is lamp.", id=str(at)) for at in range(3)]
    benign = [Dialogue((Message("user", "Say yes."), Message("assistant", "Yes.")), id="u")]
    fit(load_base("tiny:qwen2"), Data({"train": train, "benign": benign}), Config(**SMALL), Run())
