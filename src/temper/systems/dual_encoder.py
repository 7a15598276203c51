"""Pictures and texts to vectors of one space: any CLIPModel of transformers, with its tokenizer and image preparation.

Shape letters: T tokens, D text width, E width of the common space; C counts classes in logits_BC and class_CE, channels in
pixels_BCHW. Pixels are floats in [0, 1].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.errors import DataError, ModelError
from temper.core.types import Json
from temper.data.pictures import Picture
from temper.systems.image_classifier import check_pixels, prepare
from temper.systems.local import CPU, LocalSystem, tried
from temper.systems.wanted import Wanted

__all__ = ["ClassScorer", "DualEncoder", "TokenRows", "check_names", "load_dual_encoder"]

TEMPLATE = "a photo of a {}."
CHUNK_ROWS = 1024
"""Texts or pictures that go through a tower together without gradient."""


class TokenRows(NamedTuple):
    """Texts as ids, filled up to the longest, and where each one's end token stands."""

    ids_BT: Tensor
    end_B: Tensor


class ClassScorer(Protocol):
    """What scores classes in the zero-shot template's place, e.g. learned prompts."""

    name: str

    def __call__(self, system: DualEncoder, pixels_BCHW: Tensor, names: Sequence[str]) -> Tensor:
        """Class scores (B, C) for classes of these names, with gradient."""


