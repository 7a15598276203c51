import pytest
import torch

from temper.core.errors import ConfigError, ModelError
from temper.core.types import Run
from temper.ops.generate import Sampling, generate
from temper.ops.hooks import (
    attention_bias,
    attention_weights,
    capture,
    current_rows,
    edit,
    is_hooked,
    site_names,
)

KINDS = ["llama", "gpt2", "qwen2", "gemma", "gemma2", "mistral-wide", "neox"]
IDS = torch.tensor([[9, 40, 77, 130, 201, 8], [31, 32, 33, 34, 35, 36]])


def attention_for(kind):
    return "eager" if kind == "gemma2" else "sdpa"


def logits_of(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_captured_states_are_the_models_own(lively, kind):
    model = lively(kind, attention_for(kind)).model
    with (
        torch.no_grad(),
        capture(model, ["embeddings", "layers.0.output", "layers.-1.input", "final_norm.output"]) as got,
    ):
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(got["layers.0.output"], hidden[1])
    assert torch.equal(got["layers.1.input"], hidden[1])
    assert torch.equal(got["final_norm.output"], hidden[2])
    assert list(got) == ["embeddings.output", "layers.0.output", "layers.1.input", "final_norm.output"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral-wide"])
def test_a_layer_is_the_sum_of_its_parts(lively, kind):
    model = lively(kind).model
    names = ["layers.1.input", "layers.1.attention.output", "layers.1.mlp.output", "layers.1.output"]
    with torch.no_grad(), capture(model, names) as got:
        model(input_ids=IDS)
    start, attention, mlp, end = (got[name] for name in names)
    torch.testing.assert_close(start + attention + mlp, end)


@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_and_after_an_error_outputs_are_bit_identical(lively, kind):
    model = lively(kind, attention_for(kind)).model
    before = logits_of(model)
    with edit(model, {"layers.*.output": lambda h: h + 1}), capture(model, ["layers.*.attention.output"]):
        assert not torch.equal(logits_of(model), before)
    with attention_bias(model, torch.tensor([2.0, -3.0])):
        assert not torch.equal(logits_of(model), before)
    with attention_weights(model, [0]):
        logits_of(model)

    def broken(hidden):
        raise RuntimeError("inside a hook")

    for block in (
        edit(model, {"layers.1.mlp.input": broken}),
        attention_bias(model, lambda rows: broken(rows)),
    ):
        with pytest.raises(RuntimeError, match="inside a hook"), block:
            logits_of(model)
    assert torch.equal(logits_of(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_names_are_resolved_before_the_first_hook(lively):
    model = lively("llama").model
    for names in (
        ["layers.0.output", "layers.9.output"],
        ["layers.0.outptu"],
        ["mlp"],
        [],
        ["layers.0.output"] * 2,
    ):
        with pytest.raises(ConfigError), capture(model, names):
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with (
        pytest.raises(ConfigError, match=r"layers\.0\.output"),
        edit(model, {"layers.0.outptu": lambda h: h}),
    ):
        pass
    assert "layers.1.attention.input" in site_names(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_means_the_last_real_token(lively, side):
    model = lively("llama").model
    ids, mask = torch.full((2, 5), 3), torch.zeros(2, 5, dtype=torch.long)
    rows = ([9, 40], [9, 40, 77, 130, 201])
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(5 - len(row), 5)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), capture(model, ["layers.1.output"], "last") as batch:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    for number, row in enumerate(rows):
        with torch.no_grad(), capture(model, ["layers.1.output"], "last") as alone:
            model(input_ids=torch.tensor([row]))
        torch.testing.assert_close(batch["layers.1.output"][number], alone["layers.1.output"][0])


def test_positions_choose_columns(lively):
    model = lively("llama").model
    shapes = {}
    for name, positions in {"all": None, "one": -1, "two": [0, 2], "each": torch.tensor([1, 4])}.items():
        with torch.no_grad(), capture(model, ["layers.0.output"], positions) as got:
            model(input_ids=IDS)
        shapes[name] = got["layers.0.output"]
    assert torch.equal(shapes["one"], shapes["all"][:, -1])
    assert torch.equal(shapes["two"], shapes["all"][:, [0, 2]])
    assert torch.equal(shapes["each"], torch.stack([shapes["all"][0, 1], shapes["all"][1, 4]]))


def test_passes_join_along_the_batch_or_say_why_not(lively):
    model = lively("llama").model
    with torch.no_grad(), capture(model, ["layers.0.output"]) as got:
        model(input_ids=IDS)
        model(input_ids=IDS)
        assert got["layers.0.output"].shape[0] == 4
        model(input_ids=IDS[:, :3])
    with pytest.raises(ModelError, match="differ in shape"):
        got["layers.0.output"]
    assert len(got.passes["layers.0.output"]) == 3
    with pytest.raises(ConfigError, match="was not captured"):
        got["layers.1.output"]
    with capture(model, ["layers.0.output"]) as empty, pytest.raises(ModelError, match="no forward pass"):
        empty["layers.0.output"]


def test_gradients_flow_through_captured_states_when_asked(lively):
    model = lively("llama").model
    with capture(model, ["layers.0.output"], grad=True) as got:
        loss = model(input_ids=IDS).logits.sum()
    (grad,) = torch.autograd.grad(loss, got["layers.0.output"])
    assert grad.abs().sum() > 0
    with capture(model, ["layers.0.output"]) as plain:
        model(input_ids=IDS)
    assert not plain["layers.0.output"].requires_grad


def test_edited_states_are_what_the_next_layer_sees(lively):
    model = lively("llama").model
    with (
        torch.no_grad(),
        edit(model, {"layers.0.output": lambda h: h * 0 + 1}),
        capture(model, ["layers.1.input"]) as got,
    ):
        model(input_ids=IDS)
    assert torch.equal(got["layers.1.input"], torch.ones_like(got["layers.1.input"]))
    before = logits_of(model)
    with edit(model, {"layers.0.attention.input": lambda h: None}):
        assert torch.equal(logits_of(model), before)
    with edit(model, {"layers.0.attention.input": lambda h: h * 2}):
        assert not torch.equal(logits_of(model), before)


def test_edits_reach_generation_and_know_their_rows(lively, random_prompts):
    system = lively("llama")
    prompts = random_prompts((5, 12, 3, 9))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))

    def push(hidden_BTD):
        rows = current_rows()
        strength = torch.tensor([float(len(ids) % 3) for ids in rows.prompt_ids_B])
        return hidden_BTD + strength[:, None, None] * direction

    with edit(system.model, {"layers.0.output": push}):
        batch = generate(system, prompts, Sampling(max_new_tokens=8), Run(), width=3)
        alone = [generate(system, [ids], Sampling(max_new_tokens=8), Run())[0] for ids in prompts]
    plain = generate(system, prompts, Sampling(max_new_tokens=8), Run())
    assert [reply.ids for reply in batch] == [reply.ids for reply in alone]
    assert [reply.ids for reply in batch] != [reply.ids for reply in plain]
    assert batch[1].ids == plain[1].ids, "strength 0 changes nothing"
    assert current_rows() is None


@pytest.mark.parametrize("kind", KINDS)
def test_log_bias_renormalises_attention(lively, kind):
    """Att' = Att * w / Z at every layer: each layer recomputed from its own unbiased logits."""
    model = lively(kind, "eager").model
    share_K = torch.tensor([1.0, 0.2, 1.0, 0.05, 1.0, 3.0])
    with torch.no_grad(), attention_weights(model, [0]) as plain:
        model(input_ids=IDS)
    with torch.no_grad(), attention_bias(model, share_K.log()), attention_weights(model, [0]) as biased:
        model(input_ids=IDS)
    weighted = plain[0][0] * share_K
    torch.testing.assert_close(biased[0][0], weighted / weighted.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_sdpa_and_eager_agree_under_a_bias_and_between_weights(lively, kind):
    bias = torch.tensor([[0.0, -2.0, 1.0], [3.0, 0.0, -1.0]])
    logits, weights = [], []
    for attention in ("sdpa", "eager"):
        model = lively(kind, attention).model
        with attention_bias(model, bias, layers=[1], heads=[0, 2]), attention_weights(model, [1, 0]) as got:
            logits.append(logits_of(model))
        weights.append(got)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        torch.testing.assert_close(weights[0][layer][0], weights[1][layer][0], rtol=1e-4, atol=1e-5)


def test_weights_equal_the_models_own_and_cost_only_what_is_kept(lively):
    model = lively("llama", "eager").model
    with torch.no_grad(), attention_weights(model, [-1]) as got:
        own = model(input_ids=IDS, output_attentions=True).attentions
    assert torch.equal(got[1][0], own[1])
    with torch.no_grad(), attention_weights(model, [0], reduce=lambda w: w[:, :, -1].amax(1)) as reduced:
        model(input_ids=IDS)
    assert torch.equal(reduced[0][0], own[0][:, :, -1].amax(1))
    assert model.model.layers[0].self_attn.config is model.config


def test_heads_and_layers_are_checked(lively):
    model = lively("llama").model
    for wrong in ({"layers": [2]}, {"heads": [4]}, {"heads": []}):
        with pytest.raises(ConfigError), attention_bias(model, torch.zeros(1), **wrong):
            pass
    with pytest.raises(ConfigError, match="0 to 1"), attention_weights(model, [7]):
        pass
    with pytest.raises(ConfigError, match="3 rows, the batch 2"), attention_bias(model, torch.zeros(3, 2)):
        logits_of(model)


def test_only_chosen_heads_and_layers_change(lively):
    model = lively("llama", "eager").model
    with torch.no_grad(), attention_weights(model, [0, 1]) as plain:
        model(input_ids=IDS)
    with (
        torch.no_grad(),
        attention_bias(model, torch.tensor([5.0]), layers=[0], heads=[1]),
        attention_weights(model, [0]) as got,
    ):
        model(input_ids=IDS)
    assert torch.equal(got[0][0][:, [0, 2, 3]], plain[0][0][:, [0, 2, 3]])
    assert (got[0][0][:, 1, 1:, 0] > plain[0][0][:, 1, 1:, 0]).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bias_means_real_positions_under_left_padding_and_in_cached_decoding(lively, attention):
    model = lively("llama", attention).model
    bias = torch.tensor([0.0, 4.0, -3.0])
    row = [9, 40, 77, 130]
    ids = torch.tensor([[3, 3, *row], [5, 6, 7, 8, 9, 10]])
    mask = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attention_bias(model, bias):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, 2:]
        first = model(
            input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], use_cache=True
        )
        step = model(input_ids=ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:],
                     past_key_values=first.past_key_values).logits[0, -1]  # fmt: skip
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step, alone[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steered_generation_in_batches_equals_one_by_one_and_the_slow_twin(
    lively, random_prompts, slow_greedy, kind, attention
):
    system = lively(kind, attention)
    prompts = random_prompts((5, 12, 3, 9, 12), prefix=random_prompts([20])[0])

    def away_from_odd_ids(rows):
        bias_BK = torch.zeros(len(rows.prompt_ids_B), rows.key_len)
        for row, ids in enumerate(rows.prompt_ids_B):
            for position, token in enumerate(ids[: rows.key_len]):
                bias_BK[row, position] = -3.0 * (token % 2)
        return bias_BK

    plain = generate(system, prompts, Sampling(max_new_tokens=8), Run())
    with attention_bias(system.model, away_from_odd_ids):
        batch = generate(system, prompts, Sampling(max_new_tokens=8), Run(), width=3)
        alone = [generate(system, [ids], Sampling(max_new_tokens=8), Run(exact=True))[0] for ids in prompts]
    assert [reply.ids for reply in batch] == [reply.ids for reply in alone]
    assert [reply.ids for reply in batch] != [reply.ids for reply in plain]
    for ids, reply in zip(prompts, batch, strict=True):
        bias = torch.tensor([-3.0 * (token % 2) for token in ids])
        with attention_bias(system.model, bias):
            assert slow_greedy(system, ids, 8) == reply.ids


def test_a_provider_outside_the_engine_is_told_the_rows(lively):
    model = lively("llama").model
    seen = []

    def look(rows):
        seen.append(rows)
        return torch.zeros(1, 1)

    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad(), attention_bias(model, look):
        first = model(input_ids=IDS, attention_mask=mask, use_cache=True)
        step_mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        model(input_ids=IDS[:, :1], attention_mask=step_mask, past_key_values=first.past_key_values)
    assert seen[0].prompt_ids_B == [IDS[0, 2:].tolist(), IDS[1].tolist()]
    assert (seen[0].start_B, seen[0].length_B, seen[0].key_len) == ([0, 0], [4, 6], 6)
    assert (seen[1].start_B, seen[1].length_B, seen[1].key_len) == ([4, 6], [1, 1], 7)
    assert seen[1].prompt_ids_B == seen[0].prompt_ids_B


def test_the_hooks_that_transformers_leaves_behind_do_not_count(lively):
    system = lively("llama")
    assert not is_hooked(system.model)
    system.probe()
    assert any(module._forward_hooks for module in system.model.modules()), "else this test shows nothing"
    assert not is_hooked(system.model)
    with edit(system.model, {"layers.0.output": lambda hidden: None}):
        assert is_hooked(system.model)
    handle = system.model.register_forward_pre_hook(lambda module, args: None)
    assert is_hooked(system.model)
    handle.remove()
