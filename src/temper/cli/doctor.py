"""`temper doctor`: this machine only, no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import typer

from temper.cli.output import AsJson, bytes_text, print_json, print_table
from temper.run.code import version
from temper.run.estimate import free_memory
from temper.store.cache import cache_root, is_off

__all__ = ["doctor_command", "register"]

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
EXTRAS = ("openai", "jinja2", "matplotlib", "datasets", "pyarrow", "ray", "mlflow", "vllm")


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(doctor_command)


def doctor_command(as_json: AsJson = False) -> None:
    """Print versions, hardware, cache and disk; exit 1 when something needed is missing or broken."""
    record = _record()
    if as_json:
        print_json(record)
    else:
        rows = [(section, name, value) for section in ("versions", "extras", "machine", "storage")
                for name, value in record[section].items()]  # fmt: skip
        print_table(("", "what", "found"), [(s, n, _shown(n, v)) for s, n, v in rows])
        for problem in record["problems"]:
            print(f"problem: {problem}")
        print("no problems" if not record["problems"] else f"{len(record['problems'])} problems")
    if record["problems"]:
        raise typer.Exit(1)


def _shown(name: str, value: Any) -> str:
    return bytes_text(value) if name.endswith("_bytes") else "-" if value is None else str(value)


def _record() -> dict[str, Any]:
    versions = {
        "temper": version(),
        "python": platform.python_version(),
        **{n: _version(n) for n in PACKAGES},
    }
    problems = [
        f"{name} is not installed; pip install temper-ml" for name in PACKAGES if versions[name] is None
    ]
    machine = _machine(problems)
    storage = _storage(problems)
    if _version("torchvision") is not None:
        problems.append("torchvision is installed; it is never needed, and one of another build breaks torch")
    extras = {name: _version(name) for name in EXTRAS}
    return {
        "versions": versions,
        "extras": extras,
        "machine": machine,
        "storage": storage,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(problems: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "free_memory_bytes": free_memory(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if importlib.util.find_spec("torch") is None:
        return record
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported: {error}")
        return record
    has_cuda = torch.cuda.is_available()
    flags = _flags()
    return record | {
        "torch_build": "cuda " + str(torch.version.cuda) if torch.version.cuda else "cpu",
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": torch.cuda.device_count() if has_cuda else 0,
        "bf16_native": "yes" if flags & {"amx_bf16", "avx512_bf16"} else "no",
        "bf16_cuda": torch.cuda.is_bf16_supported() if has_cuda else None,
    }


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.split())


def _storage(problems: list[str]) -> dict[str, Any]:
    cache = cache_root()
    root = cache
    while not root.exists():
        root = root.parent
    if not os.access(root, os.W_OK):
        problems.append(f"the cache {cache} cannot be written; set TEMPER_CACHE to another folder")
    return {
        "cache": str(cache),
        "cache_off": is_off(),
        "cache_used_bytes": sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
        if cache.exists()
        else 0,
        "cache_free_bytes": shutil.disk_usage(root).free,
        "here_free_bytes": shutil.disk_usage(".").free,
    }
