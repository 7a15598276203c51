"""A tokenizer of whole words, for models that know a small world and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["SPECIAL_WORDS", "build_word_tokenizer"]

SPECIAL_WORDS = ("<pad>", "<sos>", "<null>", "<eos>", "<img>", "<unk>")
"""Ids 0 to 5. The end of a text is not id 2: transformers' CLIP takes that id for an old config and pools elsewhere."""


def build_word_tokenizer(words: Sequence[str], max_tokens: int) -> Any:
    """A fast tokenizer whose ids are SPECIAL_WORDS, then `words`; lower-cased, punctuation apart, `<sos>` and `<eos>` around.

    A word that is not among them becomes `<unk>`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate([*SPECIAL_WORDS, *words])}
    backend: Any = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, ids[word]) for word in ("<sos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<sos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<sos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_tokens,
    )