@dataclass(frozen=True, eq=False)
class DualEncoder(LocalSystem):
    """Pictures and texts to unit vectors, and classes by name. Change it with `with_`, never in place.

    Normalisation of pixels happens inside; a text that is too long is an error, since its end token is what is read.
    """

    model: Any
    tokenizer: Any
    shape: tuple[int, int, int]
    """Channels, height and width of its pixels."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, ...] = ()
    """As in ImageClassifier."""
    resample: str = "bicubic"
    template: str = TEMPLATE
    """What a class name is put into for zero-shot classification."""
    scorer: ClassScorer | None = None
    """Scores classes in the template's place."""
    device: torch.device = CPU
    spec: str = ""
    given_fingerprint: str = ""
    kind: ClassVar[str] = "DualEncoder"

    def identity(self) -> str:
        """The pixels' preparation, the template and the tokenizer."""
        fields = ("shape", "mean", "std", "resize", "resample", "template")
        kept: dict[str, Json] = {name: getattr(self, name) for name in fields}
        spelt = self.tokenizer.backend_tokenizer.to_str()
        kept["tokenizer"] = hashlib.sha256(_without_padding(spelt).encode()).hexdigest()
        return json.dumps(kept, sort_keys=True)

    # ---- pictures

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """The pictures as (B, channels, height, width) in [0, 1], resized and cropped."""
        rows = [prepare(picture, self.shape, self.resize, self.resample) for picture in pictures]
        bytes_BCHW = np.stack(rows) if rows else np.zeros((0, *self.shape), np.uint8)
        return torch.from_numpy(bytes_BCHW).to(self.device).float() / 255

    def image_vectors(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Unit vectors (B, E) of pictures, or with gradient of pixels_BCHW in [0, 1].

        Raises DataError for pixels of another shape, NaN, or 0 to 255.
        """
        if not isinstance(images, Tensor):
            parts = [self.image_vectors(self.pixels(part)) for part in _chunks(images)]
            return torch.cat(parts) if parts else torch.zeros(0, self.width, device=self.device)
        check_pixels(images, self.shape, self.spec)
        given = ((self.mean, 0.0), (self.std, 1.0))
        mean, std = (torch.tensor(value or (default,), device=images.device) for value, default in given)
        normal_BCHW = (images - mean[:, None, None]) / std[:, None, None]
        seen = self.model.vision_model(pixel_values=normal_BCHW.to(self.dtype))
        return _unit(self.model.visual_projection(seen.pooler_output))

    # ---- texts

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as ids between the first and the end token. Control tokens that a text spells stay text.

        Raises DataError for a text of no token, of too many (an end token cut off would change its vector without a word), or with a
        word that the tokenizer does not know.
        """
        if not texts:
            return []
        rows = self.tokenizer(
            list(texts), split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            self.check_ids(row, text)
        return [list(row) for row in rows]

    def check_ids(self, row: Sequence[int], text: str) -> None:
        """Raise DataError unless the row of ids is a text that the text tower can read."""
        if len(row) > self.max_tokens:
            raise DataError(
                f"{len(row)} tokens are too many: {self.spec or self.kind} reads {self.max_tokens}",
                where=f"text {text!r}",
                cure="Shorten it; cut off, it would lose the end token that stands for the whole.",
            )
        if len(row) < 3 or row[-1] != self.end_id:
            raise DataError("The text has no token", where=f"text {text!r}", cure="Give it a word.")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self.end_id and unknown in row:
            words = text.split()
            odd = next((word for word in words if unknown in self._bare_ids(word)), text)
            raise DataError(
                f"{odd!r} is not among the {len(self.tokenizer)} words that {self.spec or self.kind} knows",
                where=f"text {text!r}",
                cure="Use its words, or a model with a larger vocabulary.",
            )

    def _bare_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def token_rows(self, texts: Sequence[str]) -> TokenRows:
        """The texts as ids, filled with the pad id."""
        rows = self.ids(texts)
        longest = max((len(row) for row in rows), default=0)
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        ids_BT = torch.tensor(padded, dtype=torch.int64, device=self.device).reshape(len(rows), longest)
        return TokenRows(ids_BT, torch.tensor([len(row) - 1 for row in rows], device=self.device))

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts, with gradient in the weights."""
        parts = []
        for part in _chunks(texts):
            rows = self.token_rows(part)
            parts.append(self.text_vectors_from_embeddings(self.token_embeddings(rows.ids_BT), rows.end_B))
        return torch.cat(parts) if parts else torch.zeros(0, self.width, device=self.device)

    def token_embeddings(self, ids_BT: Tensor) -> Tensor:
        """The text tower's embeddings of ids, (B, T, D), positions not added."""
        embeddings_BTD: Tensor = self.model.text_model.embeddings.token_embedding(ids_BT)
        return embeddings_BTD

    def text_vectors_from_embeddings(self, embeddings_BTD: Tensor, end_B: Tensor) -> Tensor:
        """Unit vectors (B, E) of rows of token embeddings, read at `end_B`, with gradient in them.

        Equals `text_vectors` where the embeddings are those of a text's ids; what stands behind the end is never read.
        """
        from transformers.masking_utils import create_causal_mask

        tower = self.model.text_model
        hidden_BTD = tower.embeddings(inputs_embeds=embeddings_BTD)
        mask = create_causal_mask(
            config=tower.config, inputs_embeds=hidden_BTD, attention_mask=None, past_key_values=None
        )
        states = tower.encoder(inputs_embeds=hidden_BTD, attention_mask=mask, is_causal=True)
        end_BD = states.last_hidden_state[torch.arange(len(end_B), device=end_B.device), end_B]
        return _unit(self.model.text_projection(tower.final_layer_norm(end_BD)))

    # ---- classes

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by, a scalar."""
        scale: Tensor = self.model.logit_scale.exp().float()
        return scale

    def class_vectors(self, names: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """One unit vector a class, (C, E): the mean over templates, by default the system's own. Raises DataError as `ids` and for
        names that do not tell classes apart.
        """
        check_names(names)
        each = [
            self.text_vectors([template.replace("{}", name) for name in names])
            for template in templates or [self.template]
        ]
        return _unit(torch.stack(each).mean(0))

    def logits(self, image_BE: Tensor, class_CE: Tensor) -> Tensor:
        """Scaled cosines, (B, C), in float32 even under autocast; class vectors may also be each picture's own, (B, C, E)."""
        with torch.autocast(self.device.type, enabled=False):
            if class_CE.ndim == 3:
                return self.logit_scale * torch.einsum("be,bce->bc", image_BE, class_CE)
            return self.logit_scale * image_BE @ class_CE.T

    def class_logits(self, pixels_BCHW: Tensor, names: Sequence[str]) -> Tensor:
        """Class scores (B, C) of pixels for classes by name: by what was applied to it, else zero-shot."""
        if self.scorer is not None:
            return self.scorer(self, pixels_BCHW, names)
        return self.logits(self.image_vectors(pixels_BCHW), self.class_vectors(names))

    # ---- facts

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.model.config.projection_dim)

    @property
    def text_width(self) -> int:
        """Numbers in a token's embedding."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text, first and end token included."""
        return int(
            min(
                self.model.config.text_config.max_position_embeddings,
                self.tokenizer.model_max_length or math.inf,
            )
        )

    @property
    def end_id(self) -> int:
        """The id whose state stands for the text: the tokenizer's, whatever the config says."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; its state is never read."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.visual_projection.weight.dtype
        return dtype

    def try_capabilities(self) -> dict[str, bool]:
        """Vectors of two shades and two rows of ids, their gradients, and the text tower's states."""
        shades = torch.linspace(0.1, 0.9, 2 * math.prod(self.shape), device=self.device)
        pixels_BCHW = shades.reshape(2, *self.shape)
        ids_BT = torch.tensor([[0, 1, self.end_id], [1, 0, self.end_id]], device=self.device)
        embed = tried(lambda: _gives_vectors(self, pixels_BCHW, ids_BT))
        return {
            "see": embed,
            "embed": embed,
            "classify": embed,
            "grads": tried(lambda: _gives_gradients(self, pixels_BCHW, ids_BT)),
            "hidden": tried(lambda: _gives_states(self, ids_BT)),
        }

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        if capability in ("see", "embed", "classify", "grads", "hidden"):
            return f"{type(self.model).__name__} failed when {capability!r} was tried; choose another CLIP model."
        return "A dual encoder compares pictures with texts and writes nothing: choose e.g. smollm2-135m."


def check_names(names: Sequence[str]) -> None:
    """Raise DataError unless the names tell at least two classes apart."""
    doubles = {name for name in names if list(names).count(name) > 1}
    if doubles:
        raise DataError(
            f"Two classes have the name {min(doubles)!r}", cure="Give every class a name of its own."
        )
    if len(names) < 2:
        raise DataError(f"{len(names)} class names are too few", cure="Name at least two classes.")


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def _chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))


