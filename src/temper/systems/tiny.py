"""Tiny random models, one per architecture, with a tokenizer built on the spot: for tests, never for results."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from temper.core.errors import ConfigError, nearest

__all__ = [
    "ARCHITECTURES",
    "CHATML",
    "ENCODERS",
    "LARGER",
    "build_tiny",
    "build_tiny_encoder",
    "build_tokenizer",
]

VOCAB = 512
WIDTH = 32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = """
The system answers the user. The user asks the assistant a question and the assistant gives an answer.
What is the capital of the island? Where does the river begin? Who wrote the letter? How many apples are left?
I cannot help with that request. I am sorry, but I do not know the answer. Sure, here is how the garden grows.
Please write a short story about a lighthouse, a fox and a small boat. Tell me about the weather in the valley.
Yes. No. Maybe. Sorry, I can't. I can't answer that. Of course! Here are three steps: first, second, third.
Question: what is one and one? Answer: two. 0 1 2 3 4 5 6 7 8 9 10 20 100 1990 2024.
The old mill stood beside the stream, and the children went there in the summer to read and to play.
She said that it was true; he thought it was false. They were not sure which of the two had been right.
Explain the following text in your own words, then list what it leaves out and say why it matters.
"""
"""Sentences of our own that the byte-level BPE is trained on."""

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {**_SHARED, "intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA = {**_GATED, "head_dim": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 8}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", {**_GEMMA, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": None}),
    "phi": ("PhiConfig", {**_SHARED, "intermediate_size": 64, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", _GATED),
    "neox": ("GPTNeoXConfig", {**_SHARED, "intermediate_size": 64}),
}
"""Name -> config class of transformers and its settings; two layers, width 32."""
LARGER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-4x128": (
        "LlamaConfig",
        {**ARCHITECTURES["llama"][1], "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256},
    ),
}
"""The same with more room, for what is learnt from scratch: layers x width in the name."""

_READER = {**_SHARED, "intermediate_size": 64}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _READER),
    "mpnet": ("MPNetConfig", _READER),
    "roberta": ("RobertaConfig", {**_READER, "max_position_embeddings": 516, "type_vocab_size": 1}),
}
"""The same for encoders."""


def build_tiny(architecture: str, seed: int = 0) -> tuple[Any, Any]:
    """A fresh random model in float32, ready to evaluate, and its tokenizer; the same for the same seed.

    Raises ConfigError for an unknown architecture.
    """
    known = ARCHITECTURES | LARGER
    if architecture not in known:
        raise ConfigError(f"There is no tiny model {architecture!r}", cure=nearest(architecture, known))
    import transformers

    class_name, settings = known[architecture]
    config = getattr(transformers, class_name)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval(), build_tokenizer()


def build_tiny_encoder(architecture: str, seed: int = 0) -> tuple[Any, Any]:
    """A fresh random encoder in float32 and its tokenizer, which puts a token before and one behind every text.

    Raises ConfigError for an unknown architecture.
    """
    if architecture not in ENCODERS:
        raise ConfigError(f"There is no tiny encoder {architecture!r}", cure=nearest(architecture, ENCODERS))
    import transformers

    class_name, settings = ENCODERS[architecture]
    config = getattr(transformers, class_name)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
    tokenizer = build_tokenizer()
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    template = f"{ends[0][0]} $A {ends[1][0]}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    return model.eval(), tokenizer


def build_tokenizer() -> Any:
    """A fresh byte-level BPE tokenizer of 512 tokens with a ChatML template; any text decodes back."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer.to_str()
