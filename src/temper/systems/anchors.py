"""What "layer", "attention" or "head" means per architecture: one table of module paths."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from temper.core.errors import NeedsError

__all__ = [
    "ANCHORS",
    "Anchors",
    "anchors_of",
    "attention",
    "attention_out",
    "embeddings",
    "final_norm",
    "head",
    "input_norm",
    "is_conv1d",
    "layers",
    "mlp",
    "post_norm",
    "unwrap",
]


class Anchors(NamedTuple):
    """Module paths: the first four from the model, the others from a layer.

    `input_norm` feeds the attention, `post_norm` the MLP; architectures that run both side by side
    from one norm name it twice.
    """

    layers: str
    embeddings: str
    final_norm: str
    head: str
    attention: str
    attention_out: str
    mlp: str
    input_norm: str
    post_norm: str


_LLAMA = Anchors(
    layers="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    attention_out="self_attn.o_proj",
    mlp="mlp",
    input_norm="input_layernorm",
    post_norm="post_attention_layernorm",
)
_GEMMA2 = _LLAMA._replace(post_norm="pre_feedforward_layernorm")
_PHI = _LLAMA._replace(
    final_norm="model.final_layernorm", attention_out="self_attn.dense", post_norm="input_layernorm"
)
_GPT2 = Anchors(
    layers="transformer.h",
    embeddings="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    attention="attn",
    attention_out="attn.c_proj",
    mlp="mlp",
    input_norm="ln_1",
    post_norm="ln_2",
)
_NEOX = Anchors(
    layers="gpt_neox.layers",
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    attention="attention",
    attention_out="attention.dense",
    mlp="mlp",
    input_norm="input_layernorm",
    post_norm="post_attention_layernorm",
)

ANCHORS: dict[str, tuple[Anchors, str]] = {
    "llama": (_LLAMA, "LlamaDecoderLayer"),
    "mistral": (_LLAMA, "MistralDecoderLayer"),
    "qwen2": (_LLAMA, "Qwen2DecoderLayer"),
    "qwen3": (_LLAMA, "Qwen3DecoderLayer"),
    "gemma": (_LLAMA, "GemmaDecoderLayer"),
    "gemma2": (_GEMMA2, "Gemma2DecoderLayer"),
    "gemma3_text": (_GEMMA2, "Gemma3DecoderLayer"),
    "phi": (_PHI, "PhiDecoderLayer"),
    "phi3": (_LLAMA, "Phi3DecoderLayer"),
    "gpt2": (_GPT2, "GPT2Block"),
    "gpt_neox": (_NEOX, "GPTNeoXLayer"),
}
"""A config's `model_type` -> its module paths and the class of its layers."""

_BY_LAYER = {layer_class: paths for paths, layer_class in ANCHORS.values()}


def anchors_of(model: nn.Module) -> Anchors:
    """The module paths of a model's architecture; raises NeedsError for one that is not in the table."""
    model_type = unwrap(model).config.model_type
    if model_type not in ANCHORS:
        raise _unknown(str(model_type))
    return ANCHORS[model_type][0]


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    peft = sys.modules.get("peft")  # not imported: then nothing can be wrapped
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model.get_base_model()
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, first to last."""
    return list(_from_model(model, "layers").children())


def embeddings(model: nn.Module) -> nn.Module:
    """The token embedding."""
    return _from_model(model, "embeddings")


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head."""
    return _from_model(model, "final_norm")


def head(model: nn.Module) -> nn.Module:
    """The projection to the vocabulary; its weight may be the embedding's."""
    return _from_model(model, "head")


def attention(layer: nn.Module) -> nn.Module:
    """A layer's self-attention, including its output projection."""
    return _from_layer(layer, "attention")


def attention_out(layer: nn.Module) -> nn.Module:
    """The projection from the concatenated heads back to the residual stream."""
    return _from_layer(layer, "attention_out")


def mlp(layer: nn.Module) -> nn.Module:
    """A layer's feed-forward block."""
    return _from_layer(layer, "mlp")


def input_norm(layer: nn.Module) -> nn.Module:
    """The norm in front of the attention."""
    return _from_layer(layer, "input_norm")


def post_norm(layer: nn.Module) -> nn.Module:
    """The norm in front of the MLP."""
    return _from_layer(layer, "post_norm")


def _from_model(model: nn.Module, anchor: str) -> nn.Module:
    return unwrap(model).get_submodule(getattr(anchors_of(model), anchor))


def _from_layer(layer: nn.Module, anchor: str) -> nn.Module:
    paths = _BY_LAYER.get(type(layer).__name__)
    if paths is None:
        raise _unknown(type(layer).__name__)
    return layer.get_submodule(getattr(paths, anchor))


def _unknown(name: str) -> NeedsError:
    return NeedsError(
        f"Module names of the architecture {name!r} are not known",
        where="systems/anchors.py",
        cure=f"Known: {', '.join(ANCHORS)}. Add a line to the table.",
    )
