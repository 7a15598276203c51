"""What the tests of bad input begin with: a folder of files good and bad, and a command that is run or refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

from fakes import own_folder, write_pipeline

from temper.cli.main import main

FILES = {
    "ok.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "text.jsonl": '{"text": "1.5"}\n',
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt":\n',
    "list.jsonl": "[1, 2]\n",
    "null.jsonl": "null\n",
    "types.jsonl": '{"prompt": 5, "completion": "b"}\n',
    "columns.jsonl": '{"foo": 1}\n',
    "hollow.jsonl": '{"prompt": "a", "completion": ""}\n',
    "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "\n",
    "half.jsonl": '{"prompt": "\\ud800", "completion": "b"}\n',
    "wrong.csv": "foo,bar\n1,2\n",
    "head.csv": "prompt,completion\n",
    "twice.csv": "prompt,prompt\na,b\n",
    "no.parquet": "hello",
    "twice.yaml": "name: a\nname: b\n",
    "top.yaml": "nam: a\nsteps: [{id: x, make: fake-make}]\n",
    "verb.yaml": "steps: [{id: x, mke: fake-make}]\n",
    "step.yaml": "steps: [{id: x, make: fake-make}, {id: y, fit: fake-fit, data: z}]\n",
    "circle.yaml": "system: tiny:llama\ndata: builtin:noncompliance\n"
    "steps: [{id: x, fit: refusal-tokens, system: base+x}]\n",
    "late.yaml": "steps: [{id: y, fit: fake-fit, data: x}, {id: x, make: fake-make}]\n",
    "tag.yaml": 'steps: !!python/object/apply:os.system ["true"]\n',
    "tab.yaml": "steps:\n\t- a\n",
    "empty.yaml": "",
    "artefact/artefact.json": "{}",
    "hollow/readme.txt": "",
}
BYTES = {
    "latin.jsonl": '{"prompt": "\xe9", "completion": "b"}'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "a"}'.encode("utf-16"),
    "bom.jsonl": b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n',
    "binary.yaml": b"\xff\xfe\x00",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    own_folder(tmp_path, monkeypatch)
    write_pipeline(tmp_path / "chain.yaml")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, content in BYTES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    return tmp_path


def run(capsys, *arguments: str):
    """Exit code, stdout and stderr of one command."""
    code = 0
    try:
        main([word for text in arguments for word in text.split()])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, command: str, *words: str) -> str:
    """One clear error with exit code 2, and no run; gives what was said."""
    code, out, err = run(capsys, command)
    assert code == 2, err
    assert out == ""
    assert err.count("Error") == 1
    assert "Traceback" not in err
    assert "Unexpected" not in err
    for word in words:
        assert word in err, err
    assert not Path("runs").exists()
    return err
