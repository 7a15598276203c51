"""One training step after another: which items, which micro-batches, what is logged and kept on disk."""

from __future__ import annotations

import dataclasses
import math
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, DataError, NumericsError
from temper.core.types import Json, Run
from temper.ops import checkpoint
from temper.ops.micro_batch import part_loss, split
from temper.ops.objectives import Objective
from temper.ops.optim import lr_factor, set_lr
from temper.ops.processes import processes
from temper.ops.train_settings import TrainLog, TrainSettings

__all__ = ["Loop", "Plan"]

Item = TypeVar("Item")


class Plan(Generic[Item]):
    """Which items each step takes, as a function of the seed and the step alone."""

    def __init__(
        self, epoch_items: Callable[[int], Sequence[Item]], settings: TrainSettings, seed: int
    ) -> None:
        self.epoch_items, self.settings, self.seed = epoch_items, settings, seed
        self.epoch = -1
        self.ordered: list[Item] = []
        self.num_items = 0
        self._open(0)
        self.num_items = len(self.ordered)
        if not self.num_items:
            raise DataError("There is nothing to train on", cure="Give the training part at least one row.")
        self.steps_per_epoch = math.ceil(self.num_items / settings.batch_rows)
        self.num_steps = settings.max_steps or math.ceil(settings.num_epochs * self.steps_per_epoch)

    def _open(self, epoch: int) -> None:
        items = self.epoch_items(epoch)
        if epoch and len(items) != self.num_items:
            raise DataError(f"Epoch {epoch} has {len(items)} items and epoch 0 has {self.num_items}")
        order = list(range(len(items)))
        if self.settings.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        self.epoch, self.ordered = epoch, [items[place] for place in order]

    def items(self, step: int) -> list[Item]:
        """The items of step 0, 1, ...; an epoch's last step may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self._open(epoch)
        return self.ordered[place * self.settings.batch_rows : (place + 1) * self.settings.batch_rows]


class Loop(Generic[Item]):
    """The state that steps change: parameters, optimiser, log."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective[Item],
        settings: TrainSettings,
        run: Run,
        plan: Plan[Item],
        length: Callable[[Item], int],
    ) -> None:
        self.model, self.parameters, self.optimizer = model, parameters, optimizer
        self.objective, self.settings, self.run, self.plan, self.length = (
            objective,
            settings,
            run,
            plan,
            length,
        )
        self.procs = processes(run)
        self.log = TrainLog()
        self.pending: list[dict[str, Tensor]] = []
        self.is_cpu = parameters[0].device.type == "cpu"
        self.began = time.monotonic()
        self.procs.share(parameters)
        set_lr(optimizer, 1.0)

    def is_paid(self, step: int) -> bool:
        """Whether the budget has room for all of this step, in every process; else training ends here."""
        items = self.plan.items(step)
        budget, tokens = self.run.budget, sum(self.length(item) for item in items)
        refused = torch.tensor(float(not budget.allows(steps=1, queries=len(items), tokens=tokens)))
        if "seconds" in budget.limits and self.procs.num > 1:
            refused = self.procs.sum_(refused.to(self.parameters[0].device))
        if not refused:
            budget.spend(steps=1, queries=len(items), tokens=tokens)
            return True
        if not step:
            raise ConfigError(
                f"The budget of {budget.limits[budget.stopped_by]:g} {budget.stopped_by} does not pay for one step",
                where=f"training on {len(items)} rows of {tokens} tokens a step",
                cure="Raise it, or lower batch_rows.",
            )
        self._fetch()
        self._cost()
        return False

    def step(self, step: int) -> None:
        """One optimiser step over all items of `step`."""
        items = self.plan.items(step)
        counts = {name: float(count) for name, count in self.objective.counts(items).items()}
        totals = self._backward(step, items, counts)
        self.procs.sum_gradients(self.parameters)
        limit = self.settings.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], limit)
        values = self._values(totals, counts, norm)
        self.pending.append(values)
        if self.is_cpu:
            # Reading costs nothing here, so bad gradients never reach the weights.
            self._fetch()
        factor = lr_factor(step, self.plan.num_steps, self.settings.schedule, self.settings.warmup_ratio)
        set_lr(self.optimizer, factor)
        self.log.lr.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, step: int, items: Sequence[Item], counts: Mapping[str, float]) -> dict[str, Tensor]:
        """Add this process's share of the step's gradient; gives each term's summed loss."""
        device, seen = self.parameters[0].device, dict.fromkeys(counts, 0.0)
        totals = {name: torch.zeros((), device=device, dtype=torch.float64) for name in counts}
        for index, places in enumerate(self._split(items)):
            if not self.procs.owns(index):
                continue
            _seed(self.run.seed, step, index, device)
            part = [items[place] for place in places]
            with part_loss(
                self.model, self.objective, part, counts, self.run, length=self.length, device=device
            ) as (terms, loss):
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            for name, term in terms.items():
                totals[name] = totals[name] + term.total.detach().double()
                seen[name] += float(term.count)
        if self.procs.num == 1:
            _check_counts(seen, counts)
        if step == 0 and self.procs.num == 1 and all(p.grad is None for p in self.parameters):
            raise ConfigError(
                "No trained parameter takes part in the loss", cure="Check the names of the layers to train."
            )
        return totals

    def _split(self, items: Sequence[Item]) -> list[list[int]]:
        """The step's micro-batches as places in `items`, the same in every process."""
        lengths = [self.length(item) for item in items]
        self.log.num_tokens += sum(lengths)
        return split(self.model, self.objective, lengths, self.run, self.parameters[0].device)

    def _values(
        self, totals: Mapping[str, Tensor], counts: Mapping[str, float], norm: Tensor
    ) -> dict[str, Tensor]:
        """The step's numbers, left on the device: the loss, the norm and each term's mean."""
        weights, means = self.objective.weights, {}
        loss = torch.zeros_like(norm, dtype=torch.float64)
        for name in sorted(totals):
            total = self.procs.sum_(totals[name])
            means[f"term {name}"] = total / counts[name] if counts[name] else torch.full_like(loss, math.nan)
            if counts[name]:
                loss = loss + weights[name] * means[f"term {name}"]
        return {"loss": loss, "norm": norm, **means}

    def _fetch(self) -> None:
        """Move pending numbers into the log; raises NumericsError at the first that is not finite."""
        for values in self.pending:
            names = list(values)
            numbers = dict(
                zip(names, torch.stack([values[name].double() for name in names]).tolist(), strict=True)
            )
            if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"])):
                raise self._not_finite(numbers)
            self.log.loss.append(numbers["loss"])
            self.log.grad_norm.append(numbers["norm"])
            for name in names[2:]:
                column = self.log.terms.setdefault(name.removeprefix("term "), [])
                column.extend([math.nan] * (self.log.num_steps - 1 - len(column)))
                column.append(numbers[name])
        self.pending.clear()

    def _not_finite(self, numbers: Mapping[str, float]) -> NumericsError:
        last = f"{self.log.loss[-1]:.4g}" if self.log.loss else "none"
        return NumericsError(
            f"The loss is {numbers['loss']} and the gradient norm {numbers['norm']}; the last finite loss was {last}",
            where=f"training step {self.log.num_steps}",
            cure=f"Lower lr (now {self.settings.lr:g}) or clip_norm (now {self.settings.clip_norm:g}), raise "
            "warmup_ratio, or train in float32.",
        )

    def after_step(self, done: int, stop_when: Callable[[TrainLog], bool] | None) -> bool:
        """Fetch, checkpoint and say whether to stop."""
        is_last = done == self.plan.num_steps
        keeps = bool(self.run.checkpoint_every and self.run.checkpoint)
        is_mark = done % self.settings.log_every == 0
        if is_mark or is_last or (keeps and done % self.run.checkpoint_every == 0):
            self._fetch()
            self._cost()
        if is_mark and stop_when is not None and stop_when(self.log):
            self.log.stopped_early = True
        if keeps and (done % self.run.checkpoint_every == 0 or is_last or self.log.stopped_early):
            self._save(done)
        return self.log.stopped_early

    def _cost(self) -> None:
        now = time.monotonic()
        self.log.wall_s, self.began = self.log.wall_s + now - self.began, now
        if self.is_cpu:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            peak = torch.cuda.max_memory_allocated(self.parameters[0].device)
        self.log.peak_memory_bytes = max(self.log.peak_memory_bytes, peak)

    def _identity(self) -> dict[str, Json]:
        """What must be equal for a checkpoint to fit this run."""
        run = self.run
        return {
            **dataclasses.asdict(self.settings),
            "betas": list(self.settings.betas),
            "num_steps": self.plan.num_steps,
            "num_items": self.plan.num_items,
            "seed": run.seed,
            "precision": run.precision,
            "exact": run.exact,
            "batch_tokens": run.batch_tokens,
            "num_procs": run.num_procs,
            "shapes": [list(p.shape) for p in self.parameters],
        }

    def _save(self, done: int) -> None:
        assert self.run.checkpoint is not None
        if self.procs.is_first:
            moments, facts = checkpoint.pack_optimizer(self.optimizer)
            weights = {f"parameter/{index}": p.data for index, p in enumerate(self.parameters)}
            weights |= {
                f"buffer/{name}": value for name, value in checkpoint.kept_buffers(self.model).items()
            }
            body = {"identity": self._identity(), "optimizer": facts, "log": dataclasses.asdict(self.log)}
            checkpoint.save(self.run.checkpoint, checkpoint.State(done, {**weights, **moments}, body))
        self.procs.wait()

    def resume(self) -> int:
        """The step to go on from: 0, or the checkpoint's, whose state is then in place."""
        folder = self.run.checkpoint
        if folder is None or not folder.exists():
            return 0
        if not self.run.resume:
            if self.procs.is_first:
                checkpoint.clear(folder)
            self.procs.wait()
            return 0
        state = checkpoint.load(folder)
        if state is None:
            return 0
        self._check_identity(state.facts["identity"])
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(state.tensors[f"parameter/{index}"])
            for name, buffer in checkpoint.kept_buffers(self.model).items():
                buffer.copy_(state.tensors.get(f"buffer/{name}", buffer))
        checkpoint.unpack_optimizer(self.optimizer, state.tensors, state.facts["optimizer"])
        self.log = TrainLog(**state.facts["log"])
        rows = sum(len(self.plan.items(step)) for step in range(state.step)) if self.run.budget.limits else 0
        self.run.budget.spend(
            steps=state.step, queries=rows, tokens=self.log.num_tokens, seconds=self.log.wall_s
        )
        return self.plan.num_steps if self.log.stopped_early else state.step

    def _check_identity(self, stored: Mapping[str, Json]) -> None:
        mine = self._identity()
        differing = sorted(key for key in mine if stored.get(key) != mine[key])
        if differing:
            raise ConfigError(
                f"The checkpoint was made with another {', '.join(differing)}",
                where=str(self.run.checkpoint),
                cure="Give the same settings, or start anew without --resume.",
            )


def _seed(seed: int, step: int, index: int, device: torch.device) -> None:
    """Seed dropout and whatever else an objective draws, for one micro-batch."""
    drawn = random.Random(f"{seed}/{step}/{index}").getrandbits(63)
    random.seed(drawn)
    # torch.manual_seed formats a stack trace for every accelerator that is not there.
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)


def _check_counts(seen: Mapping[str, float], counts: Mapping[str, float]) -> None:
    for name, count in counts.items():
        if not math.isclose(seen[name], count, rel_tol=1e-6):
            raise ConfigError(
                f"The loss term {name!r} counted {seen[name]:g} over the micro-batches and announced {count:g}"
            )
