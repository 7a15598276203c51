"""Weights, prompts, steering, decoding rules and stacks in force, and gone afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from temper.artefacts import ANY_BASE, Decoder, Prompt, Stack, Steer, Tune, Weights, load_artefact, tuning
from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Message, Run

from .conftest import logits, make_system, record, train

CARD = '"""A method outside the package."""\n'
METHOD = """
import contextlib


@contextlib.contextmanager
def build_steer(system, artefact, strength):
    module = system.model.get_input_embeddings()
    change = strength * artefact.tensors["direction"]
    handle = module.register_forward_hook(lambda module, args, out: out + change)
    try:
        yield
    finally:
        handle.remove()


class Ban:
    name = "ban"

    def __init__(self, ids):
        self.ids = ids

    def start(self, prompt_ids):
        return {}

    def __call__(self, logits_BV, position_B, states):
        logits_BV[:, self.ids] = -float("inf")
        return logits_BV


def build_decoder(system, artefact):
    return Ban(artefact.settings["ids"])
"""


@pytest.fixture
def shifty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method with both builders, in a folder of its own."""
    folder = tmp_path / "family" / "shifty_words"
    folder.mkdir(parents=True)
    (folder / "card.py").write_text(CARD)
    (folder / "method.py").write_text(METHOD)
    bare = tmp_path / "family" / "bare_words"
    bare.mkdir()
    (bare / "card.py").write_text(CARD)
    (bare / "method.py").write_text("")
    monkeypatch.setenv("TEMPER_METHODS", str(tmp_path))
    return "shifty-words"


def test_weights_move_from_base_to_new(system: Any) -> None:
    name, old = list(system.model.named_parameters())[2]
    before, old = record(system), old.detach().clone()
    new = torch.randn_like(old)
    weights = Weights(system.fingerprint, "made-up", {name: new})
    for strength, wanted in ((0.0, old), (1.0, new), (0.25, 0.75 * old + 0.25 * new), (2.0, 2 * new - old)):
        with weights.apply(system, strength) as changed:
            torch.testing.assert_close(changed.model.get_parameter(name).data, wanted, atol=1e-6, rtol=1e-6)
        assert record(system) == before
    with weights.apply(system, 0.0) as changed:
        assert torch.equal(changed.model.get_parameter(name), old)


def test_weights_keep_the_dtype_of_the_base_and_ties(llama: Any) -> None:
    llama.model.to(torch.bfloat16)
    name = "model.embed_tokens.weight"
    new = torch.randn(llama.model.get_parameter(name).shape)
    with Weights(llama.fingerprint, "made-up", {name: new}).apply(llama, 0.5) as changed:
        assert changed.model.get_parameter(name).dtype == torch.bfloat16
        assert changed.model.lm_head.weight is changed.model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.0.mlp.up_porj.weight", (24, 16)), ("model.norm.weight", (3,))]
)
def test_weights_that_do_not_fit_are_refused_before_a_forward(llama: Any, name: str, shape: Any) -> None:
    before = record(llama)
    wrong = Weights(
        llama.fingerprint, "made-up", {"model.norm.weight": torch.zeros(16), name: torch.zeros(shape)}
    )
    with pytest.raises(ModelError, match="no tensor"), wrong.apply(llama):
        pass
    assert record(llama) == before


