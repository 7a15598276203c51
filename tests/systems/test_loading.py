"""Names to systems, and one clear error for each way a name can be wrong."""

from __future__ import annotations

import json

import pytest
import torch

from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Message
from temper.systems import loading, memory
from temper.systems.loading import known_bases, load_base
from temper.systems.names import TINY, check_base
from temper.systems.remote import Remote
from temper.systems.tiny import ARCHITECTURES, LARGER, build_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = build_tiny("llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def copied(folder, tmp_path, **changes):
    """The folder with some config keys changed."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_names(architecture):
    system = load_base(f"tiny:{architecture}")
    assert system.spec == f"tiny:{architecture}"
    assert "generate" in system.capabilities
    assert system.fingerprint == load_base(f"tiny:{architecture}:0").fingerprint
    assert system.fingerprint != load_base(f"tiny:{architecture}:1").fingerprint


def test_a_saved_folder_is_the_same_system(folder):
    loaded, built = load_base(str(folder)), load_base("tiny:llama")
    assert loaded.fingerprint == built.fingerprint
    assert loaded.chat.sha256 == built.chat.sha256
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, built.model(ids).logits)


def test_dtype_attention_and_prompt_are_the_callers(folder, tmp_path):
    system = load_base(str(folder), dtype="bf16", attention="eager", system_prompt="Be brief.")
    assert system.dtype == torch.bfloat16
    assert system.model.config._attn_implementation == "eager"
    assert "Be brief." in system.chat.prompt([Message("user", "hi")]).text
    assert load_base("tiny:gpt2", dtype="bf16").dtype == torch.bfloat16
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert load_base("tiny:llama", chat_template=path).chat.prompt([Message("user", "hi")]).text == "hi|"


def test_endpoint_names():
    system = load_base("openai:some-model", base_url="http://localhost:1/v1", system_prompt="s")
    assert isinstance(system, Remote)
    assert (system.model, system.base_url, system.system_prompt) == (
        "some-model",
        "http://localhost:1/v1",
        "s",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "Did you mean smollm2-135m"),
        ("tiny:lama", "Did you mean llama"),
        ("tiny:llama:x", "tiny:ARCH:SEED"),
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("a b", "owner/name"),
        ("openai:", "names no model"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        load_base(name)
    assert "smollm2-135m" in known_bases()


def test_hub_names_without_a_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NeedsError, match="the hub cannot be reached"):
        load_base("nobody/nothing-here")


@pytest.mark.parametrize(
    ("wrong", "kind"), [({"dtype": "float8"}, ConfigError), ({"device": "gpu"}, ConfigError)]
)
def test_wrong_dtype_and_device(wrong, kind):
    with pytest.raises(kind):
        load_base("tiny:llama", **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_absent_device():
    with pytest.raises(NeedsError, match="no device cuda here"):
        load_base("tiny:llama", device="cuda")


def test_folders_that_are_no_model(folder, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_base(str(tmp_path))
    (tmp_path / "artefact.json").write_text("{}")
    with pytest.raises(ModelError, match=r"BASE\+FOLDER"):
        load_base(str(tmp_path))
    broken = copied(folder, tmp_path)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors"):
        load_base(str(broken))


def test_broken_weights(folder, tmp_path):
    broken = copied(folder, tmp_path)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="weights file is broken"):
        load_base(str(broken))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["T5Model"], "model_type": "t5"},
    ],
)
def test_not_a_causal_lm(folder, tmp_path, changes):
    with pytest.raises(ModelError, match="not a causal language model"):
        load_base(str(copied(folder, tmp_path, **changes)))


def test_memory_is_estimated_before_loading(folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100_000)
    with pytest.raises(NeedsError, match=r"needs about 0\.0 GB.*0 M weights as torch\.float32"):
        load_base(str(folder))
    num_weights = sum(p.numel() for p in build_tiny("llama")[0].parameters())
    assert memory.header_count(folder / "model.safetensors") == num_weights
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    load_base(str(folder))


def test_group_limit_counts_the_page_cache_as_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert memory._free_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_in_group(tmp_path) is None
    assert memory._free_in_group(tmp_path / "none") is None
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or free > 0


def test_spare_rows_are_fine_and_missing_ones_are_not(tmp_path):
    model, tokenizer = build_tiny("llama")
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path)).num_embeddings == 520
    tokenizer.add_tokens([f"[new{i}]" for i in range(20)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="532 tokens and the model only 520"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("GatedRepoError", NeedsError, "gated"),
        ("RepositoryNotFoundError", ConfigError, "hub has no model"),
        ("LocalEntryNotFoundError", NeedsError, "cannot be reached"),
    ],
)
def test_hub_failures_are_told_apart(name, kind, message):
    outer = OSError("something failed")
    outer.__cause__ = type(name, (Exception,), {})("inner")
    error = loading.explained(outer, "a/b")
    assert isinstance(error, kind)
    assert message in str(error)
    assert isinstance(loading.explained(OSError("a/b does not have safetensors"), "a/b"), ModelError)


def test_names_are_checked_without_loading(folder, tmp_path):
    assert set(TINY["CausalLM"]) == set(ARCHITECTURES) | set(LARGER)
    for good in ("smollm2-135m", "tiny:llama:3", "owner/name", "openai:gpt-x", str(folder)):
        check_base(good)
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_base(str(tmp_path))


@pytest.mark.parametrize("was_on", [True, False])
def test_loading_draws_no_bar_and_leaves_their_setting_alone(folder, capfd, was_on):
    from transformers.utils import logging as theirs

    before = theirs.is_progress_bar_enabled()
    switch = {True: theirs.enable_progress_bar, False: theirs.disable_progress_bar}
    switch[was_on]()
    try:
        load_base(str(folder))
        assert capfd.readouterr().err == ""
        assert theirs.is_progress_bar_enabled() is was_on
    finally:
        switch[before]()
