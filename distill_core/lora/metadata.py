"""Metadata that diffusers writes in a LoRA file: peft's configuration, as JSON.

The tensors of such a file have no alpha. peft computes ``W + alpha / r * B A``, with ``alpha / sqrt(r)`` where ``use_rslora``
is on (Kalajdzievski 2023, arXiv 2312.03732), and takes alpha and r of a layer from the first pattern that matches its path
(peft 0.21, ``get_pattern_key``). Layers are named as diffusers does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, sqrt
from typing import Any

from .tensors import Shape, rank

KEY = "lora_adapter_metadata"
"""Key of the metadata."""
_DEFAULT = 8
"""Default rank and alpha of peft."""
_MOST_PATTERNS = 4096
"""More than any network has layers."""
_LONGEST_PATH = 200
"""More characters than the path of any layer has."""
_MOST_CHOICES, _MOST_CHOICES_OF_ALL = 3, 48
"""Places in one pattern, and in all, where the matcher must guess: each multiplies its time by the length of a path."""


@dataclass(frozen=True)
class PeftConfig:
    """peft's configuration of the LoRA of one network."""

    fields: Mapping[str, Any]
    """The whole configuration, as it is written."""

    def __post_init__(self):
        self._number("r", self.fields.get("r", _DEFAULT))
        self._number(self._alpha_field, self.fields.get(self._alpha_field, _DEFAULT))
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_patterns(name)

    @property
    def _alpha_field(self) -> str:
        """Name of alpha in a LoRA, or in a LoKr."""
        return "alpha" if "alpha" in self.fields and "lora_alpha" not in self.fields else "lora_alpha"

    @staticmethod
    def _number(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and isfinite(value)
        whole = name.startswith("r")
        if not is_number or (whole and (value < 1 or value != int(value))):
            kind = "a whole number above 0" if whole else "a number"
            raise ValueError(f"{KEY}: {name} must be {kind}, got {str(value)[:40]!r}; save the LoRA again with diffusers")

    def _patterns(self, name: str) -> Mapping[str, float]:
        return self.fields.get(name) or {}

    def _check_patterns(self, name: str) -> None:
        patterns = self._patterns(name)
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise ValueError(
                f"{KEY}: {name} must map at most {_MOST_PATTERNS} layers to numbers; save the LoRA again with diffusers"
            )
        for pattern, value in patterns.items():
            self._number(f"{name} of {pattern!r}", value)
            _compiled(pattern)
        if sum(map(_num_choices, patterns)) > _MOST_CHOICES_OF_ALL:
            raise ValueError(f"{KEY}: {name} has too many patterns with wildcards; name the layers by their paths instead")

    def _of(self, path: str, patterns: str, field: str) -> float:
        """Value for a layer: that of the first pattern that matches, else that of the field."""
        if len(path) > _LONGEST_PATH:
            raise ValueError(f"{path[:60]!r}... is too long for the name of a layer; the LoRA is damaged, or not one")
        for pattern, value in self._patterns(patterns).items():
            if _compiled(pattern).match(path):
                return value
        return self.fields.get(field, _DEFAULT)

    def alpha(self, path: str) -> float:
        return self._of(path, "alpha_pattern", self._alpha_field)

    def scale(self, path: str, rank: int | None) -> float:
        """Factor on the product of a layer's matrices. rank: of the matrices; None if they have none."""
        r = self._of(path, "rank_pattern", "r") if rank is None else rank
        return self.alpha(path) / (sqrt(r) if self.fields.get("use_rslora") else r)

    def moved(self, paths: Mapping[str, str], ranks: Mapping[str, int | None], saved: Mapping[str, str]) -> PeftConfig:
        """The configuration of the same LoRA on a student.

        paths: layers that stay, by the teacher's path -> the student's. ranks: of their matrices, by the teacher's path.
        saved: the same for layers that are stored whole. Patterns become the paths they match, so that none matches another
        layer of the student.
        """
        alphas = {new: self.alpha(old) for old, new in paths.items()}
        sizes = {new: ranks[old] or self._of(old, "rank_pattern", "r") for old, new in paths.items()}
        common = {name: self.fields.get(name, _DEFAULT) for name in ("r", self._alpha_field)}
        resolved = {
            "rank_pattern": {path: size for path, size in sizes.items() if size != common["r"]},
            "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != common[self._alpha_field]},
            "target_modules": sorted(paths.values()),
            "modules_to_save": sorted(saved.values()) or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        return PeftConfig({**self.fields, **{name: value for name, value in resolved.items() if value or name in self.fields}})


def _num_choices(pattern: str) -> int:
    return len(re.findall(r"[*+?{|]", re.sub(r"\\.", "", pattern)))


@lru_cache(2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern:
    """A pattern as peft matches it; ``ValueError`` if it is invalid, or could run forever on a hostile file."""
    repeats_a_group = re.search(r"\)[*+?{]", re.sub(r"\\.", "", pattern))
    try:
        if len(pattern) <= 500 and _num_choices(pattern) <= _MOST_CHOICES and not repeats_a_group:
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        pass
    raise ValueError(
        f"{KEY}: {pattern[:60]!r} is not a pattern of layers that can be matched here; name the layers by their paths instead"
    )


def read_configs(metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Network (``unet``, ``text_encoder``, or an empty name if the file has one network) -> its configuration.

    ``ValueError`` if diffusers would not write such a text.
    """
    if KEY not in metadata:
        return {}
    try:
        entries = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{KEY} is not JSON; save the LoRA again with diffusers") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{KEY} must be a JSON object, got {str(entries)[:40]!r}; save the LoRA again with diffusers")
    networks: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        network, _, field = name.rpartition(".")
        networks.setdefault(network, {})[field] = value
    return {network: PeftConfig(fields) for network, fields in networks.items()}


def alpha_of(config: PeftConfig | None, path: str, keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> float | None:
    """The alpha of a layer that peft's configuration alone gives; None if a tensor gives it, or nothing has one.

    path: peft's. keys, shapes: of the layer's tensors, by role. ``ValueError`` for a strength that no alpha can say.
    """
    if config is None or "alpha" in keys or not keys.keys() & {"lora_up", "hada_w1_a", "lokr_w1", "lokr_w1_a"}:
        return None
    inner = rank(shapes)
    scale = config.scale(path, inner)
    if inner is None and scale != 1:
        raise ValueError(
            f"{keys['lokr_w1']} is part of a full LoKr with scale {scale:g}, which ComfyUI does not read; use this LoRA in "
            "diffusers, in the diffusers layout"
        )
    return None if inner is None else scale * inner


def written(configs: Mapping[str, PeftConfig]) -> str:
    """Configurations as the text that diffusers reads."""
    entries = {
        f"{network}.{name}".lstrip("."): value for network, config in configs.items() for name, value in config.fields.items()
    }
    return json.dumps(entries, indent=2, sort_keys=True)
