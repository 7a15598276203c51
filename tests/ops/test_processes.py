"""Two processes train as one: same curve, same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.ops.processes import Processes, processes

TRAINER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.train import SftObjective, TrainSettings, train

num_procs, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=37, attention_dropout=0.2, attn_implementation="eager", **shape))
model.double().train()
rows = [Example([i, 3, 5, 7 + i, 2][: 3 + i % 3], [False, True, True, True, True][: 3 + i % 3]) for i in range(13)]
run = Run(num_procs=num_procs, batch_tokens=8, folder=folder, checkpoint_every=2, resume=len(sys.argv) > 3)
settings = TrainSettings(lr=1e-2, max_steps=6, batch_rows=5)
if len(sys.argv) > 3:
    torch.nn.init.zeros_(model.lm_head.weight)
log = train(model, model.parameters(), lambda e: rows, SftObjective(0), settings, run, length=lambda e: len(e.ids))
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
import os
out = {"loss": log.loss, "norm": log.grad_norm, "weights": weights.tolist()}
(folder / f"out-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(out))
if num_procs > 1:
    torch.distributed.destroy_process_group()
"""


def launch(num_procs, folder, *more):
    folder.mkdir(exist_ok=True)
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(num_procs):
        place = (
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_procs)}
            if num_procs > 1
            else {}
        )
        env = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        if num_procs > 1:
            env["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, str(script), str(num_procs), str(folder), *more]
        children.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for child in children:
            _, err = child.communicate(timeout=120)
            assert child.returncode == 0, err
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(num_procs)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path):
    (alone,) = launch(1, tmp_path / "one")
    first, second = launch(2, tmp_path / "two")
    assert first == second
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-9)
    assert first["norm"] == pytest.approx(alone["norm"], abs=1e-9)
    assert first["weights"] == pytest.approx(alone["weights"], abs=1e-8)
    for late in (tmp_path / "two" / "checkpoint").glob("step-00000006"):
        (late / "state.json").write_text("cut")  # falls back to step 4 and goes on
    resumed, _ = launch(2, tmp_path / "two", "resume")
    assert resumed == first


def test_one_process_needs_nothing():
    assert processes(Run()) == Processes(0, 1)
    assert Processes().owns(7)


def test_work_is_shared_out():
    pair = [Processes(0, 2), Processes(1, 2)]
    assert [[place.owns(index) for index in range(4)] for place in pair] == [
        [True, False] * 2,
        [False, True] * 2,
    ]
    assert [place.is_first for place in pair] == [True, False]


def test_processes_that_were_not_started_are_missed(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"wants 3 processes and there are 1.*--nproc 3"):
        processes(Run(num_procs=3))
