"""A system made ready to train, and put back: low-rank or whole weights, with new vocabulary rows."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temper.artefacts.adapter import PREFIX, Adapter, peft_rows_key
from temper.artefacts.base import need_model
from temper.artefacts.lora_linear import fuse
from temper.artefacts.preserved import preserved
from temper.artefacts.targets import ALL_LINEAR, suffixes, target_modules, target_parameters
from temper.artefacts.trained_rows import train_rows
from temper.artefacts.vocabulary import Vocabulary, plan_vocabulary
from temper.artefacts.weights import Weights
from temper.core.errors import ConfigError, ModelError
from temper.core.types import Json, Run
from temper.ops.checkpoint import kept_buffers
from temper.systems.anchors import is_conv1d
from temper.systems.mapped_files import MappedFiles

__all__ = ["Tune", "Tuning", "tuning"]

TASK_TYPES = {"CausalLM": "CAUSAL_LM", "Encoder": "FEATURE_EXTRACTION"}
"""Kind of System -> the task type under which PEFT loads its adapter."""
FROZEN_DTYPES = {"same": None, "bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What is trained of a model. Use it as a field of a method's Config."""

    mode: Literal["lora", "full"] = "lora"
    """Low-rank adapters, or the weights themselves (one more copy of what is trained, in memory unless it is a file's)."""
    r: int = 16
    """Rank of the adapters."""
    alpha: float = 32
    """The adapters' change is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' inputs."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """"all-linear", or names of modules, e.g. [q_proj, v_proj]; with mode "full", "all-linear" means all weights."""
    new_tokens: tuple[str, ...] = ()
    """Control tokens to add; their rows are trained in either mode."""
    reuse_ids: tuple[int, ...] = ()
    """Unused ids whose rows are trained too; nothing is resized for them."""
    frozen_dtype: Literal["same", "bf16", "float32"] = "same"
    """Dtype of the frozen weights while adapters (always float32) train; bf16 is faster and half the memory."""

    def __post_init__(self) -> None:
        checks = (
            ("mode", self.mode in ("lora", "full"), "lora or full"),
            ("r", self.r >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("frozen_dtype", self.frozen_dtype in FROZEN_DTYPES, "same, bf16 or float32"),
            (
                "frozen_dtype",
                self.mode == "lora" or self.frozen_dtype == "same",
                "same: mode full freezes nothing",
            ),
        )
        for name, good, wanted in checks:
            if not good:
                raise ConfigError(f"Tune.{name} is {getattr(self, name)!r}", cure=f"It must be {wanted}.")


class Tuning(ABC):
    """A model while it is trained. `system` shares the base's model object, changed until the context ends.

    It starts in eval mode; the training loop switches to train mode and back, so dropout never touches a measurement.
    """

    def __init__(self, base: Any, system: Any, vocabulary: Vocabulary | None) -> None:
        self.base, self.vocabulary = base.fingerprint, vocabulary
        # Its weights move at every step: no cache may take two moments of it for the same system.
        self.system = system.with_(fingerprint=f"training:{id(self):x}:{self.base}")
        self._open = True

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the model's order; a tied parameter once."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`parameters` by name."""
        return {name: p for name, p in self.system.model.named_parameters() if p.requires_grad}

    def row_parameters(self) -> list[nn.Parameter]:
        """Those of `parameters` that are vocabulary rows alone; none in mode "full", where the matrix is trained."""
        return []

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The system as it was when training began, new rows included, without gradient.

        For a term that compares with it step by step; one that needs it once is cheaper before `tuning`.
        """
        trained = [(parameter, parameter.data) for parameter, _ in self._originals()]
        try:
            for parameter, original in self._originals():
                parameter.data = original
            with torch.no_grad(), _uncached_autocast(self.system.device):
                yield self.system.with_(fingerprint=f"{self.system.fingerprint}:start")
        finally:
            for parameter, data in trained:
                parameter.data = data

    def finish(self, method: str) -> Adapter | Weights:
        """The artefact as trained so far, copied to the CPU; may be called more than once.

        Raises ModelError when nothing differs from the base.
        """
        if not self._open:
            raise ModelError("The tuning context has ended", cure="Call finish inside `with tuning(...)`.")
        artefact = self._collect(method)
        if artefact is None:
            raise ModelError(
                "The trained artefact changes nothing: no tensor differs from the base",
                where=f"fit of {method!r}",
                cure="Check that the learning rate is above 0 and that the loss reaches the trained parameters.",
            )
        return artefact

    def close(self) -> None:
        """Called at the end of the context."""
        self._open = False

    @abstractmethod
    def _originals(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with the values at which the model is the base."""

    @abstractmethod
    def _collect(self, method: str) -> Adapter | Weights | None: ...


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """The autocast in force, without its cache: it keeps low-precision copies of parameters whose values change here."""
    kind = device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)