def _without_padding(spelt: str) -> str:
    """A tokenizer's JSON without what calls change."""
    content = json.loads(spelt)
    return json.dumps(
        {k: v for k, v in content.items() if k not in ("truncation", "padding")}, sort_keys=True
    )


@torch.no_grad()
def _gives_vectors(system: DualEncoder, pixels_BCHW: Tensor, ids_BT: Tensor) -> bool:
    end_B = torch.full((2,), 2, device=ids_BT.device)
    text_BE = system.text_vectors_from_embeddings(system.token_embeddings(ids_BT), end_B)
    image_BE = system.image_vectors(pixels_BCHW)
    return text_BE.shape == image_BE.shape and bool((text_BE + image_BE).isfinite().all())


def _gives_gradients(system: DualEncoder, pixels_BCHW: Tensor, ids_BT: Tensor) -> bool:
    """Gradients reach the pixels and the token embeddings; no parameter's `.grad` is touched."""
    with torch.enable_grad():
        pixels = pixels_BCHW.clone().requires_grad_()
        tokens = system.token_embeddings(ids_BT).detach().requires_grad_()
        end_B = torch.full((2,), 2, device=ids_BT.device)
        cosine = (system.image_vectors(pixels) * system.text_vectors_from_embeddings(tokens, end_B)).sum()
        grads = torch.autograd.grad(cosine, [pixels, tokens])
    return all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)


@torch.no_grad()
def _gives_states(system: DualEncoder, ids_BT: Tensor) -> bool:
    hidden = system.model.text_model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    return hidden is not None and len(hidden) > 1


# ---- loading


def load_dual_encoder(name: str, wanted: Wanted) -> DualEncoder:
    """The dual encoder of a name: tiny:clip[:SEED], world:clip, a folder, a hub name. Raises ConfigError, ModelError, NeedsError."""
    if name.startswith("tiny:"):
        system = _tiny(*name.split(":")[2:])
    elif name.startswith("world:"):
        from temper.data.worlds.folders import world_folder

        system = _read(str(world_folder(name.removeprefix("world:"))), name, wanted)
    else:
        folder = Path(name).expanduser()
        system = _read(str(folder) if folder.is_dir() else name, name, wanted)
    system.model.set_attn_implementation(wanted.attention)
    system.model.to(device=wanted.device, dtype=wanted.dtype).eval()
    return dataclasses.replace(system, device=wanted.device, spec=name)


def _tiny(seed: str = "0") -> DualEncoder:
    """Two layers, width 32, 16 px, with the words of the caption world."""
    from transformers import CLIPConfig, CLIPModel

    from temper.data.worlds.captions.words import VOCABULARY
    from temper.systems.word_tokenizer import build_word_tokenizer

    tokenizer = build_word_tokenizer(VOCABULARY, 32)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    build: Callable[..., Any] = CLIPConfig
    config = build(
        text_config={**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**layers, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        model = CLIPModel(config)
    return DualEncoder(model, tokenizer, (3, 16, 16), (0.5,) * 3, (0.25,) * 3, template="a photo of a {}")


def _read(source: str, name: str, wanted: Wanted) -> DualEncoder:
    """A CLIPModel with its tokenizer and image processor; a template that its config holds comes with it."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    from temper.systems.image_loading import with_processor
    from temper.systems.loading import bars_as_due, explained_errors

    with bars_as_due(is_download=not Path(source).is_dir()), explained_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **wanted.common())
        processor = AutoImageProcessor.from_pretrained(source, **wanted.common())
        read: Any = CLIPModel.from_pretrained
        model, found = read(
            source, dtype=wanted.dtype, use_safetensors=True, output_loading_info=True, **wanted.common()
        )
    if found["missing_keys"]:
        raise ModelError(
            f"The weights lack {', '.join(sorted(found['missing_keys'])[:3])}",
            where=name,
            cure="Use the weights that belong to config.json.",
        )
    eyes = with_processor(model, (), processor, name)
    return DualEncoder(
        model,
        tokenizer,
        eyes.shape,
        eyes.mean,
        eyes.std,
        eyes.resize,
        eyes.resample,
        template=getattr(model.config, "zero_shot_template", TEMPLATE),
    )
