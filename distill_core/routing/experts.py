"""A folder of experts, one for each range of timesteps: ordinary files and a manifest.

experts.json               the ranges and the file of each; written last, so a folder without it is incomplete
range_0.safetensors        the expert of the noisiest range: a UNet that any loader opens
range_1.safetensors        ...
base.safetensors           or one base network for all ranges,
range_0.lora.safetensors   and a LoRA for each range, in kohya's format
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..base.documents import one_line, read_json
from ..base.settings import from_mapping
from ..base.storage import atomic, fingerprint, read_header, write_text
from ..diffusion.ranges import MOST_RANGES, TimestepRanges
from ..diffusion.schedule import NoiseSchedule
from ..networks.files import UNetFile, open_unet
from ..networks.lora_names import kohya_names
from ..pruning.plan import plan_in

MANIFEST = "experts.json"
VERSION = 1
_PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True, kw_only=True)
class ExpertFile:
    """One file of the folder, as listed in the manifest."""

    file: str
    """Name within the folder."""
    fingerprint: str
    """`storage.fingerprint` of its tensors."""
    plan: str | None = None
    """Name of the plan it was pruned with."""
    steps: int | None = None
    """Training steps in its range; for a base, over all timesteps."""


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    version: int
    num_timesteps: int
    boundaries: tuple[float, ...]
    teacher: str


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A folder of experts, read and checked."""

    folder: Path
    ranges: TimestepRanges
    members: tuple[ExpertFile, ...]
    """One for each range, noisiest first."""
    base_file: ExpertFile | None = None
    teacher: str
    """`storage.fingerprint` of their teacher."""

    @classmethod
    def read(cls, folder: Path | str) -> Experts:
        """Read a folder; ``ValueError`` if it is incomplete, or its files do not match."""
        folder = Path(folder)
        table = _read_manifest(folder)
        experts, base = table.pop("experts", None), table.pop("base", None)
        if table.get("version") != VERSION:
            raise ValueError(
                f"{folder / MANIFEST} has version {one_line(repr(table.get('version')))}, but this library reads {VERSION}; "
                "update the library, or train again"
            )
        if not isinstance(experts, list) or not all(isinstance(entry, dict) for entry in [*experts, base or {}]):
            raise ValueError(f"{folder / MANIFEST}: experts must list one table for each range; train again")
        manifest = from_mapping(_Manifest, table, str(folder / MANIFEST))
        if len(experts) > MOST_RANGES:
            raise ValueError(
                f"{folder / MANIFEST} lists {len(experts):,} experts, but at most {MOST_RANGES} are possible; train again"
            )
        members = tuple(_member(entry, folder) for entry in experts)
        if len(members) != len(manifest.boundaries) + 1:
            raise ValueError(
                f"{folder / MANIFEST}: {len(manifest.boundaries)} boundaries make {len(manifest.boundaries) + 1} ranges, "
                f"but there are {len(members)} experts; train again"
            )
        found = cls(
            folder=folder,
            ranges=TimestepRanges(manifest.boundaries, manifest.num_timesteps),
            members=members,
            base_file=_member(base, folder) if base else None,
            teacher=manifest.teacher,
        )
        _check(found)
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """One path for each range, noisiest first: UNets, or LoRAs on the base."""
        return tuple(self.folder / member.file for member in self.members)

    @property
    def to_load(self) -> tuple[Path, ...]:
        """The same paths; a file with several names always has the first one, so that it is loaded only once."""
        first: dict[tuple[int, int], Path] = {}
        return tuple(first.setdefault((path.stat().st_dev, path.stat().st_ino), path) for path in self.files)

    @property
    def base(self) -> Path | None:
        """The base network of all LoRAs; None if each expert is a network of its own."""
        return None if self.base_file is None else self.folder / self.base_file.file

    def unet(self, number: int) -> UNetFile:
        """The network of a range; weights are read when needed."""
        return open_unet(self.base or self.files[number])

    @property
    def num_bytes(self) -> int:
        """Size of all weights on disk."""
        return sum(path.stat().st_size for path in (*self.files, *filter(None, [self.base])))

    def describe(self, schedule: NoiseSchedule) -> str:
        """One line per range, with its file."""
        lines = self.ranges.describe(schedule).splitlines()
        members = self.members
        beneath = [f"on {self.base.name}"] if self.base else []
        return "\n".join([
            *beneath,
            *(f"{line}: {member.file}" + (f", {member.plan}" if member.plan else "") for line, member in zip(lines, members, strict=True)),
        ])  # fmt: skip


