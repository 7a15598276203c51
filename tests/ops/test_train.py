"""The training loop: any split gives one gradient, a bad number stops, and what a step and the log hold."""

import copy
import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from temper.core.errors import ConfigError, DataError, NumericsError
from temper.core.types import Run
from temper.ops.train import SftObjective, SumCount, TrainSettings, train

from .training_runs import TwoTerms, rows, sft, size_of, tiny, weights_of


@pytest.mark.parametrize("run", [Run(batch_tokens=1), Run(batch_tokens=30), Run(exact=True)])
def test_one_by_eight_equals_eight_by_one(run):
    whole, split, items = tiny(), tiny(), rows()
    log = sft(whole, items, Run(batch_tokens=10**6))
    other = sft(split, items, run)
    torch.testing.assert_close(weights_of(split), weights_of(whole), atol=1e-8, rtol=0)
    torch.testing.assert_close(other.loss, log.loss, atol=1e-8, rtol=0)
    assert other.num_tokens == log.num_tokens == 2 * sum(size_of(item) for item in items)


def test_equals_a_plain_loop_of_torch():
    ours, plain, items = tiny(), tiny(), rows(8)
    config = TrainSettings(lr=1e-2, max_steps=5, clip_norm=0, shuffle=False, schedule="linear")
    log = sft(ours, items, Run(batch_tokens=40), config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(5):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for item in items:
            ids = torch.tensor(item.ids)
            logp = plain(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            total = total - logp[torch.tensor(item.scored[1:])].sum()
            count += sum(item.scored)
        losses.append((total / count).item())
        (total / count).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(log.loss, losses, atol=1e-8, rtol=0)
    torch.testing.assert_close(weights_of(ours), weights_of(plain), atol=1e-8, rtol=0)
    assert log.loss[-1] < log.loss[0]


def test_several_terms_each_have_their_own_count():
    whole, split, items = tiny(), tiny(), rows(20)
    config = TrainSettings(lr=1e-2, batch_rows=3)
    log = sft(whole, items, Run(batch_tokens=10**6), config, TwoTerms())
    other = sft(split, items, Run(batch_tokens=1), config, TwoTerms())
    torch.testing.assert_close(weights_of(split), weights_of(whole), atol=1e-8, rtol=0)
    for step, (loss, long, short) in enumerate(
        zip(log.loss, log.terms["long"], log.terms["short"], strict=True)
    ):
        known = [weight * value for weight, value in ((1.0, long), (0.3, short)) if value == value]
        assert loss == pytest.approx(sum(known)), step
    assert any(
        value != value for value in log.terms["long"] + log.terms["short"]
    )  # a step without one of them
    torch.testing.assert_close(other.terms, log.terms, atol=1e-8, rtol=0, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 5)), min_size=1, max_size=9), st.integers(1, 12))
def test_any_split_gives_the_same_step(items, budget):
    class Pull:
        weights = {"pull": 1.0}  # noqa: RUF012

        def counts(self, items):
            return {"pull": float(sum(size for _, size in items))}

        def __call__(self, model, items):
            total = sum(size * (model.weight[0, 0] - value) ** 2 for value, size in items)
            return {"pull": SumCount(total, sum(size for _, size in items))}

    model = nn.Linear(1, 1, bias=False).double()
    before = model.weight.item()
    config = TrainSettings(lr=0.5, max_steps=1, batch_rows=9, clip_norm=0)
    log = train(
        model,
        model.parameters(),
        lambda epoch: items,
        Pull(),
        config,
        Run(batch_tokens=budget),
        length=lambda item: item[1],
        build_optimizer=lambda chosen: torch.optim.SGD(chosen, lr=0.5),
    )
    # Gradient descent on a weighted mean of squares with rate 1/2 jumps to the weighted mean.
    count = sum(size for _, size in items)
    mean = sum(value * size for value, size in items) / count
    assert model.weight.item() == pytest.approx(mean, abs=1e-9)
    assert log.loss[0] == pytest.approx(
        sum(size * (before - value) ** 2 for value, size in items) / count, abs=1e-6
    )


