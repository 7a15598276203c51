"""The mask, the fit and the other departures, on a tiny random model."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import AddedToken

from temper.core.errors import ModelError
from temper.core.types import Message, Run
from temper.data.schemas import Data
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.conftest import dialogue, rows, small
from temper.methods.refusal.refusal_tokens.control_tokens import unused_specials
from temper.methods.refusal.refusal_tokens.gate import Controls
from temper.methods.refusal.refusal_tokens.method import encode, fit, training_rows
from temper.ops.generate import Sampling, generate


def test_the_control_token_is_the_first_scored_token(tiny) -> None:
    controls = Controls((101,), ("refuse",), 102)
    record = dialogue("hello", "no thanks", category="x")
    example = encode(tiny, record, controls, small())
    prompt = tiny.chat.prompt(record.prompt).ids
    assert example.ids[: len(prompt) + 1] == [*prompt, 101]
    assert example.scored.index(True) == len(prompt)
    plain = tiny.chat.dialogue(record.messages)
    assert [t for t in example.ids if t not in (101, 102)] == plain.ids
    reply = plain.spans[-1]
    assert sum(example.scored) == 1 + reply.end - reply.start, "control, reply and its end of turn"


def test_departure_1_only_assistant_turns_are_scored(tiny) -> None:
    example = encode(tiny, dialogue("hello", "hi"), Controls((101,), ("refuse",), 102), small())
    prompt = tiny.chat.prompt((Message("user", "hello"),)).ids
    assert not any(example.scored[: len(prompt)])


def test_departure_7_earlier_turns_respond_and_the_last_takes_the_label(tiny) -> None:
    record = dialogue("one", "first", "two", "second", category="b")
    example = encode(tiny, record, Controls((101, 103), ("a", "b"), 102), small())
    assert [t for t in example.ids if t > 100 and t in (101, 102, 103)] == [102, 103]
    assert all(example.scored[example.ids.index(t)] for t in (102, 103))


def test_departure_4_replies_continue_the_forced_token(tiny, fitted) -> None:
    """Greedy replies equal those of the prompt with the decided token appended, decoded apart."""
    with fitted.apply(tiny) as system:
        prompt = system.chat.prompt((Message("user", "ask a 1"),)).ids
        reply = generate(system, ["ask a 1"], Sampling(max_new_tokens=6), Run())[0]
        decided = reply.ids[0]
        later = generate(
            system.with_(step_rules=()),
            [[*prompt, decided]],
            Sampling(max_new_tokens=5),
            Run(),
            rules=(NoControls(system),),
        )[0]
        assert reply.ids == [decided, *later.ids]


class NoControls:
    """Forbids control ids at every position, as the gate does after the first."""

    name = "no-controls"

    def __init__(self, system) -> None:
        self.ids = system.step_rules[-1].controls.ids

    def start(self, prompt_ids: list[int]) -> dict:
        return {}

    def __call__(self, logits_BV, position_B, states):
        out_BV = logits_BV.clone()
        out_BV[:, self.ids] = -torch.inf
        return out_BV


def test_departure_6_typed_control_strings_are_ordinary_tokens(tiny, fitted) -> None:
    with fitted.apply(tiny) as system:
        reply = generate(system, ["[respond] [a] hello"], Sampling(max_new_tokens=3), Run())[0]
        assert reply.info["refusal-tokens"]["verdict"] in ("refuse", "respond")
        assert "[respond]" not in reply.text


def test_calibration_file_names_what_it_rests_on(tiny, fitted) -> None:
    settings = fitted.members[1].settings
    assert set(settings) == {
        "model", "template_sha256", "token_ids", "mode", "temperature", "thresholds", "selected", "calibration",
    }  # fmt: skip
    assert set(settings["calibration"]) == {"n_pos", "n_neg", "F1", "TPR", "FPR", "AUROC", "leak"}
    assert settings["calibration"]["n_pos"] == 16
    assert min(settings["token_ids"].values()) >= tiny.num_embeddings


def test_another_system_prompt_is_refused_and_recalibration_mends_it(tiny, fitted) -> None:
    other = tiny.with_(chat=tiny.chat.with_(system_prompt="Be brief."))
    with pytest.raises(ModelError, match="another chat template"), fitted.apply(other):
        pass
    adapter = fitted.members[0]
    with fitted.apply(tiny) as system:
        moved = system.with_(chat=system.chat.with_(system_prompt="Be brief."))
        decoder = fit(
            moved, Data({"calibration": rows("a", 8) + rows("b", 8) + rows(None, 8)}), small(), Run()
        )
        with decoder.apply(moved) as again:
            assert [rule.name for rule in again.step_rules] == ["refusal-tokens"], (
                "the new gate replaces the old one"
            )
    assert decoder.settings["template_sha256"] != fitted.members[1].settings["template_sha256"]
    assert adapter.kind == "adapter"


def test_by_hand_thresholds_force_and_suppress(tiny) -> None:
    both = Data({"train": rows("a", 8) + rows(None, 8)})
    for threshold, verdict in ((0.0, "refuse"), (2.0, "respond")):
        artefact = fit(tiny, both, small(tokens="single", thresholds={"refuse": threshold}), Run())
        with artefact.apply(tiny) as system:
            replies = generate(system, ["ask a 1", "ask None 2"], Sampling(max_new_tokens=2), Run())
        assert [reply.info["refusal-tokens"]["verdict"] for reply in replies] == [verdict, verdict]


def test_placement_reuse_keeps_the_shape(tiny) -> None:
    both = Data({"train": rows("a", 8) + rows(None, 8)})
    tiny = with_spares(tiny)
    spare = unused_specials(tiny, 2)
    artefact = fit(tiny, both, small(tokens="single", placement="reuse"), Run())
    assert artefact.members[1].settings["token_ids"] == {"refuse": spare[0], "respond": spare[1]}
    with artefact.apply(tiny) as system:
        assert system.num_embeddings == tiny.num_embeddings
    with pytest.raises(ModelError, match="unused special tokens"):
        unused_specials(tiny, 500)


def with_spares(system):  # type: ignore[no-untyped-def]
    """Two ids of the vocabulary turned into special tokens that no template uses."""
    tokenizer = copy.deepcopy(system.tokenizer)
    names = [tokenizer.convert_ids_to_tokens(token_id) for token_id in (400, 401)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    return system.with_(tokenizer=tokenizer, chat=system.chat.with_(tokenizer=tokenizer))


def test_no_tokens_is_plain_fine_tuning(tiny) -> None:
    artefact = fit(tiny, Data({"train": rows("a", 4) + rows(None, 4)}), small(tokens="none"), Run())
    assert artefact.kind == "adapter"
    assert artefact.vocabulary is None


def test_subset_keeps_every_kind_and_contrast_can_be_left_out() -> None:
    many = rows("a", 20) + rows("b", 20) + rows(None, 40) + rows(None, 20, kind="contrast")
    subset = training_rows(many, small(max_train_rows=20), 0)
    kinds = [(r.extra["refusal_category"], r.extra["kind"]) for r in subset]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        ("a", "ordinary"): 4, ("b", "ordinary"): 4, (None, "ordinary"): 8, (None, "contrast"): 4,
    }  # fmt: skip
    assert training_rows(many, small(max_train_rows=20), 0) == subset
    assert not [r for r in training_rows(many, small(contrast=False), 0) if r.extra["kind"] == "contrast"]


def test_departure_9_rows_have_their_own_learning_rate(tiny) -> None:
    both = Data({"train": rows("a", 8) + rows(None, 8)})
    moved = {}
    for token_lr in (0.0, 0.3):
        config = Config(
            mode="lora", rank=2, lr=1e-3, batch_rows=16, tokens="single", token_lr=token_lr, warmup_ratio=0
        )
        adapter = fit(tiny, both, config, Run()).members[0]
        start = adapter.vocabulary.start["embeddings"]
        trained = next(value for key, value in adapter.tensors.items() if "embed" in key)
        moved[token_lr] = float((trained - start).abs().max())
    assert moved[0.0] == pytest.approx(1e-3, rel=0.05), "Adam's first step is the learning rate an entry"
    assert moved[0.3] == pytest.approx(0.3, rel=0.05)
