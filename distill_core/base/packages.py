"""Python packages, and the pip command for those that are missing or too old, shown before the work that needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

REQUIRED = (
    "diffusers>=0.37",
    "einops",
    "filelock",
    "matplotlib",
    "peft>=0.15",
    "psutil",
    "safetensors>=0.4.3",
    "tomli_w",
    "tqdm",
) + ("tomli",) * (sys.version_info < (3, 11))
"""Packages that the nodes and the library need besides torch, as pip takes them."""


def check_installed(packages: Iterable[str], who: str) -> None:
    """``ValueError`` with the pip command if packages are missing or too old. packages: as pip takes them, ``name>=1.2``."""
    if lacking := [package for package in packages if not _is_installed(package)]:
        what = "a package" if len(lacking) == 1 else "packages"
        line = " ".join(f'"{package}"' if ">" in package else package for package in lacking)
        raise ValueError(f"{who} needs {what}: python -m pip install {line}")


def _is_installed(package: str) -> bool:
    name, _, least = package.partition(">=")
    try:
        return find_spec(name.replace("-", "_")) is not None and (not least or _numbers(version(name)) >= _numbers(least))
    except (ImportError, PackageNotFoundError):
        return False


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers at the start of a version: ``0.30.1.dev0`` is (0, 30, 1)."""
    return tuple(int(number) for number in re.split(r"[^\d.]", text, maxsplit=1)[0].split(".") if number)
