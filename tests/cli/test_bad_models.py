"""Models and artefacts that cannot work, through the command line: tokenizers, templates, other bases, damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from temper.systems.tiny import build_tiny

from .conftest import refused, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny model; each test changes its own copy."""
    path = tmp_path_factory.mktemp("model")
    llama, tokenizer = build_tiny("llama")
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def with_template(model: Path, home: Path, change) -> str:
    """A copy of the model with its template changed, or without one."""
    folder = home / "changed"
    shutil.copytree(model, folder)
    template = folder / "chat_template.jinja"
    text = change(template.read_text())
    template.unlink()
    if text is not None:
        template.write_text(text)
    return "./changed"


def test_a_tokenizer_that_splits_a_control_token(home, model, capsys):
    system = with_template(model, home, lambda text: text.replace("im_end", "im_over"))
    said = refused(capsys, f"data show ok.jsonl --mask --system {system}", "splits the control token")
    assert "'<|im_over|>' into" in said
    refused(capsys, f"run refusal-tokens --recipe tiny --system {system}", "splits the control token")


def test_a_template_that_already_opens_the_reply(home, model, capsys):
    def thinks(text):
        return text.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")

    system = with_template(model, home, thinks)
    assert "<think>" in (home / "changed" / "chat_template.jinja").read_text()
    refused(
        capsys, f"run refusal-tokens --recipe tiny --system {system}", "already opens the reply", "<think>"
    )


def test_a_model_without_a_template_where_one_is_needed(home, model, capsys):
    system = with_template(model, home, lambda text: None)
    refused(capsys, f"run refusal-tokens --recipe tiny --system {system}", "no chat template")
    assert (
        run(capsys, f"data show ok.jsonl --mask --system {system} --json")[0] == 0
    )  # a plain format will do


@pytest.fixture
def fitted(home, capsys):
    """An adapter of tiny:llama, as a system part."""
    recipe = "system: tiny:llama\nsteps:\n  - {id: refuse, fit: refusal-tokens, data: builtin:noncompliance, limit: 40,"
    recipe += " settings: {mode: lora, rank: 2, batch_rows: 8}}\n"
    (home / "one.yaml").write_text(recipe)
    code, out, err = run(capsys, "run one.yaml --out kept")
    assert code == 0, err
    return out.splitlines()[-1]


def test_an_adapter_for_another_base(home, capsys, fitted):
    other = f"tiny:llama:1+{fitted}"
    words = ("was fitted on base", "not on", "fit it again")
    said = refused(capsys, f"data show ok.jsonl --mask --system {other}", *words)
    assert "tiny:llama:1" in said
    refused(capsys, f"run refusal-tokens --verb measure --data test=ok.jsonl --system {other}", *words)
    assert run(capsys, f"data show ok.jsonl --mask --system tiny:llama+{fitted}")[0] == 0


def test_a_damaged_artefact_stops_before_a_run_begins(home, capsys, fitted):
    for damaged in (Path("artefact"), next(Path(fitted).glob("steps/*/artefact"))):
        manifest = damaged / "artefact.json"
        manifest.write_text(manifest.read_text()[: len(manifest.read_text()) // 2] or "{")
        code, out, err = run(capsys, f"run refusal-tokens --recipe tiny --system tiny:llama+{damaged}")
        assert (code, out) == (1, "")
        assert "artefact.json" in err
        assert "Fit it again" in err
        assert not Path("runs").exists()
