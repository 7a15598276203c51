"""Causal LMs as systems: probed capabilities, fingerprints that notice every change, tiny models."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, NeedsError
from temper.core.types import Message
from temper.systems.base import Reply, Sampling, StepRule
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.fingerprint import fingerprint_model
from temper.systems.tiny import ARCHITECTURES, LARGER, VOCAB, WIDTH, build_tiny, build_tokenizer

ALL = {"generate", "logprobs", "hidden", "attention", "grads"}


def tiny(architecture="llama"):
    model, tokenizer = build_tiny(architecture)
    return CausalLM(model, tokenizer, Chat(tokenizer), spec=f"tiny:{architecture}")


@pytest.fixture(scope="module")
def shared():
    return tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probing_finds_everything_and_changes_nothing(architecture):
    system = tiny(architecture)
    system.model.train()
    before = fingerprint_model(system.model, fresh=True)
    kind = system.model.config._attn_implementation
    assert system.capabilities == ALL
    assert system.probe()["embed"] is False
    assert fingerprint_model(system.model, fresh=True) == before
    assert system.model.config._attn_implementation == kind
    assert system.model.training
    assert all(p.grad is None and p.requires_grad for p in system.model.parameters())


def test_probing_works_where_gradients_are_off():
    system = tiny()
    system.model.requires_grad_(False)
    with torch.no_grad():
        assert system.capabilities == ALL


def test_probing_sees_what_is_broken():
    system = tiny()

    def refuse(*_, **arguments):
        if arguments.get("inputs_embeds") is not None or arguments.get("output_hidden_states"):
            raise NotImplementedError
        return whole(*_, **arguments)

    whole, system.model.forward = system.model.forward, refuse
    assert system.capabilities == ALL - {"grads", "hidden"}
    with pytest.raises(NeedsError, match=r"tiny:llama lacks 'grads'.*it offers attention, generate"):
        system.require("logprobs", "grads")
    with pytest.raises(ConfigError, match="Did you mean logprobs"):
        system.require("logprob")


def test_non_finite_logits_are_no_logprobs():
    system = tiny()
    with torch.no_grad():
        system.model.lm_head.weight[3, 3] = float("nan")
    assert not {"logprobs", "generate"} & system.capabilities


def test_fingerprint_is_the_same_for_the_same_weights():
    one, two = tiny(), tiny()
    assert one.fingerprint == two.fingerprint
    assert one.with_(spec="other", rewrites=(lambda m: m,)).fingerprint == one.fingerprint
    assert len({tiny(a).fingerprint for a in ARCHITECTURES}) == len(ARCHITECTURES)
    assert CausalLM(*build_tiny("llama", 1), one.chat).fingerprint != one.fingerprint


def test_fingerprint_notices_any_tensor():
    system = tiny("gpt2")
    seen = {system.fingerprint}
    for parameter in system.model.parameters():
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 2] += 1e-3
        seen.add(system.fingerprint)
    assert len(seen) == 1 + len(list(system.model.parameters()))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_fingerprint_notices_one_element_anywhere(data, shared):
    names = sorted(shared.model.state_dict())
    tensor = shared.model.state_dict()[data.draw(st.sampled_from(names))].view(-1)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    before, value = shared.fingerprint, tensor[place].clone()
    tensor[place] += 0.5
    assert shared.fingerprint != before
    tensor[place] = value
    assert shared.fingerprint == before


def test_fingerprint_notices_dtype_names_config_and_data_writes():
    system = tiny("qwen2")
    first = system.fingerprint
    assert tiny("qwen2").with_(model=tiny("qwen2").model.to(torch.bfloat16)).fingerprint != first
    system.model.config.rope_theta_for_test = 2.0
    system.model.lm_head.weight.data[7, 7] += 1.0
    assert fingerprint_model(system.model, fresh=True) != first
    replaced = tiny("qwen2")
    replaced.model.lm_head.weight = torch.nn.Parameter(replaced.model.lm_head.weight.detach() * 2)
    assert replaced.fingerprint != first


def test_fingerprint_is_remembered():
    system = tiny("llama")
    assert system.fingerprint == fingerprint_model(system.model, fresh=True)
    start = time.perf_counter()
    for _ in range(20):
        _ = system.fingerprint
    assert time.perf_counter() - start < 1.0


def test_with_shares_the_model_and_leaves_the_old_alone():
    system = tiny()
    changed = system.with_(rewrites=(lambda m: (Message("system", "s"), *m), lambda m: m[:1]))
    assert changed.model is system.model
    assert system.rewrites == ()
    assert changed.rewritten([Message("user", "u")]) == (Message("system", "s"),)
    with pytest.raises(AttributeError):
        system.spec = "x"  # type: ignore[misc]


def test_small_facts():
    system = tiny()
    assert system.kind == "CausalLM"
    assert system.device == torch.device("cpu")
    assert system.dtype == torch.float32
    assert system.num_embeddings == VOCAB
    assert system.max_tokens == 512
    assert system.pad_id == 3
    assert system.stop_ids == {2}
    assert tiny("gpt2").max_tokens == 512
    assert tiny("gemma3").max_tokens == 512


@pytest.mark.parametrize("name", LARGER)
def test_a_larger_tiny_model_has_the_size_that_its_name_says(name):
    config = build_tiny(name)[0].config
    assert name.endswith(f"-{config.num_hidden_layers}x{config.hidden_size}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_are_fresh_small_seeded_and_quick(architecture):
    build_tiny(architecture)  # the first one imports transformers' module
    start = time.process_time()
    model, tokenizer = build_tiny(architecture)
    assert time.process_time() - start < 0.5
    again, _ = build_tiny(architecture)
    assert model is not again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(tokenizer) == VOCAB == model.get_input_embeddings().weight.shape[0]
    assert model.get_input_embeddings().weight.shape[1] == WIDTH
    assert not model.training
    other, _ = build_tiny(architecture, seed=1)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    build_tiny("llama")
    assert torch.equal(torch.rand(3), wanted)


def test_unknown_tiny_model():
    with pytest.raises(ConfigError, match="Did you mean llama"):
        build_tiny("lama")


@given(text=st.text(st.characters(codec="utf-8"), max_size=50))
def test_the_tiny_tokenizer_gives_any_text_back(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"stop": ("",)},
        {"stop": "x"},
    ],
)
def test_sampling_refuses_nonsense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_base_types():
    assert Sampling() == Sampling(max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, seed=0, stop=())
    assert Reply._fields == ("text", "ids", "finish", "num_prompt_tokens", "info")

    class Rule:
        name = "rule"

        def start(self, prompt_ids):
            return {}

        def __call__(self, logits, position, states):
            return logits

    assert isinstance(Rule(), StepRule)
    assert not isinstance(object(), StepRule)