@dataclass(frozen=True)
class Exploding(SftObjective):
    at: int = 4
    calls: list = field(default_factory=list)

    def __call__(self, model, items):
        self.calls.append(1)
        nll = super().__call__(model, items)["nll"]
        return {"nll": SumCount(nll.total * (float("nan") if len(self.calls) > self.at else 1.0), nll.count)}


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_the_disk(tmp_path):
    model, run = tiny(), Run(folder=tmp_path, checkpoint_every=5)
    with pytest.raises(
        NumericsError, match=r"loss is nan.*last finite loss was 3\..*step 4.*Lower lr \(now 0.01\)"
    ):
        sft(model, rows(), run, TrainSettings(lr=1e-2, num_epochs=4), Exploding(0))
    assert torch.isfinite(weights_of(model)).all()
    assert not list(tmp_path.glob("checkpoint/*"))


def test_clipping_bounds_what_a_step_moves():
    free, clipped = tiny(), tiny()
    config = TrainSettings(lr=1e-2, max_steps=1, clip_norm=0)
    sgd = {"build_optimizer": lambda chosen: torch.optim.SGD(chosen, lr=1.0)}
    log = sft(free, rows(), Run(), config, **sgd)
    sft(clipped, rows(), Run(), replace(config, clip_norm=0.01), **sgd)
    before = weights_of(tiny())
    assert (weights_of(free) - before).norm().item() == pytest.approx(log.grad_norm[0], rel=1e-6)
    assert (weights_of(clipped) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_epochs_have_their_own_order_and_the_seed_decides_it():
    seen = []

    class Watch(SftObjective):
        def counts(self, items):
            seen.append([item.ids for item in items])
            return super().counts(items)

    def order(seed, shuffle=True):
        seen.clear()
        sft(
            tiny(),
            rows(12),
            Run(seed=seed),
            TrainSettings(num_epochs=2, batch_rows=5, shuffle=shuffle),
            Watch(0),
        )
        flat = [ids for step in seen for ids in step]
        return flat[:12], flat[12:]

    plain = [item.ids for item in rows(12)]
    first, second = order(0)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second
    assert order(0) == (first, second)
    assert order(1)[0] != first
    assert order(0, shuffle=False) == (plain, plain)


def test_a_fraction_of_an_epoch_and_a_number_of_steps():
    assert sft(tiny(), rows(24), Run(), TrainSettings(num_epochs=0.5)).num_steps == 2
    assert sft(tiny(), rows(24), Run(), TrainSettings(num_epochs=1, max_steps=7)).num_steps == 7


def test_nothing_to_train_on_and_nothing_to_train():
    with pytest.raises(DataError, match="nothing to train on"):
        sft(tiny(), [], Run())
    model = tiny().requires_grad_(False)
    with pytest.raises(ConfigError, match="No parameter is trainable"):
        sft(model, rows(), Run())


def test_a_parameter_outside_the_loss_stops():
    other = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="takes part in the loss"):
        train(
            tiny().requires_grad_(False), other.parameters(), lambda e: rows(), SftObjective(0), TrainSettings(), Run(),
            length=size_of,
        )  # fmt: skip


def test_an_objective_that_cannot_be_split_is_not():
    class Whole(SftObjective):
        unsplittable = True

        def __call__(self, model, items):
            calls.append(len(items))
            return super().__call__(model, items)

    calls = []
    sft(tiny(), rows(16), Run(batch_tokens=8 * 14), objective=Whole(0))
    assert calls == [8, 8, 8, 8]
    with pytest.raises(ConfigError, match=r"cannot be split.*Raise batch_tokens"):
        sft(tiny(), rows(16), Run(batch_tokens=50), objective=Whole(0))


def test_counts_that_disagree_are_refused():
    class Wrong(SftObjective):
        def counts(self, items):
            return {"nll": 1.0}

    with pytest.raises(ConfigError, match=r"counted \d+ over the micro-batches and announced 1"):
        sft(tiny(), rows(), Run(), objective=Wrong(0))


def test_a_term_without_weight_is_refused():
    with pytest.raises(ConfigError, match="'nll' has no weight"):
        sft(tiny(), rows(), Run(), objective=SftObjective(0, weights={}))


def test_bf16_trains_float32_weights_to_a_near_loss():
    low, full = tiny(torch.float32), tiny(torch.float32)
    logs = [
        sft(model, rows(), Run(precision=precision))
        for model, precision in ((low, "bf16"), (full, "float32"))
    ]
    assert weights_of(low).dtype is torch.float32
    assert logs[0].loss != logs[1].loss
    assert logs[0].loss[-1] == pytest.approx(logs[1].loss[-1], abs=0.1)


