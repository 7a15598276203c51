"""Anchors point at what they say, on every tiny architecture, bare and under PEFT."""

from __future__ import annotations

import pytest
import torch

from temper.core.errors import NeedsError
from temper.systems import anchors
from temper.systems.tiny import ARCHITECTURES, WIDTH, build_tiny

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return build_tiny(request.param)[0]


def seen(module, model, side="output"):
    """What goes into or comes out of a module during one forward pass."""
    kept = []

    def hook(_, inputs, output):
        value = output if side == "output" else inputs
        kept.append(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_hook(hook, with_kwargs=False)
    with torch.no_grad():
        out = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    handle.remove()
    return kept[0], out


def test_model_anchors(model):
    layers = anchors.layers(model)
    assert len(layers) == model.config.num_hidden_layers == 2
    assert anchors.embeddings(model) is model.get_input_embeddings()
    assert anchors.head(model) is model.get_output_embeddings()
    normed, out = seen(anchors.final_norm(model), model)
    assert torch.equal(normed, out.hidden_states[-1])
    first, out = seen(layers[0], model)
    assert torch.equal(first, out.hidden_states[1])


def test_layer_anchors(model):
    for layer in anchors.layers(model):
        mixed, _ = seen(anchors.attention(layer), model)
        projected, _ = seen(anchors.attention_out(layer), model)
        assert torch.equal(mixed, projected)
        assert projected.shape == (1, 4, WIDTH)
        fed, _ = seen(anchors.mlp(layer), model, "input")
        normed, _ = seen(anchors.post_norm(layer), model)
        assert torch.equal(fed, normed)
        assert seen(anchors.mlp(layer), model)[0].shape == (1, 4, WIDTH)


def test_input_norm_reads_the_residual_stream(model):
    first = anchors.layers(model)[1]
    entered, out = seen(anchors.input_norm(first), model, "input")
    assert torch.equal(entered, out.hidden_states[1])


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers for it
def test_the_same_modules_under_peft(model):
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if model.config.model_type == "gpt2" else None
    targets = targets or (
        ["query_key_value"] if model.config.model_type == "gpt_neox" else ["o_proj", "dense"]
    )
    fan_in = model.config.model_type == "gpt2"
    before = anchors.layers(model), anchors.embeddings(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, fan_in_fan_out=fan_in))
    assert anchors.layers(wrapped) == before[0]
    assert anchors.embeddings(wrapped) is before[1]
    assert anchors.anchors_of(wrapped) == anchors.anchors_of(model)
    assert anchors.attention(anchors.layers(wrapped)[0]) is anchors.attention(before[0][0])


def test_unknown_architecture_lists_the_known_ones():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        word_embed_proj_dim=8,
    )
    other = OPTForCausalLM(config)
    with pytest.raises(NeedsError, match=r"'opt'.*llama.*gpt_neox"):
        anchors.layers(other)
    with pytest.raises(NeedsError, match="Linear"):
        anchors.mlp(torch.nn.Linear(2, 2))
