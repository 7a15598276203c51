"""What a run will cost: tokens counted from characters, speed that a busy machine does not spoil."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from temper.core.spec import SystemSpec
from temper.core.types import Message
from temper.data.assets import fetch
from temper.data.loading import load_data
from temper.run import estimate, speed, workload
from temper.run.options import Options
from temper.run.plan import Request, make_plan

PEAK = 4e11


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(estimate, "flops_per_s", lambda device, precision: PEAK)


def costs(source="refusal-tokens", **request):
    """Costs of the fit and of the measure of one arm."""
    request = {"arms": ("category",), **request}
    return estimate.estimate(make_plan(Request(source=source, **request)))


def test_tokens_by_hand():
    assert workload.text_tokens("twelve chars") == 3
    assert workload.text_tokens("") == 0
    assert workload.text_tokens("漢字") == round(2 / 4 + 4 / 2)
    assert workload._tokens((Message("user", "12345678"), Message("assistant", "1234"))) == 2 + 1 + 12


@pytest.mark.parametrize("name", ["noncompliance", "behaviours"])
def test_tokens_are_near_those_of_a_real_tokenizer(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m"))
    data = load_data(f"builtin:{name}", limit=60)
    texts = [str(value) for part in data for record in data[part] for value in texts_of(record)]
    real = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert sum(map(workload.text_tokens, texts)) == pytest.approx(real, rel=0.3)


def texts_of(record):
    return [m.content for m in record.messages] if hasattr(record, "messages") else [record.prompt]


def test_a_fit_trains_on_its_rows_once_an_epoch_and_writes_nothing(fast):
    def work(**settings):
        sets = tuple(f"refuse.{key}={value}" for key, value in settings.items())
        step = make_plan(Request(source="refusal-tokens", arms=("category",), sets=sets)).steps[0]
        return workload.work_of(step)

    few, many = work(max_train_rows=100), work(max_train_rows=200)
    assert few.written == few.num_replies == 0
    assert many.trained == pytest.approx(2 * few.trained, rel=0.01)
    assert work(max_train_rows=100, num_epochs=3).trained == pytest.approx(3 * few.trained, rel=0.01)
    assert work(max_train_rows=100, max_tokens=10).trained == 1000
    assert few.read == many.read > 0  # the calibration part
    assert work(max_train_rows=0).trained > 8 * many.trained


def test_a_fit_of_few_rows_takes_its_least_number_of_steps(fast):
    def trained(**settings):
        sets = tuple(f"unlearn.{key}={value}" for key, value in settings.items())
        return workload.work_of(make_plan(Request(source="npo", recipe="tiny", sets=sets)).steps[1]).trained

    assert trained(min_steps=60) == pytest.approx(2 * trained(min_steps=30), rel=0.01)
    assert trained(min_steps=30) > trained(min_steps=0) > 0


def test_a_measure_reads_prompts_and_writes_replies_of_bounded_length(fast):
    def work(bound):
        plan = make_plan(
            Request(source="refusal-tokens", arms=("category",), sets=(f"test.reply_tokens={bound}",))
        )
        return workload.work_of(plan.steps[1])

    assert work(10).num_replies == 358
    assert work(10).written == 3580
    assert work(5000).written == 358 * workload.LONGEST_REPLY
    assert work(10).trained == 0


def test_the_small_recipe_of_the_flagship_is_minutes_on_two_cores(fast):
    fit, test = costs()
    assert 40 < fit.seconds < 200
    assert 25 < test.seconds < 150


def test_full_training_costs_more_than_an_adapter_and_writing_more_than_reading(fast):
    lora, test = costs()
    full, _ = costs(sets=("refuse.mode=full",))
    assert full.seconds > 1.3 * lora.seconds
    assert full.memory_bytes > 1.5 * lora.memory_bytes > 2e9
    step = make_plan(Request(source="refusal-tokens", arms=("category",))).steps[1]
    work = workload.work_of(step)
    read = work._replace(read=work.total, written=0, num_replies=0)
    seconds = [estimate._seconds(step, w, 10**8, PEAK, Options()) for w in (read, work)]
    assert seconds[0] < seconds[1] < test.seconds


def test_many_rows_at_once_bound_a_fast_machines_decoding():
    step = make_plan(Request(source="refusal-tokens", arms=("category",))).steps[1]
    work = workload.Work(0, 0, 6400, 100)
    wide, narrow = (
        estimate._seconds(step, work, 10**8, 1e20, Options(batch_tokens=n)) - estimate.LOAD_S
        for n in (65 * 100, 65)
    )
    assert wide == pytest.approx(64 / speed.STEPS_PER_S, rel=0.01)
    assert narrow == pytest.approx(100 * wide, rel=0.01)


def test_the_speed_is_the_best_of_many_and_threads_come_back(monkeypatch):
    before = torch.get_num_threads()
    seen = []
    tries = iter([5.0, 0.002] + [7.0] * 100)

    def timed(rows, weight):
        seen.append(torch.get_num_threads())
        return next(tries)

    speed.flops_per_s.cache_clear()
    monkeypatch.setattr(speed, "_seconds", timed)
    found = speed.flops_per_s("cpu", "float32")
    speed.flops_per_s.cache_clear()
    gain = 1 + speed.PARALLEL * (before - 1)
    assert found == pytest.approx(2 * 128 * 576 * 1536 / 0.002 * gain)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_the_probe_is_quick_and_plausible():
    speed.flops_per_s.cache_clear()
    start = time.perf_counter()
    found = speed.flops_per_s("cpu", "float32")
    assert time.perf_counter() - start < 5
    assert 1e8 < found < 1e14


def test_steps_on_made_data_are_of_unknown_length(methods, pipeline):
    from temper.cli.plan import describe_cost

    plan = make_plan(Request(source=pipeline))
    known = estimate.Cost("a", "a", 1, 1, 60.0, 1, 1)
    assert "60 s," in describe_cost([known])
    said = describe_cost([known, replace_seconds(known), replace_seconds(known)])
    assert "60 s and 2 steps of unknown length" in said
    assert "guess: unknown," in describe_cost([replace_seconds(known)])
    assert all(cost.seconds == 0 for cost in estimate.estimate(plan))  # none of them uses a model
    waiting = replace(plan.steps[1], system=SystemSpec("smollm2-135m"))
    assert estimate._step_cost(waiting, Options()).seconds is None
    assert workload.work_of(waiting) == (0, 0, 0, 0)


def replace_seconds(cost):
    return cost._replace(seconds=None)