def test_activation_checkpointing_changes_no_number():
    plain, lean, items = tiny(), tiny(), rows()
    sft(plain, items, Run())
    sft(lean, items, Run(), TrainSettings(lr=1e-2, num_epochs=2, gradient_checkpointing=True))
    torch.testing.assert_close(weights_of(lean), weights_of(plain), atol=1e-10, rtol=0)
    assert not lean.is_activation_checkpointing


def test_every_module_keeps_its_mode():
    model = tiny().eval()
    model.model.norm.train()
    modes = [module.training for module in model.modules()]
    seen = []
    config = TrainSettings(lr=1e-2, gradient_checkpointing=True)
    sft(model, rows(8), Run(), config, every=1, callback=lambda done: seen.append(model.model.norm.training))
    assert [module.training for module in model.modules()] == modes
    assert seen == [False]


def test_parameters_may_be_named():
    model, config = tiny(), TrainSettings(lr=1e-2)
    head = dict(model.lm_head.named_parameters())
    before = model.model.norm.weight.clone()
    train(model, head, lambda e: rows(8), SftObjective(0), config, Run(), length=size_of)
    assert torch.equal(model.model.norm.weight, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, tiny().lm_head.weight)


def test_callback_runs_in_eval_mode_and_fills_the_curve(tmp_path):
    model, modes = tiny().eval(), []

    def callback(done):
        modes.append(model.training)
        return {"margin": done / 2}

    log = sft(model, rows(), Run(), every=3, callback=callback)
    assert modes == [False, False]
    assert log.curve == [{"step": 3, "margin": 1.5}, {"step": 6, "margin": 3.0}]
    assert not model.training


def test_stop_when_ends_early_and_stays_ended(tmp_path):
    config, run = TrainSettings(lr=1e-2, max_steps=9, log_every=2), Run(folder=tmp_path, checkpoint_every=100)
    model, again = tiny(), tiny()
    log = sft(model, rows(), run, config, stop_when=lambda log: log.num_steps >= 4)
    assert (log.num_steps, log.stopped_early) == (4, True)
    assert sft(again, rows(), replace(run, resume=True), config).num_steps == 4
    assert torch.equal(weights_of(model), weights_of(again))


def test_before_step_may_change_the_weights_of_terms():
    objective = TwoTerms()

    def before(step):
        objective.weights = {"long": 1.0, "short": float(step)}

    log = sft(tiny(), rows(16), Run(), TrainSettings(max_steps=2), objective, before_step=before)
    assert log.loss[0] == pytest.approx(log.terms["long"][0])
    assert log.loss[1] == pytest.approx(log.terms["long"][1] + log.terms["short"][1])


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(3)
    random.seed(3)
    wanted = (torch.rand(2).tolist(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    sft(tiny_made := copy.deepcopy(TINY), rows(), Run())
    assert (torch.rand(2).tolist(), random.random()) == wanted
    assert tiny_made is not TINY


TINY = tiny()


def test_the_log_says_what_it_cost():
    log = sft(tiny(), rows(), Run())
    assert log.wall_s > 0
    assert log.tokens_per_s == pytest.approx(log.num_tokens / log.wall_s)
    assert log.peak_memory_bytes > 10**6


def test_settings_refuse_nonsense():
    nonsense = ({"lr": 0}, {"lr": math.nan}, {"batch_rows": 0}, {"warmup_ratio": 1.5}, {"num_epochs": -1})
    for bad in (*nonsense, {"clip_norm": -1}, {"weight_decay": -0.1}, {"max_steps": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TrainSettings(**bad)


def test_short_rows_on_a_cpu_train_on_plain_attention_with_the_same_gradients() -> None:
    from torch.nn.functional import scaled_dot_product_attention

    from temper.ops.precision import SHORT_ROW, short_attention

    torch.manual_seed(0)
    given = [torch.randn(2, 3, 12, 8, requires_grad=True) for _ in range(3)]
    found = []
    for longest in (SHORT_ROW, SHORT_ROW + 1):
        with short_attention("cpu", longest):
            out = scaled_dot_product_attention(*given, is_causal=True)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
