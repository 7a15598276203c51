"""Fine-tuning for as long as a block lasts."""

import pytest
import torch

from temper.artefacts import Tune
from temper.artefacts.fine_tuning import fine_tuned
from temper.core.errors import DataError
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.train import TrainSettings
from temper.systems.loading import load_base

ROWS = [Example([5, 6, 7, 8], [False, True, True, True]), Example([9, 10], [False, True])]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_looks_come_on_the_way_and_the_base_comes_back(mode):
    system = load_base("tiny:llama")
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    seen = []
    settings = TrainSettings(lr=1e-2, max_steps=4, batch_rows=2)

    def look(tuned, step):
        seen.append((step, tuned.fingerprint != system.fingerprint))
        return {"here": float(step)}

    tune = Tune(mode=mode, r=2, alpha=4.0)
    with fine_tuned(system, ROWS, tune, settings, Run(), every=2, look=look) as done:
        assert done.log.loss[-1] < done.log.loss[0]
        artefact = done.tuned.finish("test")
    assert artefact.kind == ("adapter" if mode == "lora" else "weights")
    assert seen == [(2, True), (4, True)]
    assert [point["here"] for point in done.log.curve] == [2.0, 4.0]
    after = system.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_rows_are_refused():
    with (
        pytest.raises(DataError, match="nothing to train on"),
        fine_tuned(load_base("tiny:llama"), [], Tune(), TrainSettings(max_steps=1), Run()),
    ):
        pass
