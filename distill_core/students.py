"""A folder of students, one for each range of timesteps: one artefact of ordinary files and a manifest.

students.json              the ranges, and which file is in charge of each; written last, so that a folder without it is unfinished
range_0.safetensors        the student of the least noisy range: a UNet that any loader opens
range_1.safetensors        ...
base.safetensors           or one network for all of them,
range_0.lora.safetensors   and for each range a LoRA on it, as kohya's trainer writes them
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .documents import one_line, read_json
from .files import UNetFile, open_unet
from .lora import kohya_names
from .ranges import MOST_RANGES, TimestepRanges
from .recipe import from_mapping
from .schedule import NoiseSchedule
from .storage import atomic, fingerprint, read_header, write_text

MANIFEST = "students.json"
VERSION = 1
_PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of the folder, as the manifest tells of it."""

    file: str
    """Name within the folder."""
    fingerprint: str
    """`storage.fingerprint` of its tensors."""
    plan: str | None = None
    """Name of the plan it was pruned with."""
    steps: int | None = None
    """Training steps it had in its range; of a base, over all timesteps."""


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    version: int
    num_timesteps: int
    boundaries: tuple[float, ...]
    teacher: str


@dataclass(frozen=True, kw_only=True)
class Students:
    """A folder of students that was read and checked."""

    folder: Path
    ranges: TimestepRanges
    members: tuple[Member, ...]
    """One for each range, the least noisy first."""
    base_member: Member | None = None
    teacher: str
    """`storage.fingerprint` of the teacher they learnt from."""

    @classmethod
    def read(cls, folder: Path | str) -> Students:
        """Read a folder; ``ValueError`` if it is unfinished, or holds files that do not belong together."""
        folder = Path(folder)
        table = _read_manifest(folder)
        students, base = table.pop("students", None), table.pop("base", None)
        if table.get("version") != VERSION:
            raise ValueError(
                f"{folder / MANIFEST} is of version {one_line(repr(table.get('version')))}, this library reads version {VERSION}; update it, or train again"
            )
        if not isinstance(students, list) or not all(isinstance(entry, dict) for entry in [*students, base or {}]):
            raise ValueError(f"{folder / MANIFEST}: students must list one table for each range; train again")
        manifest = from_mapping(_Manifest, table, str(folder / MANIFEST))
        if len(students) > MOST_RANGES:
            raise ValueError(
                f"{folder / MANIFEST} lists {len(students):,} students, more than the {MOST_RANGES} there may be; train again"
            )
        members = tuple(_member(entry, folder) for entry in students)
        if len(members) != len(manifest.boundaries) + 1:
            raise ValueError(
                f"{folder / MANIFEST}: {len(manifest.boundaries)} boundaries make {len(manifest.boundaries) + 1} ranges, "
                f"but there are {len(members)} students; train again"
            )
        found = cls(
            folder=folder,
            ranges=TimestepRanges(manifest.boundaries, manifest.num_timesteps),
            members=members,
            base_member=_member(base, folder) if base else None,
            teacher=manifest.teacher,
        )
        _check(found)
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """One for each range, the least noisy first: UNets, or LoRAs on the base."""
        return tuple(self.folder / member.file for member in self.members)

    @property
    def to_load(self) -> tuple[Path, ...]:
        """The same, a file that has several names each time by the first of them, so that it need be loaded only once."""
        first: dict[tuple[int, int], Path] = {}
        return tuple(first.setdefault((path.stat().st_dev, path.stat().st_ino), path) for path in self.files)

    @property
    def base(self) -> Path | None:
        """The one network all LoRAs are on; None where each student is a network of its own."""
        return None if self.base_member is None else self.folder / self.base_member.file

    def unet(self, number: int) -> UNetFile:
        """The network of a range; weights are read when asked for."""
        return open_unet(self.base or self.files[number])

    @property
    def num_bytes(self) -> int:
        """Of all weights on disk."""
        return sum(path.stat().st_size for path in (*self.files, *filter(None, [self.base])))

    def describe(self, schedule: NoiseSchedule) -> str:
        """A line a range, the noisiest first, and what is in charge of it."""
        lines = self.ranges.describe(schedule).splitlines()
        members = reversed(self.members)
        beneath = [f"on {self.base.name}"] if self.base else []
        return "\n".join([
            *beneath,
            *(f"{line}: {member.file}" + (f", {member.plan}" if member.plan else "") for line, member in zip(lines, members, strict=True)),
        ])  # fmt: skip


