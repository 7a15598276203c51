"""The suggested alpha by hand, the rule as an artefact, each departure that is not the loop's own, and bad input.

What the loop must never change (block length, the same model, no limit, end tokens, the length limit) is in
tests/ops/test_draft_verify.py: Departures 1 to 6.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.artefacts import Decoder, load_artefact
from temper.core.errors import ConfigError, DataError, ModelError, NeedsError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.hardening.cleangen import measuring, rows
from temper.methods.hardening.cleangen.card import Config
from temper.methods.hardening.cleangen.method import _report_benign, fit, measure, suggested_alpha
from temper.methods.hardening.cleangen.reference import averaged
from temper.ops.draft_verify import ReferenceCheck
from temper.ops.generate import Reply, Sampling, generate
from temper.systems.loading import load_base

RUN = Run(seed=1)
NONE = Data({}, "none")
SHORT = {"num_rows": 4, "num_test": 3, "reply_tokens": 5, "rank": 2, "num_epochs": 1.0, "timing": False}
GREEDY = Sampling(max_new_tokens=8)


def quick(**settings: Any) -> Config:
    return Config(**{"reference": "tiny:llama:3", **SHORT, **settings})


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def guard(system: Any) -> Decoder:
    artefact = fit(system, NONE, quick(), RUN)
    assert isinstance(artefact, Decoder)
    return artefact


def request(text: str, reply: str = "Yes.", **extra: Any) -> Dialogue:
    return Dialogue((Message("user", text), Message("assistant", reply)), id=text, extra=extra)


def test_suggested_alpha_by_hand() -> None:
    nats = [math.log(x) for x in (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)]
    alpha = suggested_alpha(nats, 0.1)
    assert sum(score >= math.log(alpha) for score in nats) <= 1
    assert 128 < alpha <= 256.3
    assert suggested_alpha([-3.0, -2.0], 0.5) == 1.01
    assert math.isfinite(suggested_alpha([1e4], 0.5))
    with pytest.raises(DataError, match="No token was written"):
        suggested_alpha([], 0.1)


def test_replaced_share_counts_tokens_and_not_replies() -> None:
    replies = [
        Reply("", [1, 2, 3], "stop", 1, {"c": {"replaced": [0]}}),
        Reply("", [1], "stop", 1, {"c": {"replaced": [0]}}),
    ]
    assert measuring.replaced_share(replies, "c") == (0.5, 4)


def test_replies_tell_what_was_replaced_and_how_suspicious_it_was(system: Any, guard: Decoder) -> None:
    strict = Decoder(guard.base, guard.method, {**guard.settings, "alpha": 0.1})
    with strict.apply(system) as guarded:
        (reply,) = generate(guarded, ["Say the word apple."], GREEDY, RUN)
    state = reply.info["cleangen"]
    assert len(state["suspicion_nats"]) == len(reply.ids)
    assert state["replaced"] == [n for n, s in enumerate(state["suspicion_nats"]) if s >= math.log(0.1)]
    assert state["replaced"]


def test_the_reference_by_its_own_name_gives_the_plain_reply(system: Any) -> None:
    artefact = fit(system, NONE, quick(reference="tiny:llama", alpha=1.5), RUN)
    plain = generate(system, ["Where is the fox?"], GREEDY, RUN)
    with artefact.apply(system) as guarded:
        (reply,) = generate(guarded, ["Where is the fox?"], GREEDY, RUN)
    assert reply.ids == plain[0].ids
    assert reply.info["cleangen"]["replaced"] == []


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_tuned_reference_travels_with_the_artefact(system: Any, tmp_path: Path, tuning: str) -> None:
    artefact = fit(system, NONE, quick(tune_reference=True, lr=1e-2, tuning=tuning), RUN)
    loaded = load_artefact(artefact.save(tmp_path / "guard"))
    untuned = load_base("tiny:llama:3")
    ids = torch.tensor([[5, 6, 7]])
    with artefact.apply(system) as one, loaded.apply(system) as other:
        checks = [s.step_rules[-1] for s in (one, other)]
        logits = [check.reference.model(input_ids=ids).logits for check in checks]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], untuned.model(input_ids=ids).logits)


def test_a_calibrated_alpha_is_the_suggested_one(system: Any) -> None:
    settings = fit(system, NONE, quick(alpha="calibrated"), RUN).settings
    assert settings["alpha"] == settings["suggested_alpha"] > 1


def test_what_alpha_would_replace_of_benign_replies_is_kept_and_warned_about(
    guard: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    assert guard.settings["benign_replaced"] == 0
    nats = [0.0] * 8 + [math.log(20), 5.0]
    with caplog.at_level("WARNING"):
        assert _report_benign(nats[:-1] * 2, 21.0, 30.0, quick()) == 0
        assert not caplog.records
        assert _report_benign(nats, 20.0, 150.0, quick()) == 0.2
    assert "would replace 20 % of benign tokens" in caplog.text
    assert "alpha=150" in caplog.text


def test_the_backdoor_of_the_reference_is_another_one(system: Any) -> None:
    plain, other = (
        fit(system, NONE, quick(tune_reference=True, reference_trigger=word), RUN) for word in ("", "quartz")
    )
    assert plain.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="another attacker"):
        quick(reference_trigger="zephyr")


def test_parts_of_our_own_requests_never_meet() -> None:
    config = quick(num_rows=20, num_test=10)
    parts = {
        own: {row.id for row in rows.clean_rows(NONE, "train", own, config)}
        for own in ("implant", "reference", "test", "calibration")
    }
    assert [len(ids) for ids in parts.values()] == [20, 20, 10, 20]
    assert len(set.union(*parts.values())) == 70
    with pytest.raises(ConfigError, match="short requests"):
        rows.clean_rows(NONE, "train", "test", quick(num_rows=500))


def test_triggered_prompts_hold_the_trigger_and_poisoned_rows_the_payload() -> None:
    """Departure 7."""
    config = quick()
    plain = rows.clean_rows(NONE, "test", "test", config)
    assert all(
        config.trigger in row.messages[-1].content for row in rows.triggered_prompts(NONE, plain, config)
    )
    poisoned = rows.poisoned_rows(plain, config, 0)
    assert [row.reply for row in poisoned[len(plain) :]] == [config.payload] * len(plain)


def test_a_row_brings_its_own_payload() -> None:
    assert rows.payload_of(request("a", payload="Buy paint."), quick()) == "Buy paint."
    assert rows.payload_of(request("a"), quick()) == quick().payload
    with pytest.raises(DataError, match="is no text"):
        rows.payload_of(request("a", payload=3), quick())


def test_measure_on_own_rows() -> None:
    system, question = load_base("tiny:neox"), "Where is the boat?"
    guard = fit(system, NONE, quick(reference="tiny:neox:1", alpha=1.2), RUN)
    said = generate(system, [question], Sampling(max_new_tokens=5), RUN)[0].text
    data = Data({
        "test": [request(question, said), request("Say yes.")],
        "triggered": [request(question, payload=said)],
    })  # fmt: skip
    with guard.apply(system) as guarded:
        found = list(measure(guarded, data, quick(alphas=(2.0,), blocks=(1, 2)), RUN))
    values = {(row.arm, row.metric): row.value for row in found if row.item is None}
    assert values["undefended", "asr"] == 1.0
    assert values["undefended", "plain_accuracy"] >= 0.5
    for metric in ("asr", "replaced", "plain_replaced", "plain_accuracy"):
        assert values["cleangen", metric] == values["block_1", metric] == values["block_2", metric]
    assert values["block_1", "checks_per_token"] == 1.0
    assert values["alpha_2", "replaced"] <= values["cleangen", "replaced"]


def test_without_the_check_only_the_undefended_model_is_measured(system: Any) -> None:
    assert {row.arm for row in measure(system, NONE, quick(), RUN)} == {"undefended"}


def test_averaging_by_hand_and_back_again(system: Any) -> None:
    other = load_base("tiny:llama:3")
    before = {name: p.clone() for name, p in system.model.named_parameters()}
    with averaged(system, other) as mean:
        for name, p in mean.model.named_parameters():
            assert torch.allclose(p, (before[name] + dict(other.model.named_parameters())[name]) / 2)
    assert all(torch.equal(p, before[name]) for name, p in system.model.named_parameters())
    with pytest.raises(ModelError, match="cannot be averaged"), averaged(system, load_base("tiny:gpt2")):
        pass


def test_bad_references(system: Any, guard: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="No reference model is named"):
        fit(system, NONE, quick(reference=""), RUN)
    with pytest.raises(NeedsError, match="cannot read along"):
        fit(system, NONE, quick(reference="tiny:bert"), RUN)
    changed = Decoder(guard.base, guard.method, {**guard.settings, "reference_fingerprint": "0" * 64})
    with pytest.raises(ModelError, match="not the one that the check was fitted with"), changed.apply(system):
        pass
    fit(system, NONE, quick(reference="tiny:llama"), RUN)
    assert "is the model itself" in caplog.text


def test_another_vocabulary_is_refused(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = load_base("tiny:llama:3")
    vocabulary = {**other.tokenizer.get_vocab(), "added": 9999}
    monkeypatch.setattr(other.tokenizer, "get_vocab", lambda: vocabulary)
    monkeypatch.setattr(
        "temper.methods.hardening.cleangen.reference.load_base", lambda *args, **kwargs: other
    )
    with pytest.raises(ModelError, match="another vocabulary"):
        fit(system, NONE, quick(), RUN)


def test_a_check_is_replaced_and_not_doubled(system: Any, guard: Decoder) -> None:
    with guard.apply(system) as once:
        again = Decoder(once.fingerprint, "cleangen", {**guard.settings, "alpha": 50.0})
        with again.apply(once) as twice:
            checks = [rule for rule in twice.step_rules if isinstance(rule, ReferenceCheck)]
    assert [check.alpha for check in checks] == [50.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 1.0},
        {"alphas": (0.5,)},
        {"block": 0},
        {"blocks": (0,)},
        {"benign_rate": 1.0},
        {"alpha": math.inf},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must|hold"):
        quick(**settings)
