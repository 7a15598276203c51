"""Steered attention is the equation: by hand, in batches, step by step, under templates and other artefacts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.artefacts import Prompt, Steer, load_artefact
from temper.core.errors import ConfigError
from temper.core.types import Message, Run
from temper.methods.adaptation.context_awareness import method
from temper.methods.adaptation.context_awareness.card import Config
from temper.methods.adaptation.context_awareness.conftest import NONE, TALKS, load, logits, weights
from temper.methods.adaptation.context_awareness.steering import steered, steering_bias, user_mask
from temper.ops.batching import Example, collate
from temper.ops.generate import Sampling, generate
from temper.systems.causal_lm import CausalLM


def reweighted(att_HTK: torch.Tensor, factor_K: torch.Tensor) -> torch.Tensor:
    """Att * factor / Z, the equation as it stands in the card."""
    changed = att_HTK * factor_K
    return changed / changed.sum(-1, keepdim=True)


def test_bias_by_hand() -> None:
    user_T = torch.tensor([False, True, True, False])
    log = math.log(0.5)
    assert steering_bias(user_T, 6, 0.5, False).tolist() == pytest.approx([log, 0, 0, log, 0, 0])
    assert steering_bias(user_T, 2, 0.5, False).tolist() == pytest.approx([log, 0])


def test_departure_2_generated_keys_are_weighed_only_if_asked(tiny: CausalLM) -> None:
    log = math.log(0.5)
    assert steering_bias(torch.tensor([False, True]), 4, 0.5, True).tolist() == pytest.approx(
        [log, 0, log, log]
    )
    talk = [*TALKS[0], Message("assistant", "By the old mill, they say.")]
    rendered = tiny.chat.dialogue(talk)
    start = rendered.spans[-1].start
    plain = weights(tiny, rendered.ids)
    for generated in (False, True):
        factor_K = torch.where(user_mask(rendered.spans, len(rendered.ids)), 1.0, 0.3)
        factor_K[start:] = 0.3 if generated else 1.0
        with steered(tiny, 0.3, steer_generated=generated):
            found = weights(tiny, rendered.ids)
        assert torch.allclose(found, reweighted(plain, factor_K), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.05, 1), which=st.integers(0, 2))
def test_steered_attention_is_the_equation(alpha: float, which: int) -> None:
    tiny = load("tiny:llama")
    rendered = tiny.chat.prompt(TALKS[which])
    factor_K = torch.where(user_mask(rendered.spans, len(rendered.ids)), 1.0, alpha)
    want = reweighted(weights(tiny, rendered.ids), factor_K)
    with steered(tiny, alpha):
        found = weights(tiny, rendered.ids)
    assert torch.allclose(found, want, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(found.shape[:2]), atol=1e-5)


def test_departure_1_two_user_spans_make_one_mask(tiny: CausalLM) -> None:
    rendered = tiny.chat.prompt(TALKS[2])
    user_T = user_mask(rendered.spans, len(rendered.ids))
    first, second = (s for s in rendered.spans if s.role == "user")
    assert user_T[first.start : first.end].all()
    assert user_T[second.start : second.end].all()
    assert not user_T[first.end : second.start].any(), "template and the assistant's turn between them"
    union = steering_bias(user_T, len(rendered.ids), 0.5, False)
    released = sum(
        steering_bias(user_mask([span], len(rendered.ids)), len(union), 0.5, False)
        for span in (first, second)
    )
    assert union[first.start] == union[second.start] == 0
    assert released[first.start] == released[second.start] == pytest.approx(math.log(0.5)), "what it would do"  # type: ignore[index]
    assert released[0] == pytest.approx(2 * math.log(0.5))  # type: ignore[index]


def test_alpha_one_is_the_base_bit_for_bit_and_nearly_one_is_near(system: CausalLM) -> None:
    ids = system.chat.prompt(TALKS[0]).ids
    plain = logits(system, ids)
    with steered(system, 1.0):
        assert torch.equal(logits(system, ids), plain)
    with steered(system, 1 - 1e-6):
        assert torch.allclose(logits(system, ids), plain, atol=1e-4)
    with steered(system, 0.2):
        assert (logits(system, ids) - plain).abs().max() > 1e-4
    assert torch.equal(logits(system, ids), plain)


@pytest.mark.parametrize("generated", [False, True])
def test_generation_steers_every_step_and_every_row_alike(system: CausalLM, generated: bool) -> None:
    sampling = Sampling(max_new_tokens=8)
    with steered(system, 0.2, steer_generated=generated):
        together = generate(system, TALKS, sampling, Run())
        alone = [generate(system, [talk], sampling, Run(exact=True))[0] for talk in TALKS]
        assert [r.ids for r in together] == [r.ids for r in alone]
        for talk, reply in zip(TALKS, together, strict=True):
            ids = list(system.chat.prompt(talk).ids)
            for token in reply.ids:  # a fresh pass over all tokens must choose what the cached step chose
                assert int(logits(system, ids)[-1].argmax()) == token
                ids.append(token)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_nothing(system: CausalLM, side: str) -> None:
    rows = [system.chat.prompt(talk).ids for talk in TALKS]
    batch = collate([Example(ids, [False] * len(ids)) for ids in rows], system.pad_id, side=side)  # type: ignore[arg-type]
    positions_BT = (batch.mask_BT.cumsum(1) - 1).clamp_min(0)
    with steered(system, 0.3), torch.no_grad():
        alone = [logits(system, ids) for ids in rows]
        out = system.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
        ).logits
    for b, want in enumerate(alone):
        assert torch.allclose(out[b][batch.mask_BT[b]], want, atol=1e-4)


def test_layers_and_heads_can_be_chosen(tiny: CausalLM) -> None:
    ids = tiny.chat.prompt(TALKS[0]).ids
    plain = weights(tiny, ids)
    with steered(tiny, 0.3, heads=[1]):
        found = weights(tiny, ids)
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    assert not torch.allclose(found[1], plain[1])
    with steered(tiny, 0.3, layers=[1]):
        assert torch.equal(weights(tiny, ids), plain)


def test_strength_is_a_power_of_alpha(tiny: CausalLM, tmp_path) -> None:
    artefact = method.fit(tiny, NONE, Config(alpha=0.6), Run())
    assert isinstance(artefact, Steer)
    ids = tiny.chat.prompt(TALKS[1]).ids
    plain = logits(tiny, ids)
    loaded = load_artefact(artefact.save(tmp_path / "steer"))
    for strength in (0.0, 0.5, 1.0, 2.0):
        with steered(tiny, 0.6**strength):
            want = logits(tiny, ids)
        with loaded.apply(tiny, strength) as changed:
            assert torch.equal(logits(changed, ids), want)
    with artefact.apply(tiny, 0.0) as changed:
        assert torch.equal(logits(changed, ids), plain)
    with pytest.raises(ConfigError, match="alpha is 1.66"), artefact.apply(tiny, -1.0):
        pass
    assert torch.equal(logits(tiny, ids), plain)


def test_departure_6_repeated_and_trimmed_text_is_found_where_it_stands(tiny: CausalLM) -> None:
    trimming = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    )
    chat = tiny.chat.with_(template=trimming)
    rendered = chat.prompt(
        [Message("system", "Yes."), Message("user", "  Yes.  "), Message("assistant", "Yes.")],
        open_reply=False,
    )
    user_T = user_mask(rendered.spans, len(rendered.ids))
    assert tiny.tokenizer.decode([i for i, u in zip(rendered.ids, user_T, strict=True) if u]) == "Yes."
    assert rendered.spans[1].start <= int(user_T.int().argmax()) < rendered.spans[1].end


def test_ids_that_no_template_wrote_are_left_alone_with_a_warning(tiny: CausalLM, caplog) -> None:
    ids = tiny.chat.text_ids("A fox walked by the stream and never came back again.")
    plain = logits(tiny, ids)
    with steered(tiny, 0.3):
        assert torch.allclose(logits(tiny, ids), plain, atol=1e-5)
    assert "not steered" in caplog.text


def test_a_steered_system_keeps_its_steering_under_another_prompt_artefact(tiny: CausalLM) -> None:
    brief = Prompt("*", "made-up", system_prompt="Be brief.")
    with steered(tiny, 0.2), brief.apply(tiny) as changed:
        found = generate(changed, [TALKS[0]], Sampling(max_new_tokens=6), Run())
    with brief.apply(tiny) as changed, steered(changed, 0.2):
        want = generate(changed, [TALKS[0]], Sampling(max_new_tokens=6), Run())
    assert found[0].ids == want[0].ids


def test_sdpa_whose_mask_is_none_is_steered_as_eager_is() -> None:
    found = {}
    for kind in ("sdpa", "eager"):
        system = load("tiny:llama", attention=kind)
        ids = system.chat.prompt(TALKS[0]).ids
        with steered(system, 0.4):
            found[kind] = logits(system, ids)
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)