def write_students(
    folder: Path | str,
    ranges: TimestepRanges,
    files: Sequence[Path],
    *,
    base: Path | None = None,
    teacher: str,
    steps: Sequence[int] | None = None,
    base_steps: int | None = None,
) -> Students:
    """Put finished files together, the least noisy first: UNets, or with a base LoRAs on it. They may be one file twice.

    Files are linked, or copied where that cannot be, so that they may go where they come from. What the folder held is
    replaced; until the manifest is there, it is unfinished. ``ValueError`` if the files do not belong together.
    """
    folder = Path(folder)
    if len(files) != len(ranges):
        raise ValueError(f"{len(ranges)} ranges need as many students, got {len(files)}")
    (folder / MANIFEST).unlink(missing_ok=True)
    names = [f"range_{number}{'.lora' if base else ''}.safetensors" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        _place(file, folder / name)
    if base is not None:
        _place(base, folder / "base.safetensors")
    counts = steps or [None] * len(files)
    students = Students(
        folder=folder,
        ranges=ranges,
        members=tuple(_describe(folder / name, count, lora=base is not None) for name, count in zip(names, counts, strict=True)),
        base_member=None if base is None else _describe(folder / "base.safetensors", base_steps, lora=False),
        teacher=teacher,
    )
    _check(students)
    manifest = {
        "version": VERSION,
        "num_timesteps": ranges.num_timesteps,
        "boundaries": ranges.boundaries,
        "teacher": teacher,
        "base": students.base_member and asdict(students.base_member),
        "students": [asdict(member) for member in students.members],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return students


def _place(source: Path, target: Path) -> None:
    with atomic(target, overwrite=True) as made:
        try:
            os.link(source, made)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source, made)


def _describe(path: Path, steps: int | None, *, lora: bool) -> Member:
    plan = None if lora else open_unet(path).plan
    return Member(file=path.name, fingerprint=fingerprint(read_header(path).tensors), plan=plan and plan.name, steps=steps)


# --- checks ---------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no {MANIFEST}: it is no folder of students, or its training has not finished")
    return read_json(path)


def _member(entry: dict, folder: Path) -> Member:
    entry = {name: value for name, value in entry.items() if value is not None}
    member = from_mapping(Member, entry, str(folder / MANIFEST))
    if not _PLAIN_NAME.fullmatch(member.file):
        raise ValueError(
            f"{folder / MANIFEST} names {one_line(member.file)!r}, which is no .safetensors file in its folder; train again"
        )
    return member


def _check(students: Students) -> None:
    """``ValueError`` unless the files are those the manifest tells of, and can stand in for each other."""
    for member in filter(None, (*students.members, students.base_member)):
        if fingerprint(read_header(students.folder / member.file).tensors) != member.fingerprint:
            raise ValueError(
                f"{students.folder / member.file} is not the file {MANIFEST} tells of; put the right one back, or copy the folder again"
            )
    if students.base is not None:
        _check_loras(students)
        return
    first, *others = [_kind(open_unet(path)) for path in students.files]
    for path, other in zip(students.files[1:], others, strict=True):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"{path.name} has {name} {other[name]}, {students.files[0].name} has {value}; "
                    "students of one folder must stand in for each other"
                )


def _kind(file: UNetFile) -> dict[str, object]:
    """What students must have in common."""
    architecture = file.architecture
    return {
        "sampling": file.sampling.describe(),
        "family": architecture.family,
        "latent channels": (architecture.channels("conv_in")[0], architecture.channels("conv_out")[1]),
        "context width": architecture.context_width,
    }


def _check_loras(students: Students) -> None:
    layers = set(kohya_names(open_unet(students.base).architecture).values())
    for path in students.files:
        if strange := {name.partition(".")[0] for name in read_header(path).tensors} - layers:
            raise ValueError(
                f"{path.name} has a LoRA for {min(strange)}, which {students.base.name} has not; they do not belong together"
            )