class _LoraTuning(Tuning):
    def __init__(self, base: Any, system: Any, vocabulary: Vocabulary | None, tune: Tune, seed: int) -> None:
        super().__init__(base, system, vocabulary)
        model = system.model
        chosen = target_modules(model, tune.targets)
        self.config = _peft_config(model, tune, chosen, vocabulary)
        self.config["task_type"] = TASK_TYPES.get(base.kind)
        _inject(model, self.config, tune, seed)
        self.rows = train_rows(model, vocabulary) if vocabulary else {}
        self.start = vocabulary.start if vocabulary else {}
        trained = {id(p) for p in self.rows.values()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in trained or ".lora_" in name)
        fuse(model)

    def row_parameters(self) -> list[nn.Parameter]:
        """The rows of new and reused ids; a tied row once."""
        return list({id(row): row for row in self.rows.values()}.values())

    def _originals(self) -> list[tuple[nn.Parameter, Tensor]]:
        ups = [p for name, p in self.named_parameters().items() if ".lora_B." in name]
        starts = [(row, self.start[key].to(row)) for key, row in self.rows.items()]
        return [(up, torch.zeros_like(up)) for up in ups] + starts

    def _collect(self, method: str) -> Adapter | None:
        state = _lora_state(self.system.model)
        moved = any(bool(tensor.any()) for key, tensor in state.items() if ".lora_B." in key)
        if self.vocabulary is not None:
            homes = {"embeddings": self.vocabulary.embeddings, "head": self.vocabulary.head}
            for key, rows in self.rows.items():
                trained = rows.detach().cpu().clone()
                moved |= not torch.equal(trained, self.vocabulary.start[key].float())
                state[peft_rows_key(str(homes[key]))] = trained
        return Adapter(self.base, method, self.config, state, self.vocabulary) if moved else None


class _FullTuning(Tuning):
    def __init__(self, base: Any, system: Any, vocabulary: Vocabulary | None, tune: Tune) -> None:
        super().__init__(base, system, vocabulary)
        model = system.model
        names = set(target_parameters(model, tune.targets))
        names |= set(vocabulary.weights().values()) if vocabulary else set()
        self.before: dict[str, Tensor] = {}
        files = MappedFiles()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                self.before[name] = parameter.data
                parameter.data = parameter.data.clone()
                files.let_go(self.before[name])
        self.buffers = {name: buffer.clone() for name, buffer in kept_buffers(model).items()}

    def _originals(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(parameter, self.before[name]) for name, parameter in self.named_parameters().items()]

    def _collect(self, method: str) -> Weights | None:
        changed = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.named_parameters().items()
            if not torch.equal(parameter.data, self.before[name])
        }
        for name, buffer in kept_buffers(self.system.model).items():
            # Batch norm's running statistics move in training.
            if not torch.equal(buffer, self.buffers[name]):
                changed[name] = buffer.detach().cpu().clone()
        return Weights(self.base, method, changed, self.vocabulary) if changed else None


@contextlib.contextmanager
def tuning(system: Any, tune: Tune, run: Run) -> Iterator[Tuning]:
    """A `Tuning` of the system; on leaving, also after an error, the base is bit-identical again.

    Starting adapters and rows come from `run.seed`. Originals are kept beside the copies that train: out of memory
    where they are mapped from a file, until somebody reads them. Raises ConfigError for targets that match nothing.
    """
    need_model(system, "Training")
    vocabulary = plan_vocabulary(system, tune.new_tokens, tune.reuse_ids, run.seed)
    with preserved(system.model):
        dtype = FROZEN_DTYPES[tune.frozen_dtype]
        open_tuning = _start(system, tune, vocabulary, dtype, run.seed)
        try:
            yield open_tuning
        finally:
            open_tuning.close()


def _start(
    system: Any, tune: Tune, vocabulary: Vocabulary | None, dtype: torch.dtype | None, seed: int
) -> Tuning:
    fingerprint = system.fingerprint  # before the model changes: it may be a hash of the weights
    base = system.with_(fingerprint=fingerprint)
    model = system.model
    model.eval()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    grown = vocabulary.grow(base) if vocabulary else base
    if tune.mode == "full":
        return _FullTuning(base, grown, vocabulary, tune)
    files = MappedFiles()
    for parameter in model.parameters():
        if dtype not in (None, parameter.dtype) and parameter.is_floating_point():
            original = parameter.data
            parameter.data = original.to(dtype)
            files.let_go(original)
    return _LoraTuning(base, grown, vocabulary, tune, seed)


def _peft_config(
    model: nn.Module, tune: Tune, chosen: list[str], vocabulary: Vocabulary | None
) -> dict[str, Json]:
    """PEFT's adapter_config for what will be trained."""
    config: dict[str, Json] = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": tune.r,
        "lora_alpha": tune.alpha,
        "lora_dropout": tune.dropout,
        "bias": "none",
        "target_modules": suffixes(chosen, model),
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(name)) for name in chosen),
    }
    if vocabulary is not None:
        homes = [name for name in (vocabulary.embeddings, vocabulary.head) if name is not None]
        config["trainable_token_indices"] = {name: list(vocabulary.ids) for name in homes}
    return config


def _inject(model: nn.Module, config: dict[str, Json], tune: Tune, seed: int) -> None:
    """Put PEFT's layers into the model; float32 adapters, starting values from the seed."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=tune.r,
        lora_alpha=tune.alpha,  # type: ignore[arg-type]
        lora_dropout=tune.dropout,
        target_modules=config["target_modules"],
        fan_in_fan_out=config["fan_in_fan_out"],
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # a model with both kinds of linear layer
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)
    for name, module in model.named_modules():
        if ".lora_" in name:
            module.float()


def _lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors under the names PEFT saves them by."""
    return {
        PREFIX + name.replace(".default.", "."): parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
