"""A conditional diffusion model: a UNet of diffusers, its noise schedule, and what turns labels or texts into conditions.

Pictures are pixels in [0, 1]; the model's own space is [-1, 1], or a latent space where there is a VAE. Names of
shapes: B pictures, C channels, H and W in the model's own space; T tokens and D width of a text's states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError, nearest
from temper.data.pictures import Picture
from temper.systems.fingerprint import fingerprint_model
from temper.systems.local import CPU, LocalSystem, tried
from temper.systems.noise import alpha_bar, denoise, guided, item_generators, level, to_eps
from temper.systems.wanted import Wanted

__all__ = ["DRAWN_AT_ONCE", "Condition", "Diffusion", "DrawRule", "load_diffusion"]

DRAWN_AT_ONCE = 64
"""Pictures that go through the model together; how many does not change any of them."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What B pictures are conditioned on: class ids, or the states of texts' tokens."""

    labels_B: Tensor | None = None
    tokens_BTD: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The one of both that is there."""
        found = self.tokens_BTD if self.labels_B is None else self.labels_B
        assert found is not None
        return found

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.values)

    def like(self, values: Tensor) -> Condition:
        """A condition of the same sort with these values."""
        return Condition(tokens_BTD=values) if self.labels_B is None else Condition(labels_B=values)

    def take(self, index: Any) -> Condition:
        """The conditions at an index: a slice, or ids."""
        return self.like(self.values[index])


class DrawRule(Protocol):
    """What draws in the sampler's place, e.g. a one-step generator. `num_calls` counts its passes through the model."""

    name: str
    num_calls: int

    def __call__(self, system: Diffusion, noise_BCHW: Tensor, condition: Condition) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Diffusion(LocalSystem):
    """Labels or texts to pictures. Change it with `with_`, never in place; `model` is the UNet, all else is its identity."""

    model: Any
    """UNet2DModel or UNet2DConditionModel."""
    scheduler: Any
    """A scheduler of diffusers with a table of noise levels; its class is the sampler."""
    labels: tuple[str, ...] = ()
    """Names of the classes; none for a model of texts."""
    tokenizer: Any = None
    text_encoder: Any = None
    vae: Any = None
    draw_rule: DrawRule | None = None
    """Draws in the sampler's place."""
    device: torch.device = CPU
    spec: str = ""
    given_fingerprint: str = ""
    kind: ClassVar[str] = "Diffusion"

    @property
    def takes_text(self) -> bool:
        """Whether it draws after texts; else after classes."""
        return self.text_encoder is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's own space."""
        size = self.model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.config.in_channels, int(height), int(width)

    @property
    def alpha_bar_N(self) -> Tensor:
        """Share of signal power left at each of the N noise levels, float64."""
        return alpha_bar(self.scheduler)

    @property
    def has_null(self) -> bool:
        """Whether it can be asked for anything at all, which guidance needs: texts can be empty, classes need one more row."""
        return self.takes_text or int(self.model.config.num_class_embeds) > len(self.labels)

    @property
    def max_tokens(self) -> int:
        """Tokens of a text, with its first and last one; shorter texts are padded."""
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    def identity(self) -> str:
        """Hash of the schedule, the class names, text encoder, tokenizer and VAE."""
        settings = {key: value for key, value in self.scheduler.config.items() if not key.startswith("_")}
        parts = [
            type(self.scheduler).__name__,
            json.dumps(settings, sort_keys=True, default=str),
            *self.labels,
        ]
        parts += [fingerprint_model(part) for part in (self.text_encoder, self.vae) if part is not None]
        if self.tokenizer is not None:
            vocabulary = sorted(self.tokenizer.get_vocab().items())
            parts.append(json.dumps([vocabulary, self.max_tokens]))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def conditions(self, wanted: Sequence[int | str]) -> Condition:
        """Conditions for class ids or names, or for texts; a text longer than `max_tokens` is cut, as pipelines do.

        Raises ConfigError for a class that does not exist, DataError for a condition of the wrong type.
        """
        if not self.takes_text:
            ids = [self._label(each) for each in wanted]
            return Condition(labels_B=torch.tensor(ids, dtype=torch.long, device=self.device))
        texts = [text for text in wanted if isinstance(text, str)]
        if len(texts) < len(wanted):
            raise DataError(
                f"{list(wanted)[:3]!r} are no texts", where=self.spec, cure="It draws after texts."
            )
        with torch.no_grad():
            return Condition(tokens_BTD=self.token_states(self.ids(texts)))

    def nothing(self, num: int) -> Condition:
        """The condition that asks for nothing, `num` times; raises ConfigError for a model that never learnt it."""
        if self.takes_text:
            return Condition(tokens_BTD=self.conditions([""]).values.expand(num, -1, -1))
        if not self.has_null:
            raise ConfigError(
                "Guidance needs an unconditional prediction, and the model has none",
                where=f"{self.spec}, {len(self.labels)} classes in as many rows",
                cure="Set guidance to 1, or use a model trained with one class row more.",
            )
        return Condition(labels_B=torch.full((num,), len(self.labels), dtype=torch.long, device=self.device))

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, (B, T), padded to `max_tokens`; control tokens that a text spells stay text."""
        rows = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            split_special_tokens=True,
            return_tensors="pt",
        )
        return rows["input_ids"].to(self.device)

    def token_states(self, ids_BT: Tensor) -> Tensor:
        """The text encoder's last states, (B, T, D), with gradient where it is on; padding is read like any token."""
        return self.text_encoder(input_ids=ids_BT).last_hidden_state

    def predict(self, x_t_BCHW: Tensor, t_B: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """The model's raw output, of the kind `scheduler.config.prediction_type`; see `eps` for its arguments."""
        nothing = self.nothing(len(x_t_BCHW)) if guidance != 1.0 else None
        return self._guided(x_t_BCHW, t_B, condition, nothing, guidance)

    def eps(self, x_t_BCHW: Tensor, t_B: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """The noise in x_t at timesteps t, by the model; `guidance` as in diffusers: 1 is none, and then free."""
        output_BCHW = self.predict(x_t_BCHW, t_B, condition, guidance)
        prediction = self.scheduler.config.prediction_type
        if prediction == "epsilon":
            return output_BCHW
        ab_B = level(self.alpha_bar_N, t_B.to(x_t_BCHW.device).expand(len(x_t_BCHW)), x_t_BCHW)
        return to_eps(output_BCHW, x_t_BCHW, ab_B, prediction)

    def draw(
        self, condition: Condition, num_steps: int = 20, seed: int = 0, guidance: float = 1.0
    ) -> list[Picture]:
        """One picture a condition; see `draw_pixels`."""
        return self.pictures(self.draw_pixels(condition, num_steps, seed, guidance))

    def pictures(self, pixels_BCHW: Tensor) -> list[Picture]:
        """Pixels in [0, 1] as pictures."""
        bytes_BHWC = (pixels_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Picture.from_array(pixels_HWC.copy()) for pixels_HWC in bytes_BHWC]

    @torch.no_grad()
    def draw_pixels(
        self, condition: Condition, num_steps: int = 20, seed: int = 0, guidance: float = 1.0
    ) -> Tensor:
        """Pictures as pixels in [0, 1], (B, C, H, W). Noise depends on the seed and a picture's place alone.

        With a `draw_rule` in force that rule draws, and `num_steps` and `guidance` have no say.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            chunks = [
                self._draw_chunk(
                    condition.take(slice(start, start + DRAWN_AT_ONCE)), start, num_steps, seed, guidance
                )
                for start in range(0, len(condition), DRAWN_AT_ONCE)
            ]
        finally:
            self.model.train(was_training)
        return torch.cat(chunks)

    def _draw_chunk(
        self, condition: Condition, first: int, num_steps: int, seed: int, guidance: float
    ) -> Tensor:
        generators = item_generators(seed, len(condition), first)
        noise_BCHW = torch.stack([torch.randn(self.shape, generator=each) for each in generators])
        noise_BCHW = noise_BCHW.to(self.device, self.model.dtype)
        if self.draw_rule is not None:
            return self.to_pixels(self.draw_rule(self, noise_BCHW, condition))
        nothing = self.nothing(len(condition)) if guidance != 1.0 else None
        x_BCHW = denoise(
            self.scheduler,
            lambda x_BCHW, t: self._guided(x_BCHW, t, condition, nothing, guidance),
            noise_BCHW,
            num_steps,
            generators,
        )
        return self.to_pixels(x_BCHW)

    def to_pixels(self, x_BCHW: Tensor) -> Tensor:
        """The model's own space as pixels in [0, 1], through the VAE where there is one; float32, clipped."""
        if self.vae is not None:
            x_BCHW = self.vae.decode(x_BCHW / self.vae.config.scaling_factor).sample
        return (x_BCHW.float() / 2 + 0.5).clamp(0, 1)

    def from_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] in the model's own space; a VAE gives the middle of its distribution."""
        x_BCHW = (pixels_BCHW * 2 - 1).to(self.device, self.model.dtype)
        if self.vae is None:
            return x_BCHW
        with torch.no_grad():
            return self.vae.encode(x_BCHW).latent_dist.mode() * self.vae.config.scaling_factor

    def try_capabilities(self) -> dict[str, bool]:
        """A picture in two steps, and a gradient that reaches the noisy input; no parameter's `.grad` is touched."""
        condition = self.conditions(["a" if self.takes_text else 0])
        return {
            "draw": tried(lambda: bool(torch.isfinite(self.draw_pixels(condition, num_steps=2)).all())),
            "grads": tried(lambda: self._reaches(condition)),
        }

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        if capability in ("draw", "grads"):
            return (
                f"{type(self.model).__name__} failed when {capability!r} was tried; choose another pipeline."
            )
        return "A diffusion model draws: choose a system of another kind, e.g. smollm2-135m."

    def _reaches(self, condition: Condition) -> bool:
        with torch.enable_grad():
            x_BCHW = torch.ones(1, *self.shape, device=self.device, dtype=self.model.dtype).requires_grad_()
            loss = self.predict(x_BCHW, torch.tensor(1), condition).float().square().sum()
            (grad_BCHW,) = torch.autograd.grad(loss, x_BCHW)
        return bool(torch.isfinite(grad_BCHW).all()) and bool(grad_BCHW.any())

    def _label(self, wanted: int | str) -> int:
        if isinstance(wanted, str) and wanted in self.labels:
            return self.labels.index(wanted)
        if isinstance(wanted, int) and 0 <= wanted < len(self.labels):
            return wanted
        raise ConfigError(
            f"There is no class {wanted!r}",
            where=f"{self.spec}, {len(self.labels)} classes",
            cure=nearest(str(wanted), self.labels),
        )

    def _guided(
        self, x_BCHW: Tensor, t_B: Tensor, condition: Condition, nothing: Condition | None, guidance: float
    ) -> Tensor:
        t_B = t_B.to(x_BCHW.device).expand(len(x_BCHW))
        output_BCHW = self._forward(x_BCHW, t_B, condition)
        if nothing is None:
            return output_BCHW
        return guided(output_BCHW, self._forward(x_BCHW, t_B, nothing), guidance)

    def _forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        if self.takes_text:
            return self.model(x_BCHW, t_B, encoder_hidden_states=condition.tokens_BTD).sample
        return self.model(x_BCHW, t_B, class_labels=condition.labels_B).sample


def load_diffusion(name: str, wanted: Wanted) -> Diffusion:
    """The system of `tiny:unet`, `tiny:textunet`, a `world:` model, a folder with a model_index.json, or a hub name."""
    from temper.systems.pipelines import build_tiny_pipeline, placed, read_pipeline

    if name.startswith("tiny:"):
        _, architecture, *rest = name.split(":")
        bare = build_tiny_pipeline(architecture, *(int(part) for part in rest))
    else:
        bare = read_pipeline(name, wanted)
    return placed(bare.with_(spec=name), wanted)
