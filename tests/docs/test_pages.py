"""What the documentation tells a reader to type works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parent))
from marked_blocks import ROOT, Block, blocks, commands, pages, script

from temper.cli.main import COMMANDS
from temper.core import registry

TYPED = [
    (page, line)
    for page in pages()
    for block in blocks(page)
    for line in commands(block)
    if block.language != "python"
]
TEMPER = [(page, line) for page, line in TYPED if line.startswith("temper ")]
RUNNABLE = [page for page in pages() if any(block.runs for block in blocks(page))]
MINE = '{"question": "Who wrote The Glass Ferry?", "answer": "Ilse Varn wrote it."}\n'
OTHER = '{"question": "Who wrote The Salt Road?", "answer": "Tomas Ege wrote it."}\n'


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def options(command: str) -> set[str]:
    """The options that a command takes, from its own help."""
    import importlib

    app = typer.Typer()
    app.callback()(lambda: None)
    importlib.import_module(f"temper.cli.{command}").register(app, command, "")
    found = typer.main.get_command(app).commands[command]
    inner = [found, *getattr(found, "commands", {}).values()]
    return {opt for one in inner for param in one.params for opt in param.opts if opt.startswith("-")}


def test_blocks_are_found() -> None:
    assert len(TEMPER) > 25
    assert {"README.md", "CONTRIBUTING.md"} <= {name(page) for page in RUNNABLE}
    text = "<!-- runs -->\n```console\n$ temper list  # all\nsaid\n```\n"
    assert commands(Block("console", "$ temper list  # all\nsaid\n", True)) == ["temper list"]
    assert "runs" in text


@pytest.mark.parametrize(
    ("page", "line"), TEMPER, ids=lambda value: name(value) if isinstance(value, Path) else None
)
def test_commands_options_and_methods_exist(page: Path, line: str) -> None:
    words = shlex.split(line)
    assert words[1] in COMMANDS
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= options(words[1]) | {"--help"}
    if (
        words[1] in ("run", "plan", "show", "evidence")
        and len(words) > 2
        and re.fullmatch(r"[a-z0-9-]+", words[2])
    ):
        assert words[2] in [*registry.slugs(), "short-answers"]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for _, line in TYPED if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_serve_is_the_only_command_that_is_coming() -> None:
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `temper ")]
    assert len(rows) == len(COMMANDS)
    assert [row for row in rows if "coming" in row] == [row for row in rows if "`temper serve`" in row]


def test_the_readme_names_every_layer() -> None:
    text = (ROOT / "README.md").read_text()
    layers = {p.name for p in (ROOT / "src" / "temper").iterdir() if (p / "__init__.py").exists()}
    assert {layer for layer in layers if f"`src/temper/{layer}/`" not in text} <= {"server"}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "ARCHITECTURE.md"],
    ids=name,
)
def test_local_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_what_a_page_lets_one_type_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text(MINE)
    (tmp_path / "other.jsonl").write_text(OTHER)
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((binaries, os.environ["PATH"])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TEMPER_METHODS", None)
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
