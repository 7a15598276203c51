"""What people can look at: the words nearest to learned vectors, what the image tower looks at, what a picture's shift changes.

Shape letters: B pictures, C classes, M context vectors, D text width, E width of the common space, H heads, P patches, S a side of
the grid of patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.methods.vision_language.cocoop.learner import LearnedPrompts
from temper.systems.dual_encoder import DualEncoder

__all__ = ["Shift", "nearest_words", "shifts", "token_maps"]


@torch.no_grad()
def nearest_words(system: DualEncoder, context_MD: Tensor, num: int = 3) -> list[list[tuple[str, float]]]:
    """For each vector the `num` nearest tokens of the vocabulary and their Euclidean distances, as CoOp's paper lists them."""
    table_VD = system.token_embeddings(torch.arange(len(system.tokenizer), device=system.device)).float()
    distance_MV = torch.cdist(context_MD.float().to(system.device), table_VD)
    distance_MV[:, list(system.tokenizer.all_special_ids)] = torch.inf
    found = distance_MV.topk(num, largest=False)
    return [
        [
            (str(token).removesuffix("</w>"), value)
            for token, value in zip(system.tokenizer.convert_ids_to_tokens(ids), values, strict=True)
        ]
        for ids, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


class Shift(NamedTuple):
    """What a picture's own context changes, in lengths of a context vector, and the answer with and without it."""

    length: float
    own: float
    """Of what is left without the mean over the pictures: near 0 every picture has the same prompt."""
    answer: str
    answer_without: str
    probability: float
    """Of the right class."""
    probability_without: float


@torch.no_grad()
def shifts(
    system: DualEncoder, image_BE: Tensor, class_B: Sequence[int], names: Sequence[str]
) -> list[Shift]:
    """One a picture; () for a system without image-conditional prompts."""
    scorer = system.scorer
    if not isinstance(scorer, LearnedPrompts) or scorer.learner.meta is None:
        return []
    static = LearnedPrompts(scorer.learner.without_shift(), scorer.settings, scorer.name)
    with_BC, without_BC = (one.score(system, image_BE, names).softmax(1) for one in (scorer, static))
    shift_BD = scorer.learner.meta(image_BE) / scorer.learner.context.norm(dim=-1).mean()
    lengths = shift_BD.norm(dim=1).tolist(), (shift_BD - shift_BD.mean(0)).norm(dim=1).tolist()
    return [
        Shift(
            length,
            own,
            names[int(one.argmax())],
            names[int(two.argmax())],
            float(one[right]),
            float(two[right]),
        )
        for length, own, one, two, right in zip(*lengths, with_BC, without_BC, class_B, strict=True)
    ]


def token_maps(
    system: DualEncoder, pixels_BCHW: Tensor, class_B: Sequence[int], names: Sequence[str]
) -> Tensor:
    """How much each visual token gives to the score of the right class against the best other one, (B, S, S), 0 and up.

    The last layer's attention from the class token times its gradient, positive parts, mean over heads.
    """
    with torch.no_grad():
        image_BE = system.image_vectors(pixels_BCHW)
        toward_BE = torch.stack(
            [_toward(system, one_E, right, names) for one_E, right in zip(image_BE, class_B, strict=True)]
        )
    with _last_attention(system.model) as kept, torch.enable_grad():
        image_BE = system.image_vectors(pixels_BCHW.detach().requires_grad_())
        (attention_BHTT,) = kept
        (slope_BHTT,) = torch.autograd.grad((image_BE * toward_BE).sum(), [attention_BHTT])
    given_BP = (slope_BHTT * attention_BHTT).detach().float().clamp(min=0).mean(1)[:, 0, 1:]
    side = round(given_BP.shape[1] ** 0.5)
    return given_BP.unflatten(1, (side, side))


@contextmanager
def _last_attention(model: Any) -> Iterator[list[Tensor]]:
    """Keeps the weights of the image tower's last attention, with gradient; inside, attention runs eagerly."""
    before, kept = model.config._attn_implementation, []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[1])

    model.set_attn_implementation("eager")
    hook = model.vision_model.encoder.layers[-1].self_attn.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()
        model.set_attn_implementation(before)


def _toward(system: DualEncoder, image_E: Tensor, right: int, names: Sequence[str]) -> Tensor:
    """The vector of the right class minus that of the best other one, for one picture, (E,)."""
    scorer = system.scorer
    if isinstance(scorer, LearnedPrompts):
        prompts = scorer.prompts(system, names)
        classes_CE = scorer.learner.class_vectors(system, prompts, image_E[None])
        classes_CE = classes_CE[0] if classes_CE.ndim == 3 else classes_CE
    else:
        classes_CE = system.class_vectors(names)
    others_C = (classes_CE @ image_E).index_fill(0, torch.tensor([right], device=image_E.device), -torch.inf)
    return classes_CE[right] - classes_CE[int(others_C.argmax())]
