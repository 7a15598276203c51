"""Small tokenizers of every build met in practice, and templates in the style of well-known chat models."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from temper.systems.tiny import CORPUS

GPT_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = [*CORPUS.splitlines(), "[INST] [/INST] user model assistant system\nuser\n\nassistant\n\n"]


class Style(NamedTuple):
    """A template with the tokens it steers by."""

    tokens: dict[str, str]
    """bos, eos: the tokenizer's named tokens."""
    special: tuple[AddedToken | str, ...]
    template: str
    build: str


def _special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_DEFAULT = (
    """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif -%}
"""
    + CHATML
)
LLAMA3 = """{{ bos_token }}{% for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA31 = """{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nKnowledge: 2023\n\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{{- '<|eot_id|>' }}{% for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
QWEN3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
THINKER = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- else %}{{ '<|reply|>' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|reply|><think>\n' }}{% endif %}"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = (AddedToken("<think>", special=False), AddedToken("</think>", special=False))
PHI_TOKENS = tuple(_special(f"<|{n}|>", rstrip=True) for n in ("user", "assistant", "system", "end"))

STYLES: dict[str, Style] = {
    "chatml": Style({"bos": "<|im_start|>", "eos": "<|im_end|>"}, IM, CHATML, "gpt2"),
    "chatml-default": Style({"bos": "<|im_start|>", "eos": "<|im_end|>"}, IM, CHATML_DEFAULT, "gpt2"),
    "llama3": Style({"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, HEADERS, LLAMA3, "split"),
    "llama31": Style({"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, HEADERS, LLAMA31, "split"),
    "qwen3": Style({"eos": "<|im_end|>"}, (*IM, *THINK), QWEN3, "nfc"),
    "gemma": Style({"bos": "<bos>", "eos": "<eos>"}, ("<start_of_turn>", "<end_of_turn>"), GEMMA, "spaces"),
    "mistral": Style({"bos": "<s>", "eos": "</s>"}, (), MISTRAL, "first"),
    "mistral-always": Style({"bos": "<s>", "eos": "</s>"}, (), MISTRAL, "always"),
    "mistral-legacy": Style({"bos": "<s>", "eos": "</s>"}, (), MISTRAL, "prepend"),
    "phi3": Style({"bos": "<s>", "eos": "</s>"}, PHI_TOKENS, PHI3, "first"),
    "zephyr": Style({"bos": "<s>", "eos": "</s>"}, (), ZEPHYR, "prepend"),
    "unigram": Style({"bos": "<s>", "eos": "</s>"}, (), ZEPHYR, "unigram"),
    "thinker": Style({"bos": "<s>", "eos": "</s>"}, ("<|user|>", "<|reply|>", *THINK), THINKER, "gpt2"),
}


def style_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer in the style `name`, with its template."""
    style = STYLES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_built(style.build, tuple(style.tokens.values()))),
        **{f"{kind}_token": text for kind, text in style.tokens.items()},
    )
    for token in style.special:
        added = _special(token) if isinstance(token, str) else token
        tokenizer.add_tokens([added], special_tokens=added.special)
    tokenizer.chat_template = style.template
    return tokenizer


@cache
def _built(build: str, special: tuple[str, ...]) -> str:
    return {"gpt2": _byte_level, "split": _byte_level, "nfc": _byte_level}.get(build, _sentencepiece)(
        build, special
    ).to_str()


def _byte_level(build: str, special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=build == "split"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=build == "gpt2")
    split = pre_tokenizers.Split(Regex(GPT_SPLIT), "isolated")
    tokenizer.pre_tokenizer = level if build == "gpt2" else pre_tokenizers.Sequence([split, level])
    if build == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def _sentencepiece(build: str, special: tuple[str, ...]) -> Tokenizer:
    control = ["<unk>", *special]
    if build == "unigram":
        pieces = [*((token, 0.0) for token in control), *((f"<0x{b:02X}>", -20.0) for b in range(256))]
        pieces += [(c, -8.0) for c in sorted(set("▁" + "".join(WORDS).replace(" ", "▁").replace("\n", "")))]
        pieces += [(f"▁{w}", -6.0) for w in ("the", "hello", "user", "Sure", "is")]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    if build == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif build == "spaces":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        scheme = "always" if build == "always" else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", prepend_scheme=scheme, split=build == "unigram"
        )
    if build != "unigram":
        _train_by_word(tokenizer, [*control, *fallback])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if build != "spaces":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([_special(token) for token in control])
    return tokenizer


def _train_by_word(tokenizer: Tokenizer, special: list[str]) -> None:
    """Train with words cut at spaces, as SentencePiece does, then hand the merges over."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    trained.train_from_iterator([line.replace("\n", " ") for line in WORDS], trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
