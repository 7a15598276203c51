"""Encoders as systems: capabilities, fingerprints, sentence-transformers' layout, artefacts, names."""

from __future__ import annotations

import json

import pytest
import torch

from temper.artefacts import Tune, load_artefact, tuning
from temper.core.card import CAPABILITIES, Card
from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Run
from temper.data import assets
from temper.ops.embed import embed, vectors
from temper.run.checks import check_kind, check_system
from temper.systems.encoder import Encoder
from temper.systems.fingerprint import fingerprint_model
from temper.systems.loading import known_bases, load_base
from temper.systems.names import TINY, kind_of
from temper.systems.sentence_layout import Dense, Layout, attach_dense, read_layout, write_layout
from temper.systems.tiny import ENCODERS, build_tiny_encoder

each_kind = pytest.mark.parametrize("kind", ENCODERS)
TEXTS = ["the fox", "a long story about a lighthouse and a boat", "Yes."]
DENSE = {
    "in_features": 32,
    "out_features": 12,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


def with_head():
    """An encoder with a dense layer, two poolings joined, a prompt and a limit."""
    system = load_base("tiny:bert")
    torch.manual_seed(5)
    attach_dense(system.model, [Dense({**DENSE, "in_features": 64})])
    layout = Layout(("mean", "cls"), ("dense", "normalize"), 9, True, {"query": "find: "}, "query")
    return system.with_(layout=layout)


@each_kind
def test_probing_finds_what_works_and_changes_nothing(kind):
    system = load_base(f"tiny:{kind}")
    system.model.train()
    system.model.embeddings.dropout.eval()
    before = fingerprint_model(system.model, fresh=True)
    assert isinstance(system, Encoder)
    assert system.kind == "Encoder"
    assert system.capabilities == {"embed", "hidden", "grads"}
    assert set(system.probe()) == set(CAPABILITIES)
    assert fingerprint_model(system.model, fresh=True) == before
    assert system.model.training
    assert not system.model.embeddings.dropout.training
    assert all(p.grad is None and p.requires_grad for p in system.model.parameters())


def test_what_is_missing_comes_with_a_cure():
    with pytest.raises(NeedsError, match="only reads: choose a causal language model"):
        load_base("tiny:bert").require("generate")
    broken = load_base("tiny:bert:1")
    broken.model.encoder = None
    with pytest.raises(NeedsError, match="failed when 'embed' was tried"):
        broken.require("embed")


@each_kind
def test_the_fingerprint_holds_all_that_decides_a_vector(kind):
    system = load_base(f"tiny:{kind}")
    assert system.fingerprint == load_base(f"tiny:{kind}:0").fingerprint
    system.ids(TEXTS)
    assert system.fingerprint == load_base(f"tiny:{kind}").fingerprint, "reading texts changed it"
    others = {
        load_base(f"tiny:{kind}:1").fingerprint,
        *(system.with_(layout=layout).fingerprint for layout in (Layout(("cls",)), Layout(max_tokens=5))),
        *(
            system.with_(layout=layout).fingerprint
            for layout in (Layout(steps=("normalize",)), Layout(lower_case=True))
        ),
    }
    other = load_base(f"tiny:{kind}")
    other.tokenizer.add_tokens(["foxes"])
    others.add(other.fingerprint)
    assert len(others | {system.fingerprint}) == 7


def test_tiny_encoders_are_named_and_seeded():
    assert set(TINY["Encoder"]) == set(ENCODERS)
    assert {"minilm", "tiny:bert"} <= set(known_bases())
    with pytest.raises(ConfigError, match="Did you mean"):
        build_tiny_encoder("bart")
    with pytest.raises(ConfigError, match="no tiny model"):
        load_base("tiny:birt")


@each_kind
def test_a_plain_folder_is_the_same_encoder(kind, tmp_path):
    system = load_base(f"tiny:{kind}")
    system.model.save_pretrained(tmp_path)
    system.tokenizer.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path))
    assert loaded.layout == Layout()
    assert loaded.takes_rows == system.takes_rows == (kind != "mpnet")
    assert torch.equal(embed(loaded, TEXTS, Run()), embed(system, TEXTS, Run()))


def test_the_layout_survives_the_disk(tmp_path):
    system = with_head()
    write_layout(system.model, system.tokenizer, system.layout, tmp_path)
    loaded = load_base(str(tmp_path))
    assert loaded.layout == system.layout
    assert loaded.width == 12
    assert loaded.max_tokens == 9
    assert torch.equal(embed(loaded, TEXTS, Run()), embed(system, TEXTS, Run()))
    assert "sentence_head" not in " ".join(json.loads((tmp_path / "config.json").read_text()))


