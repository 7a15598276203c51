"""Diffusion models on disk, as diffusers lays them out, and tiny random ones for tests.

A folder has a model_index.json that names its parts. Ours come as a DDPMPipeline (a class-conditional UNet; the index
holds the class names as `id2label`) or a StableDiffusionPipeline (texts), which may lack its VAE: then it draws pixels.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from temper.core.errors import ConfigError, ModelError, NeedsError, nearest
from temper.systems.diffusion import Diffusion
from temper.systems.noise import PREDICTIONS, alpha_bar
from temper.systems.wanted import Wanted

__all__ = ["PIPELINE_RULES", "build_tiny_pipeline", "check_parts", "placed", "read_pipeline", "save_pipeline"]

INDEX = "model_index.json"
UNUSED = ("feature_extractor", "image_encoder", "safety_checker")
"""Parts of pipelines that play no role here and are not loaded."""
TINY_LABELS = ("circle", "square", "triangle", "star")
LEVELS = 100
"""Noise levels of the tiny models."""
PIPELINE_RULES = {"clip_sample": False, "steps_offset": 1}
"""Settings of a scheduler on which StableDiffusionPipeline insists: others it changes when it is loaded."""


def read_pipeline(name: str, wanted: Wanted) -> Diffusion:
    """The parts of a pipeline by `DiffusionPipeline.from_pretrained`, safetensors only; on the CPU, as stored.

    Raises ModelError for a pipeline that lacks a part, takes no condition or whose parts do not fit, NeedsError where
    diffusers is missing or a world's model is not made yet.
    """
    with _explained(name), _quiet():
        from diffusers import DiffusionPipeline

        folder = _folder(name, wanted)
        index = _index(folder, name)
        absent = [part for part, entry in index.items() if entry == [None, None]]
        pipeline = DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, **dict.fromkeys([*UNUSED, *absent]), **wanted.common()
        )
    return _assembled(pipeline, index, name)


def save_pipeline(system: Diffusion, folder: Path | str) -> None:
    """Write the folder that `read_pipeline` reads and that diffusers' own pipelines open."""
    _import_diffusers()
    import diffusers

    scheduler = copy.deepcopy(system.scheduler)  # a pipeline changes settings that it holds outdated
    with _quiet():
        if not system.takes_text:
            pipeline: Any = diffusers.DDPMPipeline(system.model, scheduler)
            pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(system.labels)})
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                vae=system.vae,
                text_encoder=system.text_encoder,
                tokenizer=system.tokenizer,
                unet=system.model,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.save_pretrained(folder, safe_serialization=True)


def placed(system: Diffusion, wanted: Wanted) -> Diffusion:
    """The system ready to use in the precision and on the device wanted; only the UNet can be trained."""
    with _quiet():
        for part in (system.model, system.text_encoder, system.vae):
            if part is not None:
                part.to(device=wanted.device, dtype=wanted.dtype).eval().requires_grad_(part is system.model)
    return system.with_(device=wanted.device)


def check_parts(system: Diffusion) -> None:
    """Raise ModelError unless the parts fit: a condition to draw after, channels, text width, prediction type."""
    config, name = system.model.config, system.spec
    alpha_bar(system.scheduler)
    prediction = system.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ModelError(
            f"The model predicts {prediction!r}", where=name, cure=f"Known: {', '.join(PREDICTIONS)}."
        )
    if not system.takes_text and not config.get("num_class_embeds"):
        raise ModelError(
            "The model is unconditional: it has neither a text encoder nor classes",
            where=name,
            cure="Use a model that draws after labels or texts.",
        )
    given = system.vae.config.latent_channels if system.vae is not None else config.in_channels
    if system.vae is None and given not in (1, 3):
        raise ModelError(
            f"Without a VAE a picture has 1 or 3 channels, not {given}", where=name, cure="Add the VAE."
        )
    if not given == config.in_channels == config.out_channels:
        raise ModelError(
            f"The UNet takes {config.in_channels} channels and gives {config.out_channels}; pictures have {given}",
            where=name,
            cure="Use a plain UNet: none for inpainting, none with learned variances.",
        )
    if system.takes_text:
        width, wanted = system.text_encoder.config.hidden_size, config.get("cross_attention_dim")
        if width != wanted or config.get("addition_embed_type"):
            raise ModelError(
                f"The UNet reads texts of width {wanted}, the text encoder writes {width}",
                where=f"{name}, addition_embed_type={config.get('addition_embed_type')}",
                cure="Use a pipeline with one text encoder that feeds the cross-attention alone.",
            )


