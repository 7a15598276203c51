"""A causal language model with its tokenizer, its chat template and what is applied to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from temper.core.types import Message
from temper.systems.base import Rewrite, StepRule
from temper.systems.chat import Chat
from temper.systems.local import CPU, LocalSystem, tried

__all__ = ["CausalLM"]


@dataclass(frozen=True, eq=False)
class CausalLM(LocalSystem):
    """Any Hugging Face causal language model as a system. Change it with `with_`, never in place."""

    model: Any
    tokenizer: Any
    chat: Chat
    device: torch.device = CPU
    step_rules: tuple[StepRule, ...] = ()
    """Applied to the next-token logits in order."""
    rewrites: tuple[Rewrite, ...] = ()
    """Applied to the messages in order, before the template."""
    spec: str = ""
    given_fingerprint: str = ""
    kind: ClassVar[str] = "CausalLM"
    products_kept: ClassVar[int] = 128
    """A micro-batch adds 23 to 36 to SmolLM2's."""

    def try_capabilities(self) -> dict[str, bool]:
        """A forward pass over three tokens for each."""
        ids_BT = torch.tensor([[0, 1, 2]], device=self.device)
        works = {
            "logprobs": tried(lambda: _probe_logits(self.model, ids_BT)),
            "hidden": tried(lambda: _probe_hidden(self.model, ids_BT)),
            "attention": tried(lambda: _probe_attention(self.model, ids_BT)),
            "grads": tried(lambda: _probe_grads(self.model, ids_BT)),
        }
        return works | {"generate": works["logprobs"]}

    def rewritten(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """`messages` after every rewrite."""
        out = tuple(messages)
        for rewrite in self.rewrites:
            out = tuple(rewrite(out))
        return out

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding; may exceed the tokenizer's size."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the config allows, or None when it names no limit."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def pad_id(self) -> int:
        """An id to fill batches with. It may be the end-of-turn token: masks come from lengths."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: the template's end of turn, the tokenizer's and the model's own."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return self.chat.stop_ids | {int(i) for i in listed if i is not None}

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        return f"{type(self.model).__name__} failed when {capability!r} was tried; choose another base model."


@torch.no_grad()
def _probe_logits(model: Any, ids_BT: Tensor) -> bool:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV.shape[:2] == ids_BT.shape and bool(torch.isfinite(logits_BTV).all())


@torch.no_grad()
def _probe_hidden(model: Any, ids_BT: Tensor) -> bool:
    hidden = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    return hidden is not None and len(hidden) > 1


@torch.no_grad()
def _probe_attention(model: Any, ids_BT: Tensor) -> bool:
    """Weights can be read, and hiding the first token by an additive mask changes the last logits."""
    num_tokens = ids_BT.shape[1]
    mask_TT = torch.full((num_tokens, num_tokens), torch.finfo(model.dtype).min, dtype=model.dtype)
    mask_BHTT = mask_TT.triu(1)[None, None].to(ids_BT.device)
    hidden_first = mask_BHTT.clone()
    hidden_first[..., 1:, 0] = torch.finfo(model.dtype).min
    with _eager_attention(model):
        out = model(input_ids=ids_BT, use_cache=False, output_attentions=True)
        open_V = model(input_ids=ids_BT, attention_mask=mask_BHTT, use_cache=False).logits[0, -1]
        shut_V = model(input_ids=ids_BT, attention_mask=hidden_first, use_cache=False).logits[0, -1]
    return bool(out.attentions) and out.attentions[0] is not None and not torch.equal(open_V, shut_V)


def _probe_grads(model: Any, ids_BT: Tensor) -> bool:
    """A gradient reaches the input embeddings; no parameter's `.grad` is touched."""
    with torch.enable_grad():
        embeds_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        logits_BTV = model(inputs_embeds=embeds_BTD, use_cache=False).logits
        (grad_BTD,) = torch.autograd.grad(logits_BTV[0, -1].float().logsumexp(0), embeds_BTD)
    return bool(torch.isfinite(grad_BTD).all()) and bool(grad_BTD.any())


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