def write_experts(
    folder: Path | str,
    ranges: TimestepRanges,
    files: Sequence[Path],
    *,
    base: Path | None = None,
    teacher: str,
    steps: Sequence[int] | None = None,
    base_steps: int | None = None,
) -> Experts:
    """Write a folder of experts from finished files, noisiest first: UNets, or LoRAs on a base. A file may appear twice.

    Files are hard-linked, or copied if that fails, so that the originals may be deleted. Existing files in the folder are
    replaced; it is incomplete until the manifest is written. ``ValueError`` if the files do not match.
    """
    folder = Path(folder)
    if len(files) != len(ranges):
        raise ValueError(f"there are {len(ranges)} ranges but {len(files)} experts; give one expert per range")
    (folder / MANIFEST).unlink(missing_ok=True)
    names = [f"range_{number}{'.lora' if base else ''}.safetensors" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        _place(file, folder / name)
    if base is not None:
        _place(base, folder / "base.safetensors")
    counts: Sequence[int | None] = steps or [None] * len(files)
    experts = Experts(
        folder=folder,
        ranges=ranges,
        members=tuple(_describe(folder / name, count, lora=base is not None) for name, count in zip(names, counts, strict=True)),
        base_file=None if base is None else _describe(folder / "base.safetensors", base_steps, lora=False),
        teacher=teacher,
    )
    _check(experts)
    manifest = {
        "version": VERSION,
        "num_timesteps": ranges.num_timesteps,
        "boundaries": ranges.boundaries,
        "teacher": teacher,
        "base": experts.base_file and asdict(experts.base_file),
        "experts": [asdict(member) for member in experts.members],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return experts


def _place(source: Path, target: Path) -> None:
    with atomic(target, overwrite=True) as made:
        try:
            os.link(source, made)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source, made)


def _describe(path: Path, steps: int | None, *, lora: bool) -> ExpertFile:
    plan = None if lora else plan_in(open_unet(path).metadata)
    name = None if plan is None else plan.name
    return ExpertFile(file=path.name, fingerprint=fingerprint(read_header(path).tensors), plan=name, steps=steps)


# --- checks ---------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is not a folder of experts, or the training is not finished; "
            "choose another folder, or finish the training"
        )
    return read_json(path)


def _member(entry: dict, folder: Path) -> ExpertFile:
    entry = {name: value for name, value in entry.items() if value is not None}
    member = from_mapping(ExpertFile, entry, str(folder / MANIFEST))
    if not _PLAIN_NAME.fullmatch(member.file):
        raise ValueError(
            f"{folder / MANIFEST} names {one_line(member.file)!r}, which is not a .safetensors file in its folder; train again"
        )
    return member


def _check(experts: Experts) -> None:
    """Raise ``ValueError`` unless the files match the manifest and have the same inputs and outputs."""
    for member in filter(None, (*experts.members, experts.base_file)):
        if fingerprint(read_header(experts.folder / member.file).tensors) != member.fingerprint:
            raise ValueError(
                f"{experts.folder / member.file} is not the file listed in {MANIFEST}; restore it, or copy the folder again"
            )
    if experts.base is not None:
        _check_loras(experts, experts.base)
        return
    first, *others = [_kind(open_unet(path)) for path in experts.files]
    for path, other in zip(experts.files[1:], others, strict=True):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"{path.name} has {name} {other[name]}, but {experts.files[0].name} has {value}; "
                    "use experts with the same inputs and outputs"
                )


def _kind(file: UNetFile) -> dict[str, object]:
    """Properties that all experts must share."""
    architecture = file.architecture
    return {
        "sampling": file.sampling.describe(),
        "family": architecture.family,
        "latent channels": (architecture.channels("conv_in")[0], architecture.channels("conv_out")[1]),
        "context width": architecture.context_width,
    }


def _check_loras(experts: Experts, base: Path) -> None:
    layers = set(kohya_names(open_unet(base).architecture).values())
    for path in experts.files:
        if strange := {name.partition(".")[0] for name in read_header(path).tensors} - layers:
            raise ValueError(
                f"{path.name} has a LoRA for {min(strange)}, but {base.name} has no such layer; use LoRAs for this base"
            )
