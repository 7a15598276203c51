"""Checkpoints of training: resume equals never stopped, and damaged ones are noticed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from temper.core.errors import ConfigError, StoreError
from temper.core.types import Run
from temper.ops.train import TrainSettings

from .training_runs import rows, sft, tiny, weights_of


class KilledError(Exception):
    pass


def killed_at(step):
    def callback(done):
        if done == step:
            raise KilledError

    return callback


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_bit_identical_to_never_stopped(tmp_path, dropout):
    items = rows()
    config = TrainSettings(lr=1e-2, num_epochs=3, schedule="cosine", warmup_ratio=0.2, weight_decay=0.1)
    whole = tiny(torch.float32, dropout)
    log = sft(whole, items, Run(seed=5, batch_tokens=40), config)
    run = Run(seed=5, batch_tokens=40, folder=tmp_path, checkpoint_every=2)
    with pytest.raises(KilledError):
        sft(tiny(torch.float32, dropout), items, run, config, every=1, callback=killed_at(6))
    torch.rand(7)  # the world moved on
    resumed = tiny(torch.float32, dropout)
    nn.init.zeros_(resumed.lm_head.weight)  # the state comes from disk
    again = sft(resumed, items, replace(run, resume=True), config)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert (again.loss, again.lr, again.grad_norm) == (log.loss, log.lr, log.grad_norm)
    assert again.num_tokens == log.num_tokens


def test_resume_of_a_finished_run_trains_no_more(tmp_path):
    run, items = Run(folder=tmp_path, checkpoint_every=4), rows()
    first, second = tiny(), tiny()
    log = sft(first, items, run)
    again = sft(second, items, replace(run, resume=True))
    assert again.loss == log.loss
    assert torch.equal(weights_of(first), weights_of(second))


def test_resume_with_other_settings_is_refused(tmp_path):
    run, items = Run(folder=tmp_path, checkpoint_every=2), rows()
    sft(tiny(), items, run)
    with pytest.raises(ConfigError, match=r"another lr, seed"):
        sft(tiny(), items, replace(run, resume=True, seed=1), TrainSettings(lr=1e-3, num_epochs=2))


def test_a_new_run_forgets_old_checkpoints(tmp_path):
    run, items = Run(folder=tmp_path, checkpoint_every=2), rows(8)
    sft(tiny(), items, run, TrainSettings(max_steps=10))
    sft(tiny(), items, run, TrainSettings(max_steps=2))
    assert [path.name for path in run.checkpoint.iterdir()] == ["step-00000002"]


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(
        content[: len(content) // 2] if how == "cut" else bytes([content[-1] ^ 1]).join([content[:-1], b""])
    )


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_checkpoint_falls_back_and_ends_the_same(tmp_path, name, how, caplog):
    items, run = rows(), Run(folder=tmp_path, checkpoint_every=2)
    whole = tiny(torch.float32)
    sft(whole, items, Run())
    sft(tiny(torch.float32), items, run)
    damage(run.checkpoint / "step-00000006" / name, how)
    resumed = tiny(torch.float32)
    sft(resumed, items, replace(run, resume=True))
    assert "damaged checkpoint" in caplog.text
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_only_damaged_checkpoints_say_what_to_do(tmp_path):
    items, run = rows(), Run(folder=tmp_path, checkpoint_every=2)
    sft(tiny(), items, run)
    for path in run.checkpoint.glob("*/state.safetensors"):
        damage(path, "cut")
    with pytest.raises(StoreError, match=r"None of the 2 checkpoints.*Delete this folder"):
        sft(tiny(), items, replace(run, resume=True))