def test_an_unusual_order_of_poolings_is_kept(tmp_path):
    system = load_base("tiny:bert").with_(layout=Layout(("max", "cls")))
    write_layout(system.model, system.tokenizer, system.layout, tmp_path)
    assert read_layout(tmp_path)[0].pooling == ("max", "cls")


def changed(tmp_path, name, **content):
    system = with_head()
    write_layout(system.model, system.tokenizer, system.layout, tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return str(tmp_path)


def test_layouts_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ModelError, match="pooling 'men' is not known"):
        load_base(changed(tmp_path / "a", "1_Pooling/config.json", pooling_mode="men"))
    with pytest.raises(NeedsError, match="leaves prompts out"):
        load_base(changed(tmp_path / "b", "1_Pooling/config.json", include_prompt=False))
    with pytest.raises(ModelError, match="activation 'os.system' is not known"):
        load_base(changed(tmp_path / "c", "2_Dense/config.json", activation_function="os.system"))
    folder = changed(tmp_path / "d", "2_Dense/config.json")
    (tmp_path / "d" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="dense layer has no safetensors"):
        load_base(folder)
    modules = json.loads((tmp_path / "a" / "modules.json").read_text())
    modules[3]["type"] = "somewhere.LSTM"
    (tmp_path / "a" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"lists Transformer, Pooling, Dense, LSTM"):
        load_base(str(tmp_path / "a"))


def test_a_pooler_that_is_not_in_the_file_is_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    system = load_base("tiny:bert")
    system.model.save_pretrained(tmp_path)
    system.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("pooler.")}
    save_file(kept, path, metadata={"format": "pt"})
    first, second = load_base(str(tmp_path)), load_base(str(tmp_path))
    assert first.model.pooler is None
    assert first.fingerprint == second.fingerprint
    kept.pop("encoder.layer.0.output.dense.bias")
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weights lack encoder.layer.0.output.dense.bias"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("tune", [Tune(r=4), Tune(mode="full")])
def test_artefacts_apply_and_leave_no_trace(tune, tmp_path):
    system = with_head()
    calm, base = embed(system, TEXTS, Run()), system.fingerprint
    with tuning(system, tune, Run()) as tuned:
        optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
        for _ in range(2):
            vectors(tuned.system, tuned.system.ids(TEXTS))[:, 0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = embed(tuned.system, TEXTS, Run())
        artefact = tuned.finish("test")
    assert torch.equal(embed(system, TEXTS, Run()), calm)
    artefact.save(tmp_path / "artefact")
    with load_artefact(tmp_path / "artefact").apply(system) as applied:
        torch.testing.assert_close(embed(applied, TEXTS, Run()), trained, atol=1e-5, rtol=1e-4)
        assert (embed(applied, TEXTS, Run()) - calm).abs().max() > 1e-4
        assert applied.fingerprint != base
    assert torch.equal(embed(system, TEXTS, Run()), calm)
    assert system.fingerprint == base


def test_kinds_are_known_before_weights_load(tmp_path):
    card = Card(
        title="t", paper="p", verbs=("fit",), config=Layout, needs=frozenset({"logprobs"}), data={"fit": {}}
    )
    reader = Card(
        title="t",
        paper="p",
        verbs=("fit",),
        config=Layout,
        needs=frozenset({"embed"}),
        data={"fit": {}},
        kinds=("Encoder",),
    )
    assert [kind_of(name) for name in ("minilm", "tiny:bert:3", "tiny:llama", "openai:x")] == [
        "Encoder",
        "Encoder",
        "CausalLM",
        "Remote",
    ]
    system = load_base("tiny:bert")
    system.model.save_pretrained(tmp_path)
    assert kind_of(str(tmp_path)) == "Encoder"
    check_kind("method", reader, "minilm")
    check_system("method", reader, system)
    with pytest.raises(NeedsError, match="'minilm' is a text encoder"):
        check_kind("method", card, "minilm")
    with pytest.raises(NeedsError, match="not on a Encoder"):
        check_system("method", card, system)


@pytest.mark.skipif(not assets.is_cached("minilm"), reason="minilm is not fetched")
def test_minilm_is_read_as_its_makers_meant(tmp_path):
    system = load_base("minilm")
    assert (system.layout, system.width, system.max_tokens) == (
        Layout(steps=("normalize",), max_tokens=256),
        384,
        256,
    )
    write_layout(system.model, system.tokenizer, system.layout, tmp_path)
    again = load_base(str(tmp_path))
    assert again.layout == system.layout
    assert torch.equal(embed(again, TEXTS, Run()), embed(system, TEXTS, Run()))
