"""What a training run is told and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from temper.core.errors import ConfigError
from temper.ops.optim import Schedule

__all__ = ["TrainLog", "TrainSettings"]

RECIPE = "Change it in the recipe or with --set."


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how fast and how smoothly to train."""

    lr: float = 1e-4
    """Peak learning rate."""
    num_epochs: float = 1.0
    """Times round the data."""
    max_steps: int = 0
    """Optimiser steps, going round the data as often as they need; 0 = as many as `num_epochs` gives."""
    batch_rows: int = 8
    """Items of one optimiser step; memory is bounded by the run's token budget, not by this."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant, linear or cosine down to 0."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices; norms and biases are spared."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's divisor floor."""
    shuffle: bool = True
    """New order of the items in every epoch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    log_every: int = 10
    """Steps between fetches of losses from the device and calls of `stop_when`."""

    def __post_init__(self) -> None:
        for name in ("lr", "num_epochs", "batch_rows", "log_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}", cure=RECIPE)
        for name in ("max_steps", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}", cure=RECIPE)
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be in [0, 1], not {self.warmup_ratio}", cure=RECIPE)


@dataclass
class TrainLog:
    """What training did: a value for each optimiser step, and what it cost."""

    loss: list[float] = field(default_factory=list)
    """Weighted sum of the terms, each a mean over its count."""
    terms: dict[str, list[float]] = field(default_factory=dict)
    """Each term's mean, unweighted; NaN where a step had none of it."""
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    """Before clipping."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """What the callback returned, each with its "step"."""
    num_tokens: int = 0
    """Tokens trained on, padding not counted."""
    wall_s: float = 0.0
    peak_memory_bytes: int = 0
    """Of the process, or of the accelerator where there is one."""
    stopped_early: bool = False
    """Whether `stop_when` ended it; what a budget ended stands in the budget."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps done."""
        return len(self.loss)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second."""
        return self.num_tokens / self.wall_s if self.wall_s else 0.0
