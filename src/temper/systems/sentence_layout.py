"""The folder layout of sentence-transformers: what follows the token states, read from it and written back."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from temper.core.errors import ModelError, NeedsError, nearest
from temper.core.types import Json

__all__ = ["HEAD", "POOLING", "Dense", "Layout", "attach_dense", "read_layout", "write_layout"]

POOLING = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of versions before 5, in the order in which they concatenate."""
ACTIVATIONS = {each.__name__: each for each in (nn.GELU, nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)}
HEAD = "sentence_head"


@dataclass(frozen=True)
class Layout:
    """How texts are cut and how token states become a vector: pooled, concatenated, then the steps in order."""

    pooling: tuple[str, ...] = ("mean",)
    steps: tuple[str, ...] = ()
    """"dense" (the next layer of the model's `sentence_head`) or "normalize" (to length 1)."""
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Texts put before an input, by name."""
    default_prompt: str = ""

    def cut(self, max_tokens: int) -> Layout:
        """The same, reading at most so many tokens of a text."""
        return replace(self, max_tokens=max_tokens)


class Dense(nn.Module):
    """Linear layer, activation, and optionally the input added again."""

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__()
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        kind = ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.nn.") else None
        if kind is None:
            raise ModelError(f"The activation {name!r} is not known", cure=nearest(name, ACTIVATIONS))
        self.config = dict(config)
        wide, narrow = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(wide, narrow, bias=bool(config.get("bias", True)))
        self.activation: nn.Module = kind()
        self.adds_input = bool(config.get("use_residual", False))
        if self.adds_input and wide != narrow:
            self.residual = nn.Linear(wide, narrow, bias=False)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """The projected vectors."""
        out = self.activation(self.linear(vectors_BD))
        if not self.adds_input:
            return out
        return out + (self.residual(vectors_BD) if hasattr(self, "residual") else vectors_BD)


def read_layout(folder: Path) -> tuple[Layout, list[Dense]]:
    """What `modules.json` and the folders it names say; mean pooling where there is none.

    Raises ModelError for a kind of module or a setting that is not known, NeedsError for pooling that leaves prompts out.
    """
    if not (folder / "modules.json").is_file():
        return Layout(), []
    modules = json.loads((folder / "modules.json").read_text())
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    if names[:1] != ["Transformer"] or names[1:2] != ["Pooling"]:
        raise _unknown(folder, names)
    own = _json(folder / modules[0]["path"] / "sentence_bert_config.json")
    common = _json(folder / "config_sentence_transformers.json")
    prompts = {name: text for name, text in (common.get("prompts") or {}).items() if text}
    default = common.get("default_prompt_name") or ""
    steps, dense = [], []
    for module, name in list(zip(modules, names, strict=True))[2:]:
        if name == "Dense":
            steps.append("dense")
            dense.append(_read_dense(folder / module["path"]))
        elif name == "Normalize":
            steps.append("normalize")
        elif name != "Dropout":
            raise _unknown(folder, names)
    layout = Layout(
        pooling=_read_pooling(folder / modules[1]["path"] / "config.json", bool(prompts)),
        steps=tuple(steps),
        max_tokens=own.get("max_seq_length"),
        lower_case=bool(own.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=default if default in prompts else "",
    )
    return layout, dense


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _unknown(folder: Path, names: list[str]) -> ModelError:
    return ModelError(
        f"modules.json lists {', '.join(names)}",
        where=str(folder),
        cure="Transformer, Pooling, then Dense, Normalize and Dropout are known.",
    )


def _read_pooling(path: Path, has_prompts: bool) -> tuple[str, ...]:
    config = _json(path)
    named = config.get("pooling_mode") or [mode for key, mode in OLD_POOLING.items() if config.get(key)]
    modes = (named,) if isinstance(named, str) else tuple(named) or ("mean",)
    for mode in modes:
        if mode not in POOLING:
            raise ModelError(
                f"The pooling {mode!r} is not known", where=str(path), cure=nearest(mode, POOLING)
            )
    if has_prompts and not config.get("include_prompt", True):
        raise NeedsError(
            "The pooling leaves prompts out", where=str(path), cure="Choose an encoder that pools them."
        )
    return modes


def _read_dense(folder: Path) -> Dense:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise ModelError(
            "A dense layer has no safetensors weights",
            where=str(folder),
            cure="Save it again as safetensors.",
        )
    dense = Dense(_json(folder / "config.json"))
    dense.load_state_dict(load_file(path))
    return dense


def attach_dense(model: nn.Module, dense: list[Dense]) -> None:
    """Make the dense layers part of the model."""
    if dense:
        weight = next(model.parameters())
        model.add_module(HEAD, nn.ModuleList(dense).to(weight.device, weight.dtype).eval())


def write_layout(model: Any, tokenizer: Any, layout: Layout, folder: Path) -> None:
    """Write model, tokenizer and layout so that sentence-transformers, of any version, loads the same encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{HEAD}.")}
    _save_tensors(folder, body)
    modules = [_entry(0, "", "Transformer"), _entry(1, "1_Pooling", "Pooling")]
    dense = iter(getattr(model, HEAD, ()))
    for place, step in enumerate(layout.steps, start=2):
        name = step.capitalize()
        modules.append(_entry(place, f"{place}_{name}", name))
        (folder / f"{place}_{name}").mkdir(parents=True, exist_ok=True)
        if step == "dense":
            layer = next(dense)
            _write(folder / f"{place}_{name}" / "config.json", layer.config)
            _save_tensors(folder / f"{place}_{name}", layer.state_dict())
    _write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    old: dict[str, Json] = {key: mode in layout.pooling for key, mode in OLD_POOLING.items()}
    if tuple(mode for mode in OLD_POOLING.values() if mode in layout.pooling) != layout.pooling:
        old = {"pooling_mode": list(layout.pooling)}  # an order that the old keys cannot say
    _write(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config.hidden_size, **old}
    )
    own = {"max_seq_length": layout.max_tokens, "do_lower_case": layout.lower_case}
    _write(folder / "sentence_bert_config.json", own)
    default = layout.default_prompt or None
    common = {"prompts": dict(layout.prompts), "default_prompt_name": default}
    _write(folder / "config_sentence_transformers.json", common)


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # Cloned: safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def _entry(place: int, path: str, name: str) -> dict[str, Json]:
    return {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}


def _write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
