"""Tuning: what is trained, what it leaves, and a base that is bit-identical afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from temper.artefacts import Adapter, Tune, Weights, tuning
from temper.core import config
from temper.core.errors import ConfigError, ModelError
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.train import SftObjective, TrainSettings
from temper.ops.train import train as train_loop

from .conftest import logits, make_system, record, train

MODES = {
    "lora": Tune(r=4, alpha=8),
    "bf16": Tune(r=4, frozen_dtype="bf16", dropout=0.1),
    "tokens": Tune(r=4, new_tokens=("[REFUSE]", "[RESPOND]"), reuse_ids=(2,)),
    "full": Tune(mode="full"),
    "full-tokens": Tune(mode="full", new_tokens=("[a]", "[b]", "[c]", "[d]", "[e]", "[f]")),
}


@pytest.mark.parametrize("mode", MODES)
def test_base_is_bit_identical_afterwards(system: Any, run: Run, mode: str) -> None:
    system.model.train()
    next(system.model.parameters()).requires_grad_(False)
    before = record(system)
    with tuning(system, MODES[mode], run) as t:
        train(t)
        artefact = t.finish("made-up")
    assert record(system) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_while_training(system, MODES[mode], run)
    assert record(system) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_while_applied(artefact, system, logits_of(before))
    assert record(system) == before


def _fail_while_training(system: Any, tune: Tune, run: Run) -> None:
    with tuning(system, tune, run) as t:
        train(t)
        t.system.model.train()
        t.system.model.register_forward_hook(lambda *_: None)
        raise RuntimeError("on purpose")


def _fail_while_applied(artefact: Any, system: Any, before: torch.Tensor) -> None:
    with artefact.apply(system, 0.7) as changed:
        assert not torch.equal(logits(changed)[..., :200], before)
        raise RuntimeError("on purpose")


def logits_of(before: dict[str, Any]) -> torch.Tensor:
    dtype, shape, raw = before["outputs"]
    return torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)[..., :200]


@pytest.mark.parametrize("mode", ["lora", "tokens", "full", "full-tokens"])
def test_applied_artefact_answers_as_the_trained_model(system: Any, run: Run, mode: str) -> None:
    with tuning(system, MODES[mode], run) as t:
        train(t)
        wanted = logits(t.system)
        artefact = t.finish("made-up")
    assert isinstance(artefact, Weights if mode.startswith("full") else Adapter)
    assert artefact.base == system.fingerprint
    with artefact.apply(system) as changed:
        torch.testing.assert_close(logits(changed), wanted, atol=1e-5, rtol=1e-5)
        assert changed.model.config.vocab_size == wanted.shape[-1]


def test_the_same_seed_gives_the_same_artefact(llama: Any, run: Run) -> None:
    """And the global random state is as it was."""
    state = torch.random.get_rng_state()
    with tuning(llama, MODES["tokens"], run) as t:
        assert torch.equal(torch.random.get_rng_state(), state)
        train(t)
        one = t.finish("made-up")
    with tuning(llama, MODES["tokens"], run) as t:
        train(t)
        two = t.finish("made-up")
    with tuning(llama, MODES["tokens"], Run(seed=4)) as t:
        train(t)
        other = t.finish("made-up")
    assert one.fingerprint == two.fingerprint != other.fingerprint


@pytest.mark.parametrize("mode", MODES)
def test_an_artefact_that_changes_nothing_is_an_error(system: Any, run: Run, mode: str) -> None:
    with tuning(system, MODES[mode], run) as t, pytest.raises(ModelError, match="changes nothing"):
        t.finish("made-up")


def test_finish_is_for_inside(llama: Any, run: Run) -> None:
    with tuning(llama, Tune(), run) as t:
        pass
    with pytest.raises(ModelError, match="has ended"):
        t.finish("made-up")


def test_only_what_is_trained_requires_grad(system: Any, run: Run) -> None:
    with tuning(system, Tune(r=3, new_tokens=("[a]",)), run) as t:
        names = set(t.named_parameters())
        assert names == {n for n, p in t.system.model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name or name.endswith(".rows") for name in names)
        assert {p.dtype for p in t.parameters()} == {torch.float32}
    with tuning(system, Tune(mode="full"), run) as t:
        assert set(t.named_parameters()) == set(dict(t.system.model.named_parameters()))


def test_bf16_is_for_the_frozen_weights_only(llama: Any, run: Run) -> None:
    with tuning(llama, Tune(r=2, frozen_dtype="bf16", new_tokens=("[a]",)), run) as t:
        kinds = {p.requires_grad: p.dtype for p in t.system.model.parameters()}
        assert kinds == {True: torch.float32, False: torch.bfloat16}
        assert logits(t.system).dtype == torch.bfloat16
        train(t)
        artefact = t.finish("made-up")
    assert isinstance(artefact, Adapter)
    assert {tensor.dtype for tensor in artefact.tensors.values()} == {torch.float32}


def test_named_targets_and_only_them(run: Run) -> None:
    llama = make_system("llama-untied")
    with tuning(llama, Tune(r=2, targets=("q_proj", "1.mlp.up_proj")), run) as t:
        train(t)
        artefact = t.finish("made-up")
    assert isinstance(artefact, Adapter)
    wanted = {f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)} | {"model.layers.1.mlp.up_proj"}
    assert set(artefact.pairs()) == wanted
    with tuning(llama, Tune(mode="full", targets=("q_proj",)), run) as t:
        train(t)
        weights = t.finish("made-up")
    assert isinstance(weights, Weights)
    assert set(weights.tensors) == {f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1)}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_targets_that_match_nothing_name_the_nearest(llama: Any, run: Run, mode: Any) -> None:
    before = record(llama)
    with (
        pytest.raises(ConfigError, match=r"q_porj.*matches no.*Did you mean.*q_proj"),
        tuning(llama, Tune(mode=mode, targets=("q_porj",)), run),
    ):
        pass
    assert record(llama) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "half"},
        {"r": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"frozen_dtype": "int4"},
        {"mode": "full", "frozen_dtype": "bf16"},
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        Tune(**wrong)


def test_settings_come_from_plain_values() -> None:
    built = config.build(
        Tune, [("recipe", {"r": "8", "targets": ["q_proj"], "new_tokens": ["[a]"], "alpha": "1e1"})]
    )
    assert built.config == Tune(r=8, targets=("q_proj",), new_tokens=("[a]",), alpha=10.0)
    with pytest.raises(ConfigError, match="rank"):
        config.build(Tune, [("recipe", {"rank": 8})])
    assert {field.name for field in config.describe(Tune) if not field.doc} == set()


def test_the_system_in_training_is_never_taken_for_another(llama: Any, run: Run) -> None:
    with tuning(llama, Tune(r=2), run) as one:
        first = one.system.fingerprint
    with tuning(llama, Tune(r=2), Run(seed=8)) as two:
        assert len({first, two.system.fingerprint, llama.with_().fingerprint}) == 3


@pytest.mark.parametrize("mode", ["lora", "tokens", "full", "full-tokens"])
def test_the_reference_is_the_start_and_training_goes_on_after_it(system: Any, run: Run, mode: str) -> None:
    untouched = logits(system)
    with tuning(system, MODES[mode], run) as t:
        start = logits(t.system)
        train(t)
        moved = logits(t.system)
        with t.reference() as reference:
            assert torch.equal(logits(reference), start)
            assert not torch.is_grad_enabled()
            assert reference.fingerprint != t.system.fingerprint
        assert torch.is_grad_enabled()
        assert torch.equal(logits(t.system), moved)
        train(t, steps=1)
        assert not torch.equal(logits(t.system), moved)
    if "tokens" not in mode:
        assert torch.equal(start, untouched)


def test_the_training_loop_trains_a_tuning(llama: Any, run: Run) -> None:
    new = len(llama.tokenizer)
    examples = [Example([5, 9, new, 4, 1], [False, False, True, True, True])] * 4
    before = record(llama)
    with tuning(llama, Tune(r=4, new_tokens=("[REFUSE]",)), run) as t:
        settings = TrainSettings(lr=0.05, num_epochs=5, batch_rows=2)
        log = train_loop(
            t.system.model,
            t.parameters(),
            lambda epoch: examples,
            SftObjective(pad_id=0),
            settings,
            run,
            length=lambda example: len(example.ids),
        )
        assert log.num_steps == 10
        artefact = t.finish("made-up")
    assert record(llama) == before
    ids = torch.tensor([[5, 9]])
    with artefact.apply(llama) as changed:
        assert int(logits(changed, ids)[0, -1].argmax()) == new


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_autocast_keeps_no_copy_of_the_reference(system: Any, run: Run, mode: str) -> None:
    """Autocast caches low-precision copies of trained weights; those of another moment would answer for these."""
    with tuning(system, MODES[mode], run) as t:
        train(t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trained = logits(t.system)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with t.reference() as before:
                start = logits(before)
            assert torch.equal(logits(t.system), trained)
            with t.reference() as before:
                assert torch.equal(logits(before), start)
        assert not torch.equal(start, trained)