def build_tiny_pipeline(architecture: str, seed: int = 0) -> Diffusion:
    """A fresh random model of 8x8 RGB pictures, the same for the same seed: `unet` takes classes, `textunet` texts."""
    builders = {"unet": _tiny_classes, "textunet": _tiny_texts}
    if architecture not in builders:
        raise ConfigError(
            f"There is no tiny diffusion model {architecture!r}", cure=nearest(architecture, builders)
        )
    _import_diffusers()
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=LEVELS, **PIPELINE_RULES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders[architecture](scheduler)


TINY_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def _tiny_classes(scheduler: Any) -> Diffusion:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        **TINY_UNET,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        num_class_embeds=len(TINY_LABELS) + 1,
    )
    return Diffusion(model, scheduler, TINY_LABELS)


def _tiny_texts(scheduler: Any) -> Diffusion:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from temper.systems.tiny import build_tokenizer

    width, tokenizer = 16, build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = UNet2DConditionModel(
        **TINY_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
    )
    return Diffusion(model, scheduler, (), tokenizer, CLIPTextModel(text).eval())


def _folder(name: str, wanted: Wanted) -> Path:
    """The folder a name stands for; of a hub name what is needed is downloaded."""
    if name.startswith("world:"):
        from temper.data.worlds.folders import world_folder

        return world_folder(name.removeprefix("world:"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from diffusers import DiffusionPipeline

    return Path(
        DiffusionPipeline.download(name, use_safetensors=True, **dict.fromkeys(UNUSED), **wanted.common())
    )


def _index(folder: Path, name: str) -> dict[str, Any]:
    """The folder's model_index.json, once it is seen to name what is needed."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The folder has no readable {INDEX}", where=name, cure="Give the folder of a diffusers pipeline."
        ) from error
    _check_index(index, name)
    for part in ("unet", "text_encoder", "vae"):
        if index.get(part, [None])[0] is not None and not any((folder / part).glob("*.safetensors")):
            raise ModelError(
                f"{part} holds no safetensors weights",
                where=name,
                cure="Convert them where you trust them: load with diffusers, then save_pretrained.",
            )
    return index


def _check_index(index: Mapping[str, Any], name: str) -> None:
    for part in ("unet", "scheduler"):
        if (index.get(part) or [None])[0] is None:
            raise ModelError(
                f"The pipeline has no {part}",
                where=f"{name}, {INDEX}",
                cure="Use a pipeline of UNet and scheduler.",
            )
    several = [part for part in ("text_encoder_2", "text_encoder_3") if (index.get(part) or [None])[0]]
    if several:
        raise ModelError(
            f"The pipeline has several text encoders: {several[0]}",
            where=name,
            cure="Use one with a single one.",
        )


def _assembled(pipeline: Any, index: Mapping[str, Any], name: str) -> Diffusion:
    model = pipeline.unet
    texts = getattr(pipeline, "text_encoder", None)
    named = index.get("id2label") or {}
    rows = 0 if texts is not None else int(model.config.get("num_class_embeds") or 0)
    labels = tuple(str(named[str(place)]) for place in range(len(named))) or tuple(map(str, range(rows)))
    system = Diffusion(
        model,
        pipeline.scheduler,
        () if texts is not None else labels,
        getattr(pipeline, "tokenizer", None),
        texts,
        getattr(pipeline, "vae", None),
        spec=name,
    )
    check_parts(system)
    return system


def _import_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise NeedsError(
            "Diffusion models need diffusers",
            where="temper.systems",
            cure="pip install 'temper-ml[diffusion]'",
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes and bars of diffusers and transformers: they warn of parts that are left out on purpose."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for each in libraries:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, verbosity, has_bar in before:
            each.set_verbosity(verbosity)
            if has_bar:
                each.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What diffusers raises as one of our errors."""
    _import_diffusers()
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        from temper.systems.loading import explained

        raise explained(error, name) from error
