"""Runs that are killed and go on, against one nobody interrupted: ``python benchmarks/killed_and_resumed.py``.

Each of 30 runs of ``distill train`` on the demo is killed with SIGKILL at random moments, once or more, and resumed until it
comes to its end. Student, optimiser, moving average and metrics must be those of the uninterrupted run, bit for bit; exit
status 1 if they are not. ``--through-node`` does the same by Distill Train Step in ComfyUI servers that are killed; ``--heal`` too, for
the demo's transformer, which is cut and taught: folded blocks by themselves first, then the whole on the weights it shares with its
teacher. Writes ``results/killed_and_resumed.md`` (``-node``, ``-heal``).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from report import device_words, publish, table
from tqdm import tqdm

from distill_core.base.settings import to_toml
from distill_core.base.storage import read_header
from distill_core.cli import main as main_of_distill
from distill_core.demo.grammar import random_scenes
from distill_core.training.checkpoints import TRAINING, checkpoints_in, result_in

ROOT = Path(__file__).parents[1]
TRAINED = {
    "total_steps": 30, "batch_size": 4, "learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_steps": 5, "save_every_steps": 3,
    "caption_dropout": 0.2, "seed": 0,
}  # fmt: skip
OPTIONS = {
    "accumulation_steps": 2, "weighting": "min-snr", "noise_offset": 0.05, "ema_decay": 0.95, "gradient_checkpointing": True,
    "validation_share": 0.25, "validate_every_steps": 8, "keep_best": 1,
}  # fmt: skip
JOB = {
    "teacher": {"file": "demo"},
    "student": {"preset": "bk-sdm-small"},
    "data": {"prompts": "prompts.txt", "resolution": "64", "guidance": 2.0, "sampler_steps": 4, "images_per_prompt": 5},
    "training": TRAINED | OPTIONS,
}
HEALED = {
    "objective": "blocks", "local_steps": 15, "lora_rank": 8, "gradient_checkpointing": True, "accumulation_steps": 2,
    "ema_decay": 0.95, "validation_share": 0.01, "validate_every_steps": 8, "keep_best": 1,
}  # fmt: skip
PLAN = "fold double 1-2 single 1-3"
PARTS = ("student", "optimiser and weights", "metrics")


class Launch(Protocol):
    """A process that trains a run to its end."""

    def finished(self) -> bool:
        """Whether the run came to its end; ``RuntimeError`` if it failed."""

    def kill(self) -> None:
        """End it by SIGKILL, whether it is finished or not."""


class Way(NamedTuple):
    """How runs are trained."""

    launch: Callable[[str], Launch]
    """Starts a run of a name, or goes on with it."""
    folder: Callable[[str], Path]
    """Where the run of a name is."""
    title: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--through-node", action="store_true", help="by the node in ComfyUI")
    ways.add_argument("--heal", action="store_true", help="a cut transformer, by the node in ComfyUI")
    parser.add_argument("--runs", type=int, help="how many runs (default: 30, in ComfyUI 5)")
    parser.add_argument("--seed", type=int, default=0, help="decides when to kill (default: %(default)s)")
    arguments = parser.parse_args()
    in_comfyui, settings = arguments.through_node or arguments.heal, HEALED if arguments.heal else OPTIONS
    num_runs = arguments.runs or (5 if in_comfyui else 30)
    started, chance = time.monotonic(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        way = _by_node(Path(folder), arguments.heal) if in_comfyui else _by_command(Path(folder))
        seconds = _uninterrupted(way)
        kills, same = [], Counter()
        for number in tqdm(range(num_runs)):
            kills += _killed_and_resumed(way, f"run {number}", seconds, chance)
            same.update(_same_parts(way.folder("whole"), way.folder(f"run {number}")))
            shutil.rmtree(way.folder(f"run {number}"))
    moments = Counter(kills)
    rows = [[moment, str(moments[moment])] for moment in sorted(moments, key=_order)]
    lines = [
        *table(["killed", "times"], [*rows, ["in all", str(len(kills))]]), "",
        *table(["the same bit for bit", "runs"], [[part, f"{same[part]} of {num_runs}"] for part in PARTS]), "",
        f"Runs by {way.title}, {TRAINED['total_steps']} steps each, a checkpoint every {TRAINED['save_every_steps']}; "
        f"{', '.join(f'{name} {value}' for name, value in settings.items())}. Killed at random between the start and the "
        f"{seconds:.1f} seconds the uninterrupted run took, until done. {device_words()}, {(time.monotonic() - started) / 60:.1f} minutes.",
    ]  # fmt: skip
    publish("killed_and_resumed" + "-node" * arguments.through_node + "-heal" * arguments.heal, lines)
    return int(any(same[part] < num_runs for part in PARTS))


# --- one run


def _uninterrupted(way: Way) -> float:
    """Train a run nobody interrupts; returns the seconds it took."""
    launch, started = way.launch("whole"), time.monotonic()
    _wait(launch)
    return time.monotonic() - started


def _wait(launch: Launch, seconds: float = math.inf) -> bool:
    """Let a process run for some seconds, or to the end, then kill it; returns whether it had finished."""
    deadline = time.monotonic() + seconds
    while not (finished := launch.finished()) and time.monotonic() < deadline:
        time.sleep(0.005)
    launch.kill()
    return finished


def _killed_and_resumed(way: Way, name: str, seconds: float, chance: random.Random) -> list[str]:
    """Kill a run again and again until it comes to its end before that; returns the moments, one at least."""
    moments = []
    while True:
        known = _table_of_metrics(way.folder(name))
        if not _wait(way.launch(name), chance.uniform(0, seconds)):
            moments.append(_moment(way.folder(name), known))
        elif moments:
            return moments
        else:  # faster than the uninterrupted run: once more from the beginning
            shutil.rmtree(way.folder(name))


BEFORE, SAVING = "before a step was done", "while a checkpoint was being written or deleted"


def _moment(folder: Path, known: bytes) -> str:
    """Into what a kill fell. known: the metrics there were when the process began."""
    checkpoints = folder / "checkpoints"
    if list(checkpoints.glob(".*")) or any(len(list(path.iterdir())) < 2 for path in checkpoints_in(folder)):
        return SAVING
    if _table_of_metrics(folder) == known or not (step := _steps(folder)):
        return BEFORE
    tenth = (step - 1) // 10 * 10
    return f"after step {tenth + 1} to {min(tenth + 10, TRAINED['total_steps'])}"


def _order(moment: str) -> tuple[int, int]:
    kinds = {BEFORE: 0, SAVING: 2}
    return kinds.get(moment, 1), 0 if moment in kinds else int(moment.split()[2])


def _table_of_metrics(folder: Path) -> bytes:
    path = folder / "metrics.csv"
    return path.read_bytes() if path.exists() else b""


def _steps(folder: Path) -> int:
    """Steps in the table of metrics."""
    return max(0, _table_of_metrics(folder).count(b"\n") - 1)


def _same_parts(one: Path, other: Path) -> list[str]:
    """Which of `PARTS` are the same, bit for bit."""
    a, b = (checkpoints_in(folder)[-1] for folder in (one, other))
    results = [_tensors(result_in(folder)) for folder in (a, b)]
    states = [read_header(folder / TRAINING) for folder in (a, b)]
    tensors = [_tensors(folder / TRAINING) for folder in (a, b)]
    same = {
        "student": a.name == b.name and _equal(*results),
        "optimiser and weights": states[0].metadata == states[1].metadata and _equal(*tensors),
        "metrics": _table_of_metrics(one) == _table_of_metrics(other),
    }
    return [part for part in PARTS if same[part]]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in read_header(path).tensors.items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Compared as bytes, for to numbers -0 is 0."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(_bytes(a[name]), _bytes(b[name])) for name in a
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# --- by the command


class Command:
    """``distill train`` in a process of its own, forked from one that has imported the libraries."""

    def __init__(self, job: Path):
        self._log = job.with_suffix(".log")
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["distill_core.recipe", "diffusers.models.unets.unet_2d_condition"])
        self._process = processes.Process(target=_train, args=(job, self._log))
        self._process.start()

    def finished(self) -> bool:
        if (status := self._process.exitcode) not in (None, 0):
            raise RuntimeError(f"distill train ended with status {status}:\n{self._log.read_text()[-3000:]}")
        return status == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _train(job: Path, log: Path) -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and would outlive one that is killed
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main_of_distill(["train", str(job), "--resume", "--json"]))


def _by_command(folder: Path) -> Way:
    (folder / "prompts.txt").write_text("\n".join(scene.caption for scene in random_scenes(10, 0)))

    def launch(name: str) -> Command:
        job = folder / f"{name}.toml"
        job.write_text(to_toml({"run": name, **JOB}))
        return Command(job)

    _wait(launch("drawn"))  # imports the libraries, and the teacher draws the scenes, once for all runs
    return Way(launch, lambda name: folder / name, "`distill train`")


# --- by the node


class Node:
    """Distill Train Step in a ComfyUI server of its own, whose output folder it shares with others."""

    def __init__(self, folder: Path, heal: bool, name: str):
        sys.path.insert(0, str(ROOT))
        from tests import comfyui

        found = comfyui.find()
        if found is None or comfyui.python(found) is None:
            raise SystemExit(comfyui.HOW_TO_GET_IT)
        base = Path(tempfile.mkdtemp(dir=folder))
        (folder / "output").mkdir(exist_ok=True)
        (base / "output").symlink_to(folder / "output", target_is_directory=True)
        self._server = comfyui.Server(found, comfyui.python(found), base).__enter__()
        self._prompt = self._server.queue(_graph(name, self._server.get("object_info/DistillRecipe"), heal))

    def finished(self) -> bool:
        if self._server.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended:\n{self._server.log.read_text()[-3000:]}")
        if not (history := self._server.get(f"history/{self._prompt}")):
            return False
        from tests.comfyui import Result

        if not (result := Result(history[self._prompt])).succeeded:
            raise RuntimeError(result.error)
        return True

    def kill(self) -> None:
        self._server.process.kill()
        self._server.process.wait()


def _graph(name: str, info: dict, heal: bool) -> dict:
    defaults = {
        field: options["default"]
        for fields in info["DistillRecipe"]["input"].values()
        for field, (_, options) in fields.items()
        if "default" in options
    }
    train = {
        "teacher": ["teacher", 0], "student": ["prune", 0], "latents": ["teacher", 3], "captions": ["teacher", 4],
        "null_caption": ["empty", 0], "recipe": ["recipe", 0], "run_name": name, "steps_per_queue": TRAINED["total_steps"],
        "objective": "bk-sdm", **TRAINED,
    }  # fmt: skip
    network, prune, how = (
        "unet",
        {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["teacher", 0], **JOB["student"]}},
        OPTIONS,
    )
    if heal:
        cut = {"model": ["teacher", 0], "preset": "flux-mini", "plan": PLAN}
        network, prune = "transformer", {"class_type": "DistillPruneTransformerBlocks", "inputs": cut}
        of_node = ("objective", "local_steps", "lora_rank")
        train |= {name: HEALED[name] for name in of_node}
        how = {name: value for name, value in HEALED.items() if name not in of_node}
    return {
        "teacher": {"class_type": "DistillLoadDemoTeacher", "inputs": {"network": network}},
        "prune": prune,
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["teacher", 1]}},
        "recipe": {"class_type": "DistillRecipe", "inputs": defaults | how},
        "train": {"class_type": "DistillTrainStep", "inputs": train},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}},
    }


def _by_node(folder: Path, heal: bool) -> Way:
    return Way(partial(Node, folder, heal), lambda name: folder / "output" / "distill_runs" / name, "Distill Train Step")


if __name__ == "__main__":
    sys.exit(main())
