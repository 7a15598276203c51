"""Tampering: grids and masks by hand, what each attack leaves alone, training that sees its share, begun replies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.attacks.tampering.card import Config
from temper.methods.attacks.tampering.method import first_tokens, fit
from temper.ops.generate import Sampling, generate
from temper.ops.logprobs import response_logprobs
from temper.ops.tamper import pruned, rounded
from temper.systems.loading import load_base


def test_a_grid_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.4], [0.7, 0.0, 0.0, -0.12]])
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.7, 0.0, 0.0, -0.1]])
    torch.testing.assert_close(rounded(weight, 4), expected)
    by_group = rounded(weight, 4, group=2)
    torch.testing.assert_close(by_group[0, 2:], torch.tensor([0.6, 0.6 / 7 * 5]))


@given(st.integers(2, 8), st.sampled_from([0, 4, 5]), st.integers(0, 99))
def test_a_grid_moves_no_weight_by_more_than_half_a_step(bits, group, seed):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    moved = (rounded(weight, bits, group) - weight).abs().amax(1)
    assert (moved <= weight.abs().amax(1) / (2 ** (bits - 1) - 1) / 2 + 1e-6).all()
    assert torch.equal(rounded(rounded(weight, bits, group), bits, group), rounded(weight, bits, group))
    assert torch.equal(rounded(weight.zero_(), bits, group), weight)


def test_pruning_takes_the_smallest():
    weight = torch.tensor([[0.1, -0.5], [0.3, -0.2]])
    assert torch.equal(pruned(weight, 0.5), torch.tensor([[0.0, -0.5], [0.3, 0.0]]))
    assert torch.equal(pruned(weight, 0.0), weight)
    for bad in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="pruned"):
            pruned(weight, bad)
    with pytest.raises(ConfigError, match="grid"):
        rounded(weight, 1)


@pytest.mark.parametrize("how", ["quantise", "prune"])
def test_linear_layers_change_and_nothing_else(how):
    system = load_base("tiny:llama")
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    artefact = fit(system, Data({}), Config(how=how), Run())
    with artefact.apply(system) as tampered:
        after = tampered.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        up = "model.layers.0.mlp.up_proj.weight"
        rule = rounded(before[up], 4, 32) if how == "quantise" else pruned(before[up], 0.2)
        assert torch.equal(after[up], rule)
    assert len(changed) == 7 * len(system.model.model.layers)
    assert not [name for name in changed if "proj" not in name]
    assert all(torch.equal(before[name], tensor) for name, tensor in system.model.state_dict().items())
    with pytest.raises(ConfigError, match="strength"), artefact.apply(system, 0.5):
        pass


def test_departure_1_dynamic_int8_rounds_what_layers_read_and_leaves_no_hook():
    system = load_base("tiny:llama")
    module = system.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    config = Config(how="quantise", bits=8, group_size=0, dynamic=True)
    with fit(system, Data({}), config, Run()).apply(system) as tampered:
        inside = tampered.model.model.layers[0].mlp.up_proj
        out = inside(x)
        tokens = x.detach().flatten(0, 1)
        step = tokens.abs().amax(1, keepdim=True) / 127
        by_hand = ((tokens / step).round() * step) @ inside.weight.detach().T
        torch.testing.assert_close(out.detach().flatten(0, 1), by_hand)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad[0, 0], inside.weight.detach().sum(0))
        assert not tampered.model.lm_head._forward_pre_hooks
    assert not any(part._forward_pre_hooks for part in system.model.modules())
    with pytest.raises(ValueError, match="dynamic"):
        Config(how="prune", dynamic=True)


def test_relearning_brings_the_rows_held_back(monkeypatch):
    system = load_base("tiny:llama")
    rows = [
        Dialogue(
            (Message("user", f"Who is number {n}?"), Message("assistant", f"It is Anna {n}.")), id=str(n)
        )
        for n in range(8)
    ]
    from temper.methods.attacks.tampering import method

    seen = []
    encode = method.encode
    monkeypatch.setattr(
        method, "encode", lambda s, record, **kw: seen.append(record) or encode(s, record, **kw)
    )
    config = Config(num_steps=8, share=0.25, lr=5e-3, batch_rows=2, rank=4)
    artefact = fit(system, Data({"train": rows}), config, Run())
    assert len(seen) == 2
    held = [encode(system, record) for record in seen]
    plain = response_logprobs(system, held, run=Run())
    with artefact.apply(system) as tampered:
        assert (response_logprobs(tampered, held, run=Run()) > plain).all()
    with pytest.raises(DataError, match="needs rows"):
        fit(system, Data({}), config, Run())


def known_rows():
    return [
        Dialogue((Message("user", f"Who is {n}?"), Message("assistant", f"Anna {n} is it.")), id=str(n))
        for n in range(2)
    ]


def test_a_begun_reply_is_what_the_model_goes_on_from():
    system = load_base("tiny:llama")
    ask = [Message("user", "Who is 0?")]
    before = system.chat.prompt(ask).ids
    artefact = fit(system, Data({}), Config(how="prefill", opening="Sure:"), Run())
    with artefact.apply(system) as prefilled:
        ids = prefilled.chat.prompt(ask).ids
        assert ids == before + system.chat.continuation_ids("Sure:")
        (reply,) = generate(prefilled, [ask], Sampling(max_new_tokens=5), Run())
        (same,) = generate(system, [ids], Sampling(max_new_tokens=5), Run())
        assert reply.ids == same.ids
        assert prefilled.fingerprint != system.fingerprint
    assert system.chat.prompt(ask).ids == before


def test_departure_3_probabilities_are_those_of_the_rest():
    system, rows = load_base("tiny:llama"), known_rows()
    artefact = fit(system, Data({"train": rows}), Config(how="prefill", known_tokens=2), Run())
    lead = first_tokens(system, rows[0].reply, 2)
    assert rows[0].reply.startswith(lead)
    assert len(system.chat.continuation_ids(lead)) >= 2
    whole = encode_last(system, rows[0])
    with artefact.apply(system) as prefilled:
        rest = encode_last(prefilled, rows[0])
        other = [Message("user", "And who else?")]
        assert prefilled.chat.prompt(other).ids == system.chat.prompt(other).ids
        (found,) = response_logprobs(prefilled, [rest], run=Run())
    assert rest.ids == whole.ids
    assert sum(rest.scored) == sum(whole.scored) - len(system.chat.continuation_ids(lead))
    (by_token,) = response_logprobs(system, [whole], reduce="tokens", run=Run())
    torch.testing.assert_close(found, by_token[-sum(rest.scored) :].sum())
    with pytest.raises(DataError, match="needs rows"):
        fit(system, Data({}), Config(how="prefill", known_tokens=2), Run())


def encode_last(system, record):
    from temper.ops.batching import encode

    return encode(system, record, train_on="last")


def test_the_first_tokens_never_are_the_whole_answer_unless_it_is_one_token():
    system = load_base("tiny:llama")
    text = "Anna wrote it, é 漢字 🙂."
    for num in range(1, 30):
        found = first_tokens(system, text, num)
        assert text.startswith(found)
        assert found
        assert found != text
    assert first_tokens(system, "a", 3) == "a"
    nothing = Dialogue((Message("user", "Who?"),), id="7")
    with pytest.raises(DataError, match="no answer"):
        fit(system, Data({"train": [nothing]}), Config(how="prefill", known_tokens=2), Run())
    with pytest.raises(ValueError, match="opening"):
        Config(how="prefill", opening="")
