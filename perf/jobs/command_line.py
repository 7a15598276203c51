"""How long the command line takes to answer, process start to end, with as many methods as will ever be there."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import Job, Measured, Side, main, timed

CARDS, RUNS = 96, 5
CARD = '''"""A generated method.

Paper  none
"""
from __future__ import annotations

from dataclasses import dataclass

from temper.core.card import Card, Claim


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1
    """Learning rate."""


CARD = Card(
    title="Method {number}",
    paper="arXiv:0000.00000",
    verbs=("fit",),
    config=Config,
    needs=frozenset({{"generate"}}),
    data={{}},
    produces=(),
    claims=(Claim(id="c", sentence="s", metric="m", arm="a", baseline="b", direction="higher"),),
)
'''


def write_cards(root: Path) -> None:
    """A registry of CARDS methods in twelve families."""
    for number in range(CARDS):
        folder = root / f"family_{number % 12}" / f"method_{number}"
        folder.mkdir(parents=True)
        (folder / "card.py").write_text(CARD.format(number=number), encoding="utf-8")
        (folder / "recipes.yaml").write_text("tiny: {}\nsmall: {}\npaper: {}\n", encoding="utf-8")


def answer(*arguments: str) -> Any:
    """The side that runs one command RUNS times after once to write the bytecode, and gives the median."""

    def run(given: dict[str, Any]) -> Measured:
        import os
        import subprocess
        import sys

        with tempfile.TemporaryDirectory() as folder:
            write_cards(Path(folder) / "methods")
            environment = {
                **os.environ,
                "TEMPER_METHODS": str(Path(folder) / "methods"),
                "TEMPER_CACHE": folder,
            }
            command = [sys.executable, *arguments]

            def once() -> str:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                return done.stdout

            said = once()
            seconds = [timed(once)[1] for _ in range(RUNS)]
        return Measured(
            1, statistics.median(seconds), {"lines": len(said.splitlines()), "methods": said.count("method-")}
        )

    return run


def check(outputs: dict[str, Any]) -> str:
    """The list holds every card, and the help says something."""
    if "temper list" in outputs:
        assert outputs["temper list"]["methods"] == CARDS, outputs["temper list"]
    if "temper --help" in outputs:
        assert outputs["temper --help"]["lines"] > 10, outputs["temper --help"]
    return f"the list names all {CARDS} methods"


TEMPER = ("-m", "temper.cli.main")
JOB = Job(
    name="command-line",
    about=__doc__ or "",
    unit="s",
    target=0.3,
    bound=True,
    lower_is_better=True,
    inputs=dict,
    sides={
        "temper --help": Side(answer(*TEMPER, "--help")),
        "temper list": Side(answer(*TEMPER, "list")),
        "python -c pass": Side(answer("-c", "pass"), counts=False),
    },
    check=check,
)

if __name__ == "__main__":
    main(JOB)
