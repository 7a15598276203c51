"""Every job, one after another: `python perf/run.py [JOB ...] [--repeats 3]`; then the table in `perf/README.md`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from datetime import UTC, datetime
from typing import Any

from harness import HERE, compare, line

sys.path.insert(0, str(HERE / "jobs"))


def main() -> None:
    """Run the jobs named, or all of them, and append their rows to `perf/results/<date>.jsonl`."""
    names = sorted(path.stem for path in (HERE / "jobs").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", choices=[*names, []], help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
    results.parent.mkdir(exist_ok=True)
    for name in options.jobs or names:
        job = importlib.import_module(name).JOB
        rows = compare(job, list(job.sides), options.repeats)
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            print(line(row), flush=True)
    write_table()


def write_table() -> None:
    """The last row of each job and side, as the table between the marks of `perf/README.md`."""
    rows = {}
    for results in sorted((HERE / "results").glob("*.jsonl")):
        for text in results.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            rows[row["job"], row["side"]] = row
    lines = [
        "| job | side | rate, median | runs | peak memory | ratio | target | share of the machine's limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        ratio = f"{row['ratio']:.2f} of {row['against']}" if "ratio" in row else ""
        target = f"{row['target']:g} ({'met' if row['met'] else 'missed'})" if "target" in row else ""
        share = f"{_share(row):.0%}" if "limit" in row else ""
        rate = f"{row['rate']:.4g} {row['unit']} | {len(row['runs'])} | {row['peak_mb']:.0f} MB"
        lines.append(f"| {row['job']} | {row['side']} | {rate} | {ratio} | {target} | {share} |")
    page = HERE / "README.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- /table -->\n")
    page.write_text(
        head + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- /table -->\n" + tail, encoding="utf-8"
    )


def _share(row: dict[str, Any]) -> float:
    """Our part of what the machine could do; a limit of seconds is the least there could be."""
    is_time = row["unit"].startswith("s/")
    return row["limit"] / row["rate"] if is_time else row["rate"] / row["limit"]


if __name__ == "__main__":
    main()
