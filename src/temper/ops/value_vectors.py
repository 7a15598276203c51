"""Value vectors: the columns of MLP down-projections, read, replaced, trained alone and projected to the vocabulary.

An MLP adds sum_j m_j v_j to the residual stream. v_j, column j of its down-projection, is a value vector, and its
product with the output embedding says which tokens it promotes.
Letters: F columns of one down-projection (the MLP's inner width), P places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ModelError, NeedsError
from temper.ops.projection import CHUNK_LOGITS, head_of
from temper.systems.anchors import is_conv1d, unwrap

__all__ = [
    "DOWN_PROJECTIONS",
    "DownProjection",
    "Place",
    "TopTokens",
    "down_projection",
    "num_layers",
    "output_embedding",
    "replaced",
    "top_tokens",
    "vectors_at",
    "with_vectors",
]

_LLAMA = ("model.layers", "mlp.down_proj")
DOWN_PROJECTIONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2"),
        _LLAMA,
    ),
    "phi": ("model.layers", "mlp.fc2"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "hf_olmo": ("model.transformer.blocks", "ff_out"),
}
"""A config's `model_type` -> the path of its layers and, from a layer, of the down-projection."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Under what names configs say how many experts a layer has."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Place(NamedTuple):
    """Where a value vector stands: its layer and its column, both counted from 0."""

    layer: int
    dim: int


