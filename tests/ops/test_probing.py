"""States at the right token whatever the batch, probes that find what is linear, and spreads by hand."""

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.ops.probing import PENALTIES, fit_probe, last_token_states, total_variance


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_equal_plain_forward_passes(lively, random_prompts, kind):
    system = lively(kind)
    rows = random_prompts((5, 1, 9, 3))
    with torch.no_grad():
        # hidden_states[1] is the first layer's output.
        want = [
            system.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
            for ids in rows
        ]
    for run in (Run(batch_tokens=1000), Run(batch_tokens=1), Run(exact=True)):
        got = last_token_states(system, rows, -2, run)
        assert torch.allclose(got, torch.stack(want), atol=1e-4)


def test_reading_states_ticks_once_a_batch(lively, random_prompts):
    ticks = []

    def ticker(steps, *, total, label):
        ticks.append((label, total))
        return steps

    last_token_states(lively("llama"), random_prompts((5, 1, 9)), -1, Run(exact=True, ticker=ticker))
    assert ticks == [("states", 3)]


def test_bad_rows_and_layers(lively):
    with pytest.raises(DataError, match="no tokens"):
        last_token_states(lively("llama"), [[5], []], -1, Run())
    with pytest.raises(ConfigError, match="layers.-7"):
        last_token_states(lively("llama"), [[5]], -7, Run())


def test_a_probe_finds_a_direction_and_no_more():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 12, generator=generator) * 5 + 3
    linear, chance = (
        (states[:, 4] > 3).int().tolist(),
        (torch.rand(400, generator=generator) > 0.5).int().tolist(),
    )
    probe = fit_probe(states[:300], linear[:300])
    assert probe.accuracy(states[300:], linear[300:]) > 0.9
    assert probe.strength in PENALTIES
    noise = fit_probe(states[:300], chance[:300])
    assert 0.35 < noise.accuracy(states[300:], chance[300:]) < 0.65
    assert fit_probe(states[:300], linear[:300]).accuracy(states, linear) == probe.accuracy(states, linear)


def test_a_probe_needs_two_classes():
    states = torch.randn(20, 3)
    for labels in ([1] * 20, [1] * 17 + [0] * 3):
        with pytest.raises(DataError, match="two classes of five"):
            fit_probe(states, labels)


def test_total_variance_by_hand():
    assert total_variance(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])) == pytest.approx(4 + 3)
    with pytest.raises(DataError, match="no variance"):
        total_variance(torch.zeros(1, 3))
