"""A causal language model with its tokenizer, its chat template and what is applied to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from temper.core.types import Message
from temper.systems.base import Rewrite, StepRule, System
from temper.systems.chat import Chat
from temper.systems.fingerprint import fingerprint_model

__all__ = ["CausalLM"]

CPU = torch.device("cpu")

_probed: WeakKeyDictionary[nn.Module, dict[str, bool | None]] = WeakKeyDictionary()

PROBE_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    IndexError,
    KeyError,
)
"""What an architecture raises for something it cannot do."""


@dataclass(frozen=True, eq=False)
class CausalLM(System):
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
    """Set by what is applied to the model, see `with_`; "" for a bare model, whose content is hashed."""
    kind: ClassVar[str] = "CausalLM"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))

    def with_(self, **changes: Any) -> CausalLM:
        """The same system with some fields changed; the model is shared, not copied.

        `fingerprint` is for artefacts, which chain theirs to the base's.
        """
        if "fingerprint" in changes:
            changes["given_fingerprint"] = changes.pop("fingerprint")
        return dataclasses.replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """Hash of the model's config and all its weights; see `fingerprint_model`. Chained where artefacts apply.

        The template has its own hash, `chat.sha256`.
        """
        return self.given_fingerprint or fingerprint_model(self.model)

    def probe(self) -> Mapping[str, bool | None]:
        """Each capability tried once per model with a forward pass over three tokens.

        Capabilities of other kinds of system (embed, classify, see, draw) are False.
        """
        if self.model not in _probed:
            _probed[self.model] = _probe(self.model, self.device)
        return dict(_probed[self.model])

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


def _probe(model: nn.Module, device: torch.device) -> dict[str, bool | None]:
    ids_BT = torch.tensor([[0, 1, 2]], device=device)
    was_training = model.training
    model.eval()
    try:
        works: dict[str, bool | None] = {
            "logprobs": _tried(lambda: _probe_logits(model, ids_BT)),
            "hidden": _tried(lambda: _probe_hidden(model, ids_BT)),
            "attention": _tried(lambda: _probe_attention(model, ids_BT)),
            "grads": _tried(lambda: _probe_grads(model, ids_BT)),
        }
    finally:
        model.train(was_training)
    works["generate"] = works["logprobs"]
    return works | dict.fromkeys(("embed", "classify", "see", "draw"), False)


def _tried(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except PROBE_ERRORS:
        return False


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