class DownProjection(NamedTuple):
    """The down-projection of one layer."""

    name: str
    """Of its weight, as `named_parameters` has it."""
    module: nn.Module
    rows_are_vectors: bool
    """True for GPT-2, which keeps the matrix as (F, D)."""

    @property
    def weight(self) -> nn.Parameter:
        """The matrix as the model keeps it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def columns(self) -> Tensor:
        """The value vectors as columns, (D, F): a view without gradient."""
        weight = self.weight.data
        return weight.T if self.rows_are_vectors else weight


class TopTokens(NamedTuple):
    """The tokens that vectors promote most, (P, K), best first, and the mean of those K logits, (P,)."""

    ids_PK: Tensor
    strength_P: Tensor


def num_layers(model: nn.Module) -> int:
    """Layers that have a down-projection; raises NeedsError for an architecture that is not in the table."""
    return len(_layers(model))


def down_projection(model: nn.Module, layer: int) -> DownProjection:
    """The down-projection of a layer.

    Raises NeedsError for an unknown architecture, mixtures of experts and weights that are fused, quantised or wrapped
    by an adapter, ModelError for a layer that is not there.
    """
    layers = _layers(model)
    if not 0 <= layer < len(layers):
        raise ModelError(
            f"There is no layer {layer}",
            where=f"a model of {len(layers)} layers",
            cure=f"Layers are 0 to {len(layers) - 1}; was the vector found in another model?",
        )
    inner = unwrap(model)
    path, below = DOWN_PROJECTIONS[inner.config.model_type]
    full = f"{path}.{layer}.{below}"
    try:
        module = inner.get_submodule(full)
    except AttributeError:
        raise NeedsError(
            f"The model has no module {full!r}", where="value vectors", cure="Its MLP may be fused."
        ) from None
    _check_plain(module, full)
    name = next(n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight)
    return DownProjection(name, module, is_conv1d(module))


def _layers(model: nn.Module) -> list[nn.Module]:
    inner = unwrap(model)
    kind = str(inner.config.model_type)
    experts = next((n for n in EXPERTS if (getattr(inner.config, n, None) or 0) > 1), None)
    if experts:
        raise NeedsError(
            f"The model is a mixture of experts ({experts}={getattr(inner.config, experts)})",
            where="value vectors",
            cure="Each expert has a down-projection of its own; take a dense model.",
        )
    if kind not in DOWN_PROJECTIONS:
        raise NeedsError(
            f"Where {kind!r} keeps its down-projections is not known",
            where="ops/value_vectors.py",
            cure=f"Known: {', '.join(DOWN_PROJECTIONS)}. Add a line to the table.",
        )
    return list(inner.get_submodule(DOWN_PROJECTIONS[kind][0]).children())


def _check_plain(module: nn.Module, path: str) -> None:
    """Raise NeedsError unless the weight is one plain floating-point matrix of its own."""
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    cure = "Load the model unquantised, and merge adapters first."
    if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not isinstance(weight, nn.Parameter):
        raise NeedsError(f"The down-projection is a {kind}, not a plain linear layer", where=path, cure=cure)
    if weight.ndim != 2 or weight.dtype not in PLAIN or type(weight.data) is not Tensor:
        raise NeedsError(
            f"The down-projection's weight is {weight.dtype} of shape {tuple(weight.shape)}: quantised or fused",
            where=path,
            cure=cure,
        )


def vectors_at(model: nn.Module, places: Sequence[Place]) -> Tensor:
    """Copies of the value vectors at some places, (P, D), float32; raises ModelError for a column that is not there."""
    found = []
    for layer, dim in places:
        columns_DF = down_projection(model, layer).columns()
        if not 0 <= dim < columns_DF.shape[1]:
            raise ModelError(
                f"There is no column {dim}",
                where=f"layer {layer}, whose down-projection has {columns_DF.shape[1]}",
                cure="Columns are counted from 0; was the vector found in another model?",
            )
        found.append(columns_DF[:, dim].float().clone())
    return torch.stack(found)


@contextmanager
def replaced(model: nn.Module, places: Sequence[Place], vectors_PD: Tensor) -> Iterator[None]:
    """The model with other value vectors at these places; afterwards, also after an error, bit-identical to before."""
    vectors_at(model, places)
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in dict.fromkeys(place.layer for place in places):
            spot = down_projection(model, layer)
            before.append((spot.weight, spot.weight.data))
            # A copy takes the weight's place: whoever keeps the old tensor finds it unchanged.
            spot.weight.data = spot.weight.data.clone()
            for place, vector_D in zip(places, vectors_PD, strict=True):
                if place.layer == layer:
                    spot.columns()[:, place.dim] = vector_D.to(spot.weight)
        yield
    finally:
        for weight, data in before:
            weight.data = data


@contextmanager
def with_vectors(model: nn.Module, places: Sequence[Place], vectors_PD: Tensor) -> Iterator[None]:
    """The same with a gradient to `vectors_PD`: what a place adds, m_j v_j, is corrected by m_j (v - v_j) in the output."""
    start_PD = vectors_at(model, places)
    with ExitStack() as stack:
        for layer in dict.fromkeys(place.layer for place in places):
            numbers = [n for n, place in enumerate(places) if place.layer == layer]
            dims = [places[n].dim for n in numbers]

            def correct(
                module: nn.Module,
                args: tuple[Any, ...],
                output: Tensor,
                numbers: list[int] = numbers,
                dims: list[int] = dims,
            ) -> Tensor:
                change_PD = vectors_PD[numbers] - start_PD[numbers].to(vectors_PD)
                return output + (args[0][..., dims] @ change_PD.to(args[0].dtype)).to(output.dtype)

            handle = down_projection(model, layer).module.register_forward_hook(correct)
            stack.callback(handle.remove)
        yield


def output_embedding(model: nn.Module) -> Tensor:
    """E, the matrix that projects to the vocabulary, (V, D), without gradient."""
    weight = head_of(model).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@torch.no_grad()
def top_tokens(vectors_PD: Tensor, embedding_VD: Tensor, k: int) -> TopTokens:
    """The k tokens with the largest logit E v of each vector: no norm in between, all of them where there are fewer."""
    k, size = min(k, len(embedding_VD)), max(1, CHUNK_LOGITS // len(embedding_VD))
    wide_VD = embedding_VD.float()
    parts = [(part_PD.float() @ wide_VD.T).topk(k, dim=1) for part_PD in vectors_PD.split(size)]
    values_PK = torch.cat([part.values for part in parts])
    return TopTokens(torch.cat([part.indices for part in parts]), values_PK.mean(1))
