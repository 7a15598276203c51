"""Token search: which ids a slot may hold, gradients by one-hot token choice, and the candidates drawn from them.

The slot's text within a prompt is `ops/search_prompt.py`, the candidates' losses are `ops/search_losses.py`.
Here N counts the slot's positions, K candidates, and C the choices kept for a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, ModelError, NumericsError
from temper.systems.causal_lm import CausalLM

__all__ = [
    "Positions",
    "allowed_mask",
    "combine_gradients",
    "distinct",
    "embedding_table",
    "first_order",
    "gradient_choices",
    "project_on_tokens",
    "propose",
    "random_choices",
    "require_same_vocabulary",
]

Positions = Literal["even", "uniform"]
"""Which positions candidates change: spread evenly over the slot, or drawn at random."""

TABLE_ROWS = 8192
"""Rows of the embedding that are cast to float32 at a time."""


def allowed_mask(system: CausalLM, *, ascii_only: bool = True) -> Tensor:
    """Ids a slot may hold, (V,), True where allowed; V counts the rows of the input embedding, on the CPU.

    Never allowed: rows beyond the tokenizer's size, every added token (special ones, chat markers, control tokens),
    bos, eos, pad and unk, ids without text, and ids whose text alone is unprintable (newlines) or no whole
    character. With `ascii_only` also ids whose text is not ASCII. Ids of spaces alone are allowed.
    """
    tokenizer = system.tokenizer
    size = min(len(tokenizer), system.num_embeddings)
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    allowed = torch.zeros(system.num_embeddings, dtype=torch.bool)
    allowed[:size] = torch.tensor([_is_writable(text, ascii_only) for text in texts])
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    barred = {*tokenizer.added_tokens_decoder, *system.chat.control_ids, *(i for i in named if i is not None)}
    allowed[[i for i in barred if i < len(allowed)]] = False
    if not allowed.any():
        raise ModelError("The tokenizer has no token that a slot may hold", cure="Allow non-ASCII tokens.")
    return allowed


def _is_writable(text: str, ascii_only: bool) -> bool:
    return bool(text) and text.isprintable() and "\ufffd" not in text and (text.isascii() or not ascii_only)


def require_same_vocabulary(systems: Sequence[CausalLM]) -> None:
    """Raise ConfigError unless all systems give every id the same token."""
    first = systems[0].tokenizer.get_vocab()
    for system in systems[1:]:
        if system.tokenizer.get_vocab() != first:
            raise ConfigError(
                "Systems with different vocabularies cannot share a token search",
                where=f"{systems[0].spec!r} and {system.spec!r}",
                cure="Search on each of them alone, or choose models with one tokenizer.",
            )


def embedding_table(model: nn.Module) -> Tensor:
    """What the embedding module puts out for each id, (V, D): its weight, with whatever scaling its forward applies."""
    module = model.get_input_embeddings()  # type: ignore[operator]
    hooked = module._forward_hooks or module._forward_pre_hooks
    if type(module) is nn.Embedding and module.max_norm is None and not hooked:
        return module.weight.detach()
    with torch.no_grad():
        return module(torch.arange(module.weight.shape[0], device=module.weight.device))


def project_on_tokens(grad_ND: Tensor, table_VD: Tensor) -> Tensor:
    """dL/dO = dL/de @ E^T, (N, V), float32, where the slot's embeddings are e = O @ E and O is one-hot.

    Taken in float32 whatever the model's dtype: half precision overflows here. Raises NumericsError for a gradient
    that is not finite.
    """
    grad_ND = grad_ND.float()
    if not bool(torch.isfinite(grad_ND).all()):
        raise NumericsError(
            "The gradient at the slot is not finite",
            where="token search",
            cure="Load the model in float32 or bfloat16.",
        )
    return torch.cat([grad_ND @ rows.float().T for rows in table_VD.split(TABLE_ROWS)], dim=1)


def combine_gradients(grads_by_model: Sequence[Sequence[Tensor]]) -> Tensor:
    """The gradients of several prompts on several models as one, (N, V) (Alg. 2).

    Prompts are summed within a model, each row is divided by its length so that no model outshouts another, and
    models are summed. Models whose embeddings differ in size share the ids that all have.
    """
    size = min(grad_NV.shape[1] for grads in grads_by_model for grad_NV in grads)
    total = None
    for grads in grads_by_model:
        grad_NV = torch.stack([grad[:, :size] for grad in grads]).sum(0)
        unit_NV = grad_NV / grad_NV.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        total = unit_NV if total is None else total + unit_NV.to(total.device)
    assert total is not None
    return total


def first_order(grad_NV: Tensor, ids_KN: Tensor, current_N: Sequence[int]) -> Tensor:
    """The change of loss that the gradient foresees for each candidate, (K,): sum_i G[i, new_i] - G[i, old_i]."""
    rows_N = torch.arange(len(current_N))
    here_N = grad_NV[rows_N, torch.tensor(list(current_N))]
    return (grad_NV[rows_N, ids_KN] - here_N).sum(-1).cpu()


def gradient_choices(grad_NV: Tensor, allowed_V: Tensor, num: int) -> Tensor:
    """The `num` allowed ids of most negative gradient at each position, (N, C), best first, on the CPU."""
    allowed_V = allowed_V[: grad_NV.shape[1]]
    num = min(num, int(allowed_V.sum()))
    barred = grad_NV.masked_fill(~allowed_V.to(grad_NV.device), torch.inf)
    return (-barred).topk(num, dim=-1).indices.cpu()


def random_choices(num_positions: int, allowed_V: Tensor) -> Tensor:
    """Every allowed id at each position, (N, C): the choices of a search without gradient."""
    return allowed_V.nonzero()[:, 0].expand(num_positions, -1)


def propose(
    current_N: Tensor,
    choices_NC: Tensor,
    num: int,
    generator: torch.Generator,
    *,
    positions: Positions = "even",
    num_replace: int = 1,
) -> Tensor:
    """`num` copies of the slot, each with `num_replace` ids drawn from its positions' choices, (K, N).

    even     candidate k changes position floor(k * N / num): positions have equal shares (`num_replace` is 1)
    uniform  each candidate draws its positions at random, none twice
    A drawn id may be the one that is there already.
    """
    num_positions = len(current_N)
    if positions == "even":
        at_KR = (torch.arange(num) * num_positions // num)[:, None]
    else:
        scores_KN = torch.rand(num, num_positions, generator=generator)
        at_KR = scores_KN.argsort(dim=1)[:, :num_replace]
    which_KR = torch.randint(choices_NC.shape[1], at_KR.shape, generator=generator)
    return current_N.repeat(num, 1).scatter(1, at_KR, choices_NC[at_KR, which_KR])


def distinct(candidates_KN: Tensor, seen: set[tuple[int, ...]]) -> Tensor:
    """The candidates not in `seen`, each once, in order; `seen` grows by them."""
    kept = []
    for row, ids in enumerate(map(tuple, candidates_KN.tolist())):
        if ids not in seen:
            seen.add(ids)
            kept.append(row)
    return candidates_KN[kept]
