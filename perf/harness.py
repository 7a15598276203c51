"""One job on several sides: temper and its peers, each in a process of its own, taking turns.

A job is one script in `perf/jobs`. It runs in temper's environment and in its peers', so it imports nothing of either
at the top, and neither does this file. Without arguments a job's script runs all sides and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVS = Path(os.environ.get("TEMPER_PERF_ENVS", Path.home() / ".cache" / "temper-perf"))
OURS = "temper"
NO_DEPS = "# no-deps: "
"""Begins a line of `perf/peers/<env>.txt` whose package is installed without what it asks for."""


@dataclass(frozen=True)
class Measured:
    """What one run of a side gives: work done, the seconds of the timed part, and what came out, to be compared."""

    units: float
    seconds: float
    outputs: Any = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A contender: its function of the inputs, and the environment it runs in (a file of `perf/peers`, or temper's own).

    `counts`: whether the target speaks of it. The ratio is taken against the fastest side that counts.
    """

    run: Callable[[Any], Measured]
    env: str = OURS
    counts: bool = True


@dataclass(frozen=True)
class Job:
    """A question with a number: the same work on every side, the ratio that is wanted, and what makes results equal."""

    name: str
    about: str
    unit: str
    target: float
    inputs: Callable[[], Any]
    sides: Mapping[str, Side]
    check: Callable[[Mapping[str, Any]], str]
    """From each side's outputs, a sentence on how equal they are; raises AssertionError when they are not."""
    limit: Callable[[Any, Mapping[str, float]], float] | None = None
    """Units a second the machine could do at most, from the inputs and `limits.measure()`."""
    lower_is_better: bool = False
    """The number is seconds a unit and the target an upper bound of the ratio."""
    bound: bool = False
    """The target speaks of each counting side's own number, in the job's unit, and not of a ratio."""


def main(job: Job) -> None:
    """The command line of a job's script."""
    parser = argparse.ArgumentParser(description=job.about)
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each side")
    parser.add_argument("--sides", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job-inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _work(job, options.side, options.job_inputs, options.result)
        return
    chosen = options.sides.split(",") if options.sides else list(job.sides)
    rows = compare(job, chosen, options.repeats)
    for row in rows:
        print(line(row))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def compare(job: Job, sides: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Run the sides in turn, `repeats` times round; one row a side."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.json"
        given = job.inputs()
        inputs.write_text(json.dumps(given), encoding="utf-8")
        for turn in range(repeats):
            for name in sides:
                found[name].append(_start(job, name, inputs, Path(folder) / "result.json"))
                print(
                    f"  {job.name} {turn + 1}/{repeats} {name}: {found[name][-1]['rate']:.4g} {job.unit}",
                    flush=True,
                )
    equal = job.check({name: runs[0]["outputs"] for name, runs in found.items()})
    return [_row(job, name, runs, found, equal, given) for name, runs in found.items()]


def _row(
    job: Job,
    name: str,
    runs: Sequence[Mapping[str, Any]],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    equal: str,
    given: Any,
) -> dict[str, Any]:
    medians = {side: statistics.median(run["rate"] for run in of) for side, of in found.items()}
    peers = [side for side in medians if side != OURS and job.sides[side].counts]
    pick = min if job.lower_is_better else max
    best = pick(peers, key=lambda side: medians[side]) if peers else ""
    row: dict[str, Any] = {
        "job": job.name,
        "side": name,
        "rate": medians[name],
        "unit": job.unit,
        "runs": [run["rate"] for run in runs],
        "peak_mb": max(run["peak_mb"] for run in runs),
        "versions": runs[0]["versions"],
        "notes": runs[0]["notes"],
        "load": [run["load"] for run in runs],
        "equal": equal,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if job.bound and job.sides[name].counts:
        met = medians[name] <= job.target if job.lower_is_better else medians[name] >= job.target
        row |= {"target": job.target, "met": met}
    elif name == OURS and best:
        ratio = medians[name] / medians[best]
        met = ratio <= job.target if job.lower_is_better else ratio >= job.target
        row |= {"against": best, "ratio": ratio, "target": job.target, "met": met}
        if job.limit:
            from limits import measure

            row["limit"] = job.limit(given, measure())
    return row


def line(row: Mapping[str, Any]) -> str:
    """A row as one line of text."""
    text = (
        f"{row['job']:<22} {row['side']:<34} {row['rate']:>9.4g} {row['unit']:<14} {row['peak_mb']:>7.0f} MB"
    )
    if "ratio" in row:
        text += f"   {row['ratio']:.2f}x of {row['against']}"
    if "target" in row:
        text += f" (target {row['target']:g}, {'met' if row['met'] else 'missed'})"
    return text


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, system, date of it is in the row."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [part.split(":", 1)[1].strip() for part in text.splitlines() if part.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads(),
    }


def threads() -> int:
    """Threads a side may use: OMP_NUM_THREADS, else every core."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def _start(job: Job, name: str, inputs: Path, result: Path) -> dict[str, Any]:
    script = Path(sys.modules["__main__"].__file__ or "")
    if script.parent.name != "jobs":
        script = HERE / "jobs" / f"{job.name.replace('-', '_')}.py"
    result.unlink(missing_ok=True)
    command = [str(python_of(job.sides[name].env)), str(script)]
    command += ["--side", name, "--job-inputs", str(inputs), "--result", str(result)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(f"{job.name}: side {name!r} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_DISABLED": "true",
    }
    return {
        **os.environ,
        **quiet,
        "OMP_NUM_THREADS": str(threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _work(job: Job, name: str, inputs: Path, result: Path) -> None:
    """One run of one side, in this process."""
    given = json.loads(inputs.read_text(encoding="utf-8"))
    load = os.getloadavg()[0]
    measured = job.sides[name].run(given)
    rate = measured.seconds / measured.units if job.lower_is_better else measured.units / measured.seconds
    row = asdict(measured) | {
        "rate": rate,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": load,
        "versions": _versions(),
    }
    result.write_text(json.dumps(row), encoding="utf-8")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "torch",
        "transformers",
        "peft",
        "trl",
        "lm_eval",
        "nanogcg",
        "sentence-transformers",
        "faiss-cpu",
        "auto_LiRPA",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def python_of(env: str) -> Path:
    """The interpreter of an environment, made from `perf/peers/<env>.txt` at its first use."""
    if env == OURS:
        return Path(sys.executable)
    wanted = (HERE / "peers" / f"{env}.txt").read_text(encoding="utf-8")
    folder, mark = ENVS / env, ENVS / env / "ready.txt"
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        print(f"  making {folder} from perf/peers/{env}.txt", flush=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, "-c", str(HERE.parent / "constraints.txt"), "torch"], check=True)
        subprocess.run(
            [*pip, "-c", str(HERE.parent / "constraints.txt"), "-r", str(HERE / "peers" / f"{env}.txt")],
            check=True,
        )
        alone = [text.removeprefix(NO_DEPS) for text in wanted.splitlines() if text.startswith(NO_DEPS)]
        if alone:
            subprocess.run([*pip, "--no-deps", *alone], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and its seconds."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def model_folder() -> str:
    """SmolLM2-135M-Instruct as a plain folder, fetched if need be; for `inputs`, which run beside temper."""
    from temper.data.assets import fetch

    return str(fetch("smollm2-135m"))
