"""`temper new`."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from temper.cli.output import AsJson, print_json
from temper.core import registry
from temper.core.errors import ConfigError
from temper.store.atomic import disk_errors

__all__ = ["new_command", "register", "write_scratch"]

FILES = {"card.py": "card.py.txt", "method.py": "method.py.txt", "recipes.yaml": "recipes.yaml.txt"}


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(new_command)


def new_command(
    name: Annotated[str, typer.Argument(help="family/name, e.g. unlearning/my_method")],
    into: Annotated[
        str | None, typer.Option(help="Folder of families; the package's own in a checkout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a complete method that runs, to be changed into yours."""
    family, _, method = name.replace("-", "_").partition("/")
    for part in (family, method):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", part):
            raise ConfigError(
                f"{name!r} is not family/name", cure="Use small letters, digits and _: unlearning/my_method."
            )
    slug = method.replace("_", "-")
    if slug in registry.entries():
        raise ConfigError(
            f"There is a method {slug!r}", where=str(registry.find(slug).folder), cure="Choose another."
        )
    root = Path(into) if into else _default_root()
    folder = write_scratch(root, family, method)
    listed = root.resolve() in {Path(p).resolve() for p in [str(registry.BUILTIN), *_extra()]}
    hint = "" if listed else f"export TEMPER_METHODS={root.resolve()}"
    if as_json:
        print_json({"slug": slug, "folder": str(folder), "files": sorted(p.name for p in folder.iterdir())})
        return
    print(folder)
    for line in filter(None, (hint, f"temper run {slug} --recipe tiny", f"pytest {folder}")):
        print(f"  {line}")


def _extra() -> list[str]:
    return [part for part in os.environ.get("TEMPER_METHODS", "").split(os.pathsep) if part]


def _default_root() -> Path:
    """The package's own methods in a checkout, else the first folder of TEMPER_METHODS, else ./methods."""
    if (registry.BUILTIN.parents[2] / "pyproject.toml").is_file():
        return registry.BUILTIN
    return Path(_extra()[0]) if _extra() else Path("methods")


def write_scratch(root: Path, family: str, method: str) -> Path:
    """Write the scratch method's files; raises ConfigError when its folder is there."""
    folder = root / family / method
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} is there already", cure="Choose another name.")
    slug = method.replace("_", "-")
    # A method outside the package has no fixed package name, so its modules name each other relatively.
    home = f"temper.methods.{family}.{method}" if root.resolve() == registry.BUILTIN else ""
    words = {"name": method, "slug": slug, "title": slug.replace("-", " ").capitalize(), "home": home}
    scratch = resources.files("temper.cli.scratch")
    with disk_errors("write", folder):
        folder.mkdir(parents=True)
        for target, source in {**FILES, f"test_{method}.py": "test.py.txt"}.items():
            text = scratch.joinpath(source).read_text(encoding="utf-8")
            (folder / target).write_text(Template(text).substitute(words), encoding="utf-8")
        (folder / "evidence.jsonl").touch()
        (folder / "__init__.py").touch()
        if not (folder.parent / "__init__.py").exists():
            about = f'"""{family.replace("_", " ").capitalize()}: what its methods have in common."""\n'
            (folder.parent / "__init__.py").write_text(about)
    return folder
