"""Refusal tokens: the rules by hand, the mask, each departure, and a fit on a tiny random model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from temper.core.errors import ConfigError, DataError, ModelError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.refusal.refusal_tokens.calibration import choose_thresholds
from temper.methods.refusal.refusal_tokens.card import Config
from temper.methods.refusal.refusal_tokens.control_tokens import unused_specials
from temper.methods.refusal.refusal_tokens.gate import (
    COMPARE,
    FREE,
    Controls,
    ReadOut,
    RefusalGate,
    decide_bias,
    decide_columns,
)
from temper.methods.refusal.refusal_tokens.method import encode, fit, names_of, training_rows
from temper.methods.refusal.refusal_tokens.scoring import off_effect
from temper.ops import thresholds
from temper.ops.generate import Sampling, generate
from temper.ops.search_prompt import PrefixesReply
from temper.systems.chat import Chat
from temper.systems.loading import load_base

NAMES = ("human", "incomplete", "indet", "safety", "unsupported")
CARD_P = np.array([[0.02, 0.30, 0.05, 0.08, 0.03, 0.50]])  # ..., respond; leak .02


def gate(
    names: tuple[str, ...] = ("refuse",), mode: str = "gate", selected: tuple[str, ...] = (), **values: float
) -> RefusalGate:
    ids = {name: index for index, name in enumerate(names)} | {"respond": len(names)}
    return RefusalGate(
        {"token_ids": ids, "mode": mode, "temperature": 1.0, "thresholds": values, "selected": list(selected)}
    )


def two_tokens(refuse: float = 1.0, respond: float = 2.0) -> torch.Tensor:
    return torch.tensor([[refuse, respond, -torch.inf, -torch.inf]])


def emitted(rule: RefusalGate, logits_BV: torch.Tensor) -> int:
    return int(rule(logits_BV, [0], [rule.start([])])[0].argmax())


def test_two_token_case_by_hand() -> None:
    p = gate().read(two_tokens()).p_NK[0]
    assert p[0] == pytest.approx(1 / (1 + math.e), abs=1e-6)
    assert emitted(gate(selected=("refuse",)), two_tokens()) == 1, "T = -1 compares: 0.2689 < 0.7311"
    assert emitted(gate(selected=("refuse",), refuse=0.25), two_tokens()) == 0
    assert emitted(gate(selected=("refuse",), refuse=0.28), two_tokens()) == 1


def test_bias_is_the_threshold_in_other_words() -> None:
    assert thresholds.threshold_from_bias(1.2) == pytest.approx(0.2315, abs=1e-4)
    assert int(decide_bias(two_tokens(), [0, 1], np.array([1.2]))) == 0
    assert int(decide_bias(two_tokens(), [0, 1], np.array([0.9]))) == 1
    for refuse in np.linspace(-3, 3, 25):
        for threshold in (0.05, 0.2689, 0.5, 0.9):
            logits = two_tokens(float(refuse), 0.3)
            by_gate = emitted(gate(selected=("refuse",), refuse=threshold), logits)
            by_bias = emitted(gate(mode="bias", selected=("refuse",), refuse=threshold), logits)
            assert by_gate == by_bias


@pytest.mark.parametrize(("threshold", "column"), [(0.0, 0), (2.0, 1)])
def test_ends_of_the_dial(threshold: float, column: int) -> None:
    for refuse in (-20.0, 0.0, 20.0):
        for mode in ("gate", "bias"):
            assert (
                emitted(gate(mode=mode, selected=("refuse",), refuse=threshold), two_tokens(refuse)) == column
            )


def test_temperature_keeps_the_ranking_of_two() -> None:
    p = thresholds.control_probs(two_tokens(), [0, 1], 2.0)[0]
    assert p[0] == pytest.approx(0.3775, abs=1e-4)


@pytest.mark.parametrize(
    ("selected", "threshold", "column"),
    [
        (("incomplete",), 0.25, 1),
        (("incomplete",), 0.35, 5),
        (("safety",), 0.0, 5),
        (("safety",), 0.9, 5),
        ((), 0.0, 5),
    ],
)
def test_category_case_by_hand(selected: tuple[str, ...], threshold: float, column: int) -> None:
    read = ReadOut(CARD_P, np.array([5]))
    chosen = np.array([name in selected for name in NAMES])
    assert decide_columns(read, np.full(5, threshold), chosen)[0] == column


def test_unselected_leader_leaves_the_model_its_own_argmax() -> None:
    read = ReadOut(np.array([[0.02, 0.05, 0.01, 0.01, 0.01, 0.1]]), np.array([FREE]))
    assert decide_columns(read, np.full(5, 0.0), np.array([True, False, True, True, True]))[0] == FREE


def test_departure_2_each_category_has_its_threshold() -> None:
    p = np.array([[0.4, 0.1, 0.5], [0.1, 0.4, 0.5]])
    read, both = ReadOut(p, np.array([2, 2])), np.array([True, True])
    assert decide_columns(read, np.array([0.3, 0.45]), both).tolist() == [0, 2]
    assert decide_columns(read, np.array([0.45, 0.3]), both).tolist() == [2, 1]


def test_sum_and_ratio_rules_by_hand() -> None:
    read, every = ReadOut(CARD_P, np.array([5])), np.ones(5, dtype=bool)
    assert decide_columns(read, np.full(5, 0.47), every, "sum")[0] == 1, "sum over refusals is .48"
    assert decide_columns(read, np.full(5, 0.49), every, "sum")[0] == 5
    ratio = np.array([0.5, 0.5, 0.5, 0.07, 0.5])
    assert decide_columns(read, ratio, every, "ratio")[0] == 3, "safety: .08 / .07 is the only ratio above 1"
    assert decide_columns(read, np.full(5, 0.31), every, "ratio")[0] == 5


def test_departure_8_a_refusal_at_exactly_the_threshold_is_one() -> None:
    read = ReadOut(np.array([[0.25, 0.75]]), np.array([1]))
    assert decide_columns(read, np.array([0.25]), np.array([True]))[0] == 0
    tie = ReadOut(np.array([[0.2, 0.2, 0.6]]), np.array([2]))
    assert decide_columns(tie, np.array([0.1, 0.1]), np.array([True, True]))[0] == 0


def test_compare_is_per_row() -> None:
    logits = torch.cat([two_tokens(3.0, 2.0), two_tokens(1.0, 2.0)])
    rule = gate(selected=("refuse",))
    assert rule(logits, [0, 0], [{}, {}]).argmax(-1).tolist() == [0, 1]


def test_departure_5_control_tokens_never_reappear() -> None:
    rule = gate(selected=("refuse",))
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.5]])
    out = rule(logits, [3], [{}])
    assert out.argmax().item() == 2
    assert torch.isinf(out[0, :2]).all()
    assert torch.equal(out[0, 2:], logits[0, 2:]), "other logits stay as they are"


def test_state_tells_verdict_category_and_force() -> None:
    rule = gate(NAMES, selected=("incomplete",), incomplete=0.25)
    states = [rule.start([]), rule.start([])]
    logits = torch.log(torch.tensor([[*CARD_P[0], 0.02], [0.01, 0.01, 0.01, 0.01, 0.01, 0.05, 0.90]]))
    rule(logits, [0, 0], states)
    assert (states[0]["verdict"], states[0]["category"], states[0]["forced"]) == (
        "refuse",
        "incomplete",
        True,
    )
    assert states[0]["p"]["safety"] == pytest.approx(0.08, abs=1e-6)
    assert states[0]["leak"] == pytest.approx(0.02, abs=1e-6)
    assert (states[1]["verdict"], states[1]["category"]) == ("none", None), (
        "an unselected leader: the model's own word"
    )


def test_departure_6_a_control_id_in_the_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="control ids"):
        gate().start([7, 1, 3])


def test_controls_round_trip() -> None:
    controls = Controls((10, 11), ("a", "b"), 12)
    assert Controls.from_json(controls.to_json()) == controls
    assert controls.ids == [10, 11, 12]
    assert [controls.column(x) for x in ("a", "b", None)] == [0, 1, 2]
    assert COMPARE < 0


def test_thresholds_by_category_maximise_the_average_that_is_asked_for() -> None:
    """A row of b that a leads is a right refusal (micro) and a wrong a (macro), so only macro cuts it off."""
    read = ReadOut(
        np.array([[0.7, 0.1, 0.2], [0.6, 0.1, 0.3], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]), np.zeros(4)
    )
    controls = Controls((1, 2), ("a", "b"), 3)
    micro = choose_thresholds(read, [0, 1, 1, 2], controls, Config())
    macro = choose_thresholds(read, [0, 1, 1, 2], controls, Config(average="macro"))
    assert micro["a"] < 0.6 < macro["a"] < 0.7
    only_b = choose_thresholds(read, [0, 1, 1, 2], controls, Config(average="macro", selected=("b",)))
    assert only_b["a"] == 0.5, "a category that is not selected keeps its start"


# The mask, the fit and the departures, on a tiny random model.


@pytest.fixture(scope="module")
def tiny():  # type: ignore[no-untyped-def]
    return load_base("tiny:llama")


def dialogue(*texts: str, category: str | None = None, kind: str = "ordinary") -> Dialogue:
    roles = ("user", "assistant") * len(texts)
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    return Dialogue(messages, id=texts[0], extra={"refusal_category": category, "kind": kind})


def small(**changes: object) -> Config:
    return Config(mode="lora", rank=2, lr=3e-2, batch_rows=8, num_epochs=3, **changes)  # type: ignore[arg-type]


def rows(category: str | None, num: int, kind: str = "ordinary") -> list[Dialogue]:
    return [
        dialogue(f"ask {category} {n}", f"reply {category} {n}", category=category, kind=kind)
        for n in range(num)
    ]


@pytest.fixture(scope="module")
def fitted(tiny):  # type: ignore[no-untyped-def]
    both = rows("a", 8) + rows("b", 8) + rows(None, 12)
    return fit(tiny, Data({"train": both, "calibration": both}), small(), Run())


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


def test_departure_3_the_temperature_stays_what_it_is() -> None:
    rule = gate(selected=("refuse",), refuse=0.3)
    rule.temperature = 2.0
    first, second = emitted(rule, two_tokens()), emitted(rule, two_tokens())
    assert first == second == 0, "sigmoid(-0.5) = .3775 >= .3, in every call"


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


@pytest.mark.parametrize(
    ("train", "calibration", "match"),
    [
        (rows(None, 4), None, "both are needed"),
        (rows("a", 4), None, "both are needed"),
        (rows("respond", 4) + rows(None, 4), None, "no name"),
        (rows("a", 4) + rows("b", 4) + rows(None, 4), rows("a", 4) + rows(None, 4), "no row of b"),
        (rows("a", 4) + rows(None, 4), rows("a", 4), "answered requests"),
        ([*rows("a", 4), dialogue("only a question")], None, "no reply"),
    ],
)
def test_rows_that_cannot_work_stop_before_training(tiny, train, calibration, match) -> None:
    parts = {"train": train} if calibration is None else {"train": train, "calibration": calibration}
    with pytest.raises(DataError, match=match):
        fit(tiny, Data(parts), small(), Run())


def test_a_row_that_would_be_truncated_is_named(tiny) -> None:
    long = dialogue("why", "word " * 80, category="a")
    with pytest.raises(DataError, match="truncated at 40.*why"):
        fit(tiny, Data({"train": [long, *rows(None, 4)]}), small(max_tokens=40), Run())


def test_few_rows_warn(tiny, caplog: pytest.LogCaptureFixture) -> None:
    names_of(rows("a", 3) + rows(None, 3), small())
    assert "'a' has 3 rows" in caplog.text


def test_templates_that_cannot_work_are_refused(tiny) -> None:
    both = Data({"train": rows("a", 4) + rows(None, 4)})
    bare = tiny.with_(chat=Chat(copy_without_template(tiny.tokenizer)))
    with pytest.raises(ModelError):
        fit(bare, both, small(), Run())
    opened = tiny.chat.template.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\nWell, ")
    if opened != tiny.chat.template:
        with pytest.raises(ModelError):
            fit(tiny.with_(chat=tiny.chat.with_(template=opened)), both, small(), Run())


def copy_without_template(tokenizer):  # type: ignore[no-untyped-def]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def test_subset_keeps_every_kind_and_contrast_can_be_left_out() -> None:
    many = rows("a", 20) + rows("b", 20) + rows(None, 40) + rows(None, 20, kind="contrast")
    subset = training_rows(many, small(max_train_rows=20), 0)
    kinds = [(r.extra["refusal_category"], r.extra["kind"]) for r in subset]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        ("a", "ordinary"): 4, ("b", "ordinary"): 4, (None, "ordinary"): 8, (None, "contrast"): 4,
    }  # fmt: skip
    assert training_rows(many, small(max_train_rows=20), 0) == subset
    assert not [r for r in training_rows(many, small(contrast=False), 0) if r.extra["kind"] == "contrast"]


def test_off_effect_by_hand() -> None:
    rule = gate(("a", "b"))
    p = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    read = ReadOut(p, p.argmax(axis=1))
    of_a, of_b = np.array([True, True, False, False]), np.array([False, False, True, False])
    assert off_effect(read, rule, 0, {0: of_a, 1: of_b}) == (1.0, 0.0)
    assert off_effect(read, rule, 1, {0: of_a, 1: of_b}) == (1.0, 0.0)


def test_hand_set_thresholds_name_known_categories(tiny) -> None:
    with pytest.raises(ConfigError, match="no refusal category 'c'"):
        fit(tiny, Data({"train": rows("a", 4) + rows(None, 4)}), small(thresholds={"c": 0.5}), Run())


def test_an_answer_opens_with_the_respond_token() -> None:
    assert gate(NAMES).reply_prefix_ids() == [5]
    assert isinstance(gate(NAMES), PrefixesReply)


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
