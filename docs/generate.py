"""Writes every page and table that comes from the source.

python docs/generate.py                     write what is stale
python docs/generate.py --check             write nothing; exit 1 and name what is stale
python docs/generate.py --demo runs/<id>    fill the README's demo block from a finished run
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The package's own methods are documented; those of the caller's environment are not.
os.environ.pop("TEMPER_METHODS", None)
os.environ["TEMPER_NO_CACHE"] = "1"

from generators.commands import command_page, command_table
from generators.demo import demo_block
from generators.errors import error_page
from generators.markdown import replace_region
from generators.method_pages import method_page
from generators.tables import (
    asset_table,
    builtin_table,
    family_table,
    file_map,
    judge_table,
    methods_page,
)

from temper.core import registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "temper"
METHODS = SOURCE / "methods"

REGIONS = {
    "README.md": {
        "commands": command_table,
        "families": lambda: family_table(METHODS, "docs/methods/"),
    },
    "ARCHITECTURE.md": {"files": lambda: file_map(SOURCE)},
    "docs/concepts/data.md": {
        "builtin": lambda: builtin_table(SOURCE / "data" / "builtin"),
        "assets": lambda: asset_table(SOURCE / "data" / "assets.json"),
    },
    "docs/concepts/evidence.md": {"judges": judge_table},
    "docs/errors.md": {"errors": lambda: error_page(SOURCE)},
}
"""File -> marked region -> what stands in it; the rest of these files is written by hand."""


def expected() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    pages = {DOCS / "methods" / f"{slug}.md": method_page(slug) for slug in registry.slugs()}
    pages[DOCS / "methods" / "index.md"] = methods_page(METHODS)
    pages[DOCS / "cli.md"] = command_page()
    for name, regions in REGIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for region, make in regions.items():
            text = replace_region(text, region, make())
        pages[ROOT / name] = text
    return pages


def stale(pages: dict[Path, str]) -> list[Path]:
    """Files that differ from what they should be, and pages of methods that are gone."""
    differ = [
        path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return differ + [path for path in sorted((DOCS / "methods").glob("*.md")) if path not in pages]


def write(pages: dict[Path, str]) -> list[Path]:
    """Bring every stale file up to date; returns which."""
    changed = stale(pages)
    for path in changed:
        if path in pages:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
        else:
            path.unlink()
    return changed


def main() -> int:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="Generate pages and tables from the source.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    parser.add_argument(
        "--demo", type=Path, metavar="RUN", help="fill the README's demo block from a finished run"
    )
    options = parser.parse_args()
    if options.demo:
        readme = ROOT / "README.md"
        readme.write_text(
            replace_region(readme.read_text(encoding="utf-8"), "demo", demo_block(options.demo))
        )
        return 0
    pages = expected()
    changed = stale(pages) if options.check else write(pages)
    for path in changed:
        print(("stale: " if options.check else "wrote ") + str(path.relative_to(ROOT)))
    if options.check and changed:
        print("run: make generated", file=sys.stderr)
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