def test_a_prompt_surrounds_the_last_user_message(llama: Any) -> None:
    shown = (Message("user", "2+2"), Message("assistant", "4"))
    prompt = Prompt(ANY_BASE, "made-up", "Be brief.", "Please: ", " Thanks.", shown)
    talk = (Message("system", "old"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    with prompt.apply(llama) as changed:
        assert changed.rewritten(talk) == (
            Message("system", "Be brief."),
            *shown,
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "Please: c Thanks."),
        )
        assert changed.fingerprint != llama.with_().fingerprint
    assert llama.rewrites == ()
    kept = Prompt(ANY_BASE, "made-up", prefix="x ")
    assert kept.rewrite(talk[:2]) == (Message("system", "old"), Message("user", "x a"))
    assert kept.rewrite(()) == ()


def test_prompts_and_decoders_have_no_strength(llama: Any, shifty: str) -> None:
    for artefact in (Prompt(llama.fingerprint, "made-up"), Decoder(llama.fingerprint, shifty, {"ids": [1]})):
        with pytest.raises(ConfigError, match="has no strength"), artefact.apply(llama, 0.5):
            pass


def test_steering_is_what_the_method_builds(llama: Any, shifty: str, tmp_path: Path) -> None:
    before = record(llama)
    steer = Steer(llama.fingerprint, shifty, {}, {"direction": torch.ones(16)})
    loaded = load_artefact(steer.save(tmp_path / "s"))
    plain = logits(llama)
    with loaded.apply(llama, 0.5) as changed:
        shifted = logits(changed)
    with steer.apply(llama, 0.5) as changed:
        assert torch.equal(logits(changed), shifted)
    assert not torch.equal(shifted, plain)
    assert record(llama) == before


def test_a_decoder_adds_its_rule_last_and_replaces_its_namesake(llama: Any, shifty: str) -> None:
    first, stale = SimpleNamespace(name="first"), SimpleNamespace(name="ban")
    decoder = Decoder(llama.fingerprint, shifty, {"ids": [4, 5]})
    with decoder.apply(llama.with_(step_rules=(stale, first))) as changed:
        assert changed.step_rules[0] is first
        assert len(changed.step_rules) == 2
        out = changed.step_rules[1](torch.zeros(1, 8), [0], [{}])
    assert out[0].isinf().nonzero().flatten().tolist() == [4, 5]
    assert llama.step_rules == ()


def test_a_method_without_the_builder_says_so(llama: Any, shifty: str) -> None:
    for artefact in (Steer(llama.fingerprint, "bare-words"), Decoder(llama.fingerprint, "bare-words")):
        with pytest.raises(ConfigError, match="has no build_"), artefact.apply(llama):
            pass


def test_a_stack_is_its_members_in_order(run: Run, shifty: str, tmp_path: Path) -> None:
    system = make_system("llama-untied")
    before = record(system)
    with tuning(system, Tune(r=2, new_tokens=("[REFUSE]",)), run) as t:
        train(t)
        adapter = t.finish("made-up")
    with adapter.apply(system) as once:
        size, steer = len(once.tokenizer), Steer(once.fingerprint, shifty, {}, {"direction": torch.ones(16)})
        with steer.apply(once, 0.5) as twice:
            wanted = logits(twice)
    prompt, rule = (
        Prompt(system.fingerprint, "made-up", "Be brief."),
        Decoder(adapter.base, shifty, {"ids": [1]}),
    )
    stack = load_artefact(Stack.of([adapter, steer, prompt, rule], "made-up").save(tmp_path / "s"))
    with stack.apply(system, 0.5) as changed:
        assert len(changed.tokenizer) == size
        assert len(changed.rewrites) == len(changed.step_rules) == 1
    with (
        adapter.apply(system, 0.5) as once,
        Steer(once.fingerprint, shifty, {}, steer.tensors).apply(once, 0.5) as two,
    ):
        half = logits(two)
    with stack.apply(system, 0.5) as changed:
        assert torch.equal(logits(changed), half)
        assert not torch.equal(half, wanted)
    assert record(system) == before
    broken = Stack.of([adapter, Steer(adapter.base, "bare-words")], "made-up")
    with pytest.raises(ConfigError, match="build_steer"), broken.apply(system):
        pass
    assert record(system) == before


def test_a_system_without_weights_is_refused_where_they_are_needed(llama: Any) -> None:
    class Endpoint:
        fingerprint = "far away"

    for artefact in (
        Weights(ANY_BASE, "made-up", {}),
        Steer(ANY_BASE, "made-up"),
        Decoder(ANY_BASE, "made-up"),
    ):
        with pytest.raises(NeedsError, match="Endpoint has none"), artefact.apply(Endpoint()):
            pass
    with (
        pytest.raises(NeedsError, match="rewrites messages; Endpoint has no place"),
        Prompt(ANY_BASE, "made-up").apply(Endpoint()),
    ):
        pass


def test_the_package_is_cheap_and_its_names_arrive_when_asked() -> None:
    code = (
        "import sys, temper.artefacts as a; assert 'torch' not in sys.modules;"
        "assert all(getattr(a, name) is not None for name in a.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fingerprint_survives_apply_without_hashing_again(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = llama.fingerprint
    weights = Weights(wanted, "made-up", {"model.norm.weight": torch.zeros(16)})
    monkeypatch.setattr("temper.systems.fingerprint._hash", lambda model: pytest.fail("hashed again"))
    with weights.apply(llama) as changed:
        assert changed.fingerprint != wanted
    assert llama.fingerprint == wanted
