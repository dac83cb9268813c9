"""The ``distill`` command. Invalid input gives one sentence on stderr and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .networks.network import Network, NetworkFile
    from .pruning.plan import PruningPlan


def presets(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .evaluation.catalog import measure_presets
    from .networks.network import UNETS
    from .pruning.plan import all_preset_names, preset, preset_names

    with tqdm(total=len(preset_names()), desc="measuring", file=sys.stderr, delay=1, leave=False) as progress:
        rows = measure_presets(progress.update)
    of_transformers = [plan for plan in map(preset, all_preset_names()) if plan.teacher not in UNETS]
    if arguments.json:
        told = ("name", "title", "teacher", "source", "choice")
        print(json.dumps([*rows, *({key: getattr(plan, key) for key in told} for plan in of_transformers)], indent=2))
        return
    print(f"{'preset':<20}{'teacher':<8} {'parameters':>13} {'of teacher':>10} {'GMACs':>8} {'of teacher':>10}  what is removed")
    for row in rows:
        print(
            f"{row['name']:<20}{row['teacher']:<8} {row['parameters']:>13,} {row['parameters_of_teacher']:>10.1%} "
            f"{row['gmacs']:>8.1f} {row['gmacs_of_teacher']:>10.1%}  {row['title']}"
        )
    print("\nFor transformers, cut by distill prune:")
    for plan in of_transformers:
        print(f"{plan.name:<20}{plan.teacher:<12} {plan.title}")


def inspect(arguments: argparse.Namespace) -> None:
    from .networks.network import open_network
    from .pruning.prune import describe

    facts = describe(open_network(arguments.file))
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    words = {name.replace("_", " "): _words(value) for name, value in facts.items() if name not in ("stages", "blocks")}
    width = max(map(len, words))
    for name, value in words.items():
        print(f"{name:<{width}} {value}")
    for word, numbers in facts.get("blocks", {}).items():
        print(f"  {word:<8} {numbers}")
    for stage in facts.get("stages", []):
        depths = " ".join(map(str, stage["transformer_depth"]))
        resnets = f"{stage['resnets']} resnet{'s' * (stage['resnets'] != 1)}"
        print(f"  {stage['name']:<8} {stage['channels']:>5} channels  {resnets:<9}  transformer depth {depths}")


def _words(value: object) -> str:
    """A value as text: ``yes``, ``859,520,964``, ``none``."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def prune(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .lora.merge import merged
    from .networks.network import open_network
    from .pruning.prune import precision_note, prune_file

    if arguments.layout != "diffusers":
        _check_suffix(arguments.out)
    elif arguments.out.suffix == ".safetensors":
        raise ValueError(
            f"{arguments.out} will be a folder with --layout diffusers; leave out .safetensors, or choose another layout"
        )
    teacher = open_network(arguments.teacher)
    _check_keeps_inputs(arguments.out, teacher, arguments.lora, arguments.plan)
    plan = _plan(arguments, teacher.architecture)
    change = {"change": partial(merged, teacher=teacher.architecture, lora=arguments.lora)} if arguments.lora else {}
    with tqdm(unit="B", unit_scale=True, desc="pruning", file=sys.stderr, delay=1, leave=False) as progress:

        def on_bytes(done: int, total: int) -> None:
            if progress.total is None:
                progress.reset(total)  # what was imported before does not count as pruning
            progress.update(done - progress.n)

        pruning = prune_file(
            teacher,
            arguments.out,
            plan,
            layout=arguments.layout,
            dtype=arguments.dtype,
            pad=arguments.pad,
            **change,
            overwrite=arguments.overwrite,
            on_bytes=on_bytes,
        )
    before, after = teacher.architecture.num_parameters, pruning.student.num_parameters
    print(f"{arguments.out}: {after:,} parameters, {1 - after / before:.1%} fewer than the teacher's {before:,}")
    if arguments.lora:
        print(f"{arguments.lora}: merged into it")
    if pruning.padding:
        print(f"Identity blocks, so that ComfyUI can open the file: {', '.join(pruning.padding)}")
    for note in (teacher.loading_note(pruning.student, arguments.layout), precision_note(teacher, pruning)):
        if note:
            print(note)
    if not arguments.lora:
        print(teacher.advice)


def recipes(arguments: argparse.Namespace) -> None:
    from .recipe import example, example_names

    if arguments.name:
        print(example(arguments.name), end="")
        return
    titles = {name: example(name).splitlines()[0].removeprefix("# ") for name in example_names()}
    print(json.dumps(titles, indent=2) if arguments.json else "\n".join(f"{name:<14} {title}" for name, title in titles.items()))


def train(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .preparation import prepare
    from .recipe import Recipe, example_names
    from .training.loop import Progress
    from .training.memory import free_bytes
    from .training.processes import Processes
    from .training.run_folders import steps_kept

    if (name := str(arguments.recipe)) in example_names() and not arguments.recipe.exists():
        raise ValueError(
            f"{name} is an example; write it to a file first, and set your own: distill recipes {name} > my_run.toml"
        )
    recipe, processes = Recipe.read(arguments.recipe), Processes.launched()
    if not arguments.resume and steps_kept(started := recipe.path(recipe.run)):
        raise ValueError(f"{started} already holds a run; resume it with --resume, or give the new run another folder")
    bars: dict[str, tqdm] = {}
    quiet = arguments.json or not processes.main
    with contextlib.ExitStack() as stack:

        def on_item(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(tqdm(total=total, desc=what, file=sys.stderr, disable=quiet, leave=False))
            bars[what].update(done - bars[what].n)

        prepared = prepare(recipe, processes, on_item, only=arguments.range)
    run = prepared.run
    if processes.main and not arguments.json:
        print(prepared.describe())
        if not run.complete:
            print(prepared.describe_memory(free_bytes(prepared.models.device)))
    with tqdm(total=run.total_steps, initial=run.step, desc="training", file=sys.stderr, disable=quiet) as bar:

        def on_step(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.losses['total']:.4g}", refresh=False)
            bar.update(progress.step - bar.n)

        if not run.complete:
            prepared.train(on_step, bar.set_description)
    if not processes.main:
        return
    facts = {"run": str(run.folder), "step": run.step, **run.facts}
    print(json.dumps(facts, indent=2) if arguments.json else run.describe_state())


def remap_lora(arguments: argparse.Namespace) -> None:
    from .lora.remap import remap_lora_file
    from .networks.network import open_network
    from .pruning.plan import name_map
    from .pruning.prune import mapping_between

    _check_suffix(arguments.out)
    file = open_network(arguments.teacher)
    student = open_network(arguments.student) if arguments.student else None
    _check_keeps_inputs(arguments.out, file, arguments.student, arguments.lora, arguments.plan)
    teacher = file.architecture
    if student is not None:
        mapping = mapping_between(teacher, student.architecture, student.metadata)
    else:
        mapping = name_map(teacher, _plan(arguments, teacher))
    remapped = remap_lora_file(
        arguments.lora, arguments.out, teacher, mapping, layout=arguments.layout, overwrite=arguments.overwrite
    )
    if arguments.json:
        facts = {name: getattr(remapped, name) for name in ("num_kept", "num_dropped", "num_text_encoder", "switched_to_ldm")}
        print(json.dumps({"file": str(arguments.out), **facts}, indent=2))
    else:
        print(f"{arguments.out}: {remapped.describe()}")


def convert_lora(arguments: argparse.Namespace) -> None:
    from .lora.remap import convert_lora_file
    from .networks.files import open_unet

    _check_suffix(arguments.out)
    model = open_unet(arguments.model)
    _check_keeps_inputs(arguments.out, model, arguments.lora)
    num_layers = convert_lora_file(arguments.lora, arguments.out, model.architecture, overwrite=arguments.overwrite)
    if arguments.json:
        print(json.dumps({"file": str(arguments.out), "num_layers": num_layers}, indent=2))
    else:
        print(f"{arguments.out}: {num_layers} layer{'s' * (num_layers != 1)}, in diffusers' format")


def compare(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .evaluation.compare import Settings, save_chart, work
    from .evaluation.compare import compare as measure
    from .evaluation.comparison import read_names, table_text
    from .networks.files import open_unet
    from .training.memory import is_out_of_memory

    names = read_names(arguments.names or "", _distinct_names(arguments.files), "--names")
    _check_image(arguments)
    settings = Settings(
        size_px=(arguments.size, arguments.size),
        batch_size=arguments.batch,
        num_rounds=arguments.rounds,
        num_examples=arguments.examples,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    files = {name: open_unet(file) for name, file in zip(names, arguments.files, strict=True)}
    with tqdm(total=work(len(files), settings), desc="comparing", file=sys.stderr, delay=1, leave=False) as progress:
        try:
            comparison = measure(files, settings, progress.update)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError("the device is out of memory; lower --size or --batch, or compare fewer models") from error
    save_chart(arguments.out, comparison, overwrite=arguments.overwrite)
    if arguments.json:
        print(json.dumps(comparison.facts() | {"image": str(arguments.out)}, indent=2))
        return
    print(table_text(comparison.columns, comparison.rows()))
    bins = [[model.name, *(f"{distance:.3g}" for distance in model.distances or ())] for model in comparison.models[1:]]
    width = 1000 // len(bins[0][1:])
    print("\nDistance by timestep (0: clean image):")
    print(table_text(["model", *(f"{start}-{start + width - 1}" for start in range(0, 1000, width))], bins))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in comparison.settings.items()))
    print(f"image: {arguments.out}")


def bench(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .base.image_grid import save_png
    from .evaluation import bench as benches
    from .evaluation.comparison import table_text

    _check_image(arguments)
    asked = benches.Settings(
        family=arguments.family,
        presets=tuple(arguments.preset or ()),
        size_px=arguments.size,
        batch_size=arguments.batch,
        num_rounds=arguments.rounds,
        dtype=arguments.dtype,
        train=not arguments.no_training,
    )
    settings = benches.quick(asked) if arguments.quick else asked
    with tqdm(total=benches.work(settings), desc="measuring", file=sys.stderr, leave=False) as progress:

        def on_step(what: str, count: int) -> None:
            progress.set_postfix_str(what)
            progress.update(count)

        measured = benches.bench(settings, on_step)
    save_png(arguments.out, benches.summary_image(measured), overwrite=arguments.overwrite)
    if arguments.json:
        print(json.dumps(measured.facts() | {"image": str(arguments.out)}, indent=2))
        return
    print(table_text(measured.columns, measured.cells()))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in {**measured.meanings, **measured.settings}.items()))
    print(f"image: {arguments.out}")


def _check_image(arguments: argparse.Namespace) -> None:
    """Raise errors of `_add_image`'s arguments before the long work."""
    from .base.disk import check_writable

    check_writable(arguments.out, overwrite=arguments.overwrite)


def _check_suffix(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, the format of the file; choose such a name")


def _check_keeps_inputs(out: Path, network: NetworkFile, *others: Path | str | None) -> None:
    """Raise ``ValueError`` if what is written would replace what it is made from, or a folder that holds that."""
    weights = {tensor.path for tensor in network.tensors.values()}
    for path in [path for path in (*weights, *others) if path and os.path.exists(path)]:
        if out.exists() and any(out.samefile(place) for place in (path, *Path(path).resolve().parents)):
            raise ValueError(f"{out} would replace {path}, which it is made from; choose another name")


def _distinct_names(files: Sequence[Path]) -> list[str]:
    """Unique names of files: as much of each path as needed."""
    paths = [file.resolve() for file in files]
    without = [path.with_suffix("") if path.suffix == ".safetensors" else path for path in paths]
    for parts in ([path.parts for path in without], [path.parts for path in paths]):
        for count in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-count:]) for part in parts]
            if len({*names}) == len(names):
                return names
    raise ValueError("a file is given twice; give another file, or --names")


def _plan(arguments: argparse.Namespace, teacher: Network) -> PruningPlan:
    """The plan of --preset with the blocks of --keep, or of --plan: a file, or the text itself."""
    from .pruning.plan import preset
    from .pruning.plan_text import find_plan

    if arguments.preset:
        return preset(arguments.preset).with_keep(dict(arguments.keep)) if arguments.keep else preset(arguments.preset)
    if arguments.keep:
        raise ValueError("--keep changes a preset; write the transformer blocks into the plan instead")
    return find_plan(arguments.plan, teacher)


def _add_plan(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    from .pruning.plan import all_preset_names
    from .pruning.plan_text import EXAMPLE

    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=all_preset_names(), help="a published plan")
    which.add_argument("--plan", help=f"a plan of your own: a file, or the text itself, such as {EXAMPLE!r} or JSON")
    command.add_argument(
        "--keep",
        type=_kept_blocks,
        action="append",
        metavar="ATTENTIONS=BLOCKS",
        help="transformer blocks to keep, in place of those of the preset, such as 'down.2.attn.*=0,3,6,9'; may be repeated",
    )
    return which


def _kept_blocks(text: str) -> tuple[str, tuple[int, ...]]:
    attentions, _, blocks = text.partition("=")
    try:
        return attentions, tuple(int(block) for block in blocks.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 'down.2.attn.*=0,3,6,9', got {text!r}") from None


def quickstart(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .quickstart import Settings, summary, work
    from .quickstart import quickstart as run_quickstart

    settings = Settings(preset=arguments.preset, train_steps=arguments.steps, num_prompts=arguments.prompts, seed=arguments.seed)
    bar = "{desc:<22} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left"
    with tqdm(total=work(settings), bar_format=bar, file=sys.stderr, delay=1) as progress:
        rows = run_quickstart(arguments.out, settings, progress)
    print(summary(rows))
    print(f"Open {arguments.out / 'report.html'} (or report.png): images, loss curves and figures of all three models.")
    print(
        f"Next: distill inspect {arguments.out / 'student.safetensors'}, or prune a model of your own: "
        "distill prune YOUR_SD15.safetensors small.safetensors --preset bk-sdm-small"
    )


def _how_to_go_on(argv: Sequence[str] | None) -> str:
    command = next(iter(sys.argv[1:] if argv is None else argv), "")
    kept = {
        "train": "every finished step is kept; resume with the same command and --resume",
        "quickstart": "resume with the same command",
    }
    return kept.get(command, "nothing was written")


def _at_least(minimum: int) -> Callable[[str], int]:
    """An integer of at least ``minimum``, for argparse."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    return number


def _size_px(text: str) -> int:
    """Side of an image in pixels, for argparse."""
    if int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"must be a multiple of 64, got {text}")
    return int(text)


def _add_quickstart(commands: argparse._SubParsersAction) -> None:
    from .pruning.plan import preset_names

    command = commands.add_parser(
        "quickstart", help="prune and distil a bundled model of small scenes in minutes on a CPU, with a report"
    )
    command.set_defaults(function=quickstart)
    command.add_argument("--out", type=Path, default=Path("distill-quickstart"), help="folder to write (default: %(default)s)")
    command.add_argument(
        "--preset", choices=preset_names("sd1"), default="bk-sdm-base", help="plan to prune with (default: %(default)s)"
    )
    command.add_argument("--steps", type=_at_least(1), default=200, help="distillation steps (default: %(default)s)")
    command.add_argument(
        "--prompts", type=_at_least(1), default=12, help="prompts of each category to judge models by (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed for training and sampling (default: %(default)s)")


def _add_presets(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "presets", help="list every published plan with its size and cost, measured on the built network"
    )
    command.set_defaults(function=presets)
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("inspect", help="show what a checkpoint contains; reads only its header")
    command.set_defaults(function=inspect)
    command.add_argument("file", type=Path, help=".safetensors file or diffusers folder")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_prune(commands: argparse._SubParsersAction) -> None:
    from .base.storage import CODES
    from .networks.files import FILE_LAYOUTS

    command = commands.add_parser("prune", help="remove blocks from a checkpoint")
    command.set_defaults(function=prune)
    command.add_argument("teacher", type=Path, help=".safetensors file or diffusers folder")
    command.add_argument("out", type=Path, help="file to write, or folder with --layout diffusers")
    _add_plan(command)
    command.add_argument(
        "--layout",
        choices=FILE_LAYOUTS,
        default="ldm",
        help="; ".join(f"{name}: {what}" for name, what in FILE_LAYOUTS.items()) + " (default: %(default)s)",
    )
    command.add_argument("--dtype", choices=CODES, help="precision to write (default: the teacher's)")
    command.add_argument(
        "--pad",
        action="store_true",
        help="replace removed blocks by identity blocks where ComfyUI could not open the student otherwise",
    )
    command.add_argument(
        "--lora",
        type=Path,
        help="LoRA to merge that was trained for this student: by distill train for a diffusers folder, by a node for a single file",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("recipes", help="list example recipes for distill train, including published ones")
    command.set_defaults(function=recipes)
    command.add_argument("name", nargs="?", help="print this recipe, to save it to a file of your own")
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def _add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train", help="train a student from a recipe; also: accelerate launch -m distill_core train RECIPE.toml"
    )
    command.set_defaults(function=train)
    command.add_argument("recipe", type=Path, help="TOML file with run, teacher, student, data and training")
    command.add_argument("--resume", action="store_true", help="resume a run")
    command.add_argument(
        "--range",
        type=_at_least(0),
        metavar="N",
        help="train only expert N of [experts], 0 is the noisiest (and the joint stage it starts from)",
    )
    command.add_argument("--json", action="store_true", help="print JSON at the end, without progress")


def _add_remap_lora(commands: argparse._SubParsersAction) -> None:
    from .networks.layouts import LAYOUTS

    command = commands.add_parser("remap-lora", help="convert a teacher's LoRA to one for its student")
    command.set_defaults(function=remap_lora)
    command.add_argument("lora", type=Path, help="LoRA for the teacher, of any kind, with kohya's, diffusers' or ComfyUI's names")
    command.add_argument("out", type=Path, help="file to write")
    command.add_argument("--teacher", type=Path, required=True, help=".safetensors file or diffusers folder of the full model")
    _add_plan(command).add_argument(
        "--student", type=Path, help="the student's file, which says how it was pruned; needed if that was with --pad"
    )
    command.add_argument(
        "--layout", choices=LAYOUTS, help="names to write (default: as in the input, if ComfyUI reads them correctly)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_convert_lora(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "convert-lora", help="convert a plain LoRA of a UNet to diffusers' format, for diffusers and peft"
    )
    command.set_defaults(function=convert_lora)
    command.add_argument("lora", type=Path, help="LoRA in any format, such as the lora.safetensors of a run")
    command.add_argument("out", type=Path, help="file to write")
    command.add_argument("--model", type=Path, required=True, help=".safetensors file or diffusers folder of its model")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_image(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--out", type=Path, default=Path(name), help="image to write (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    from .base.storage import CODES

    command = commands.add_parser(
        "compare",
        help="measure parameters, GMACs, latency, memory, and distance of the predictions from the first model's",
        description="Measures UNets and draws a chart. Distances are from the predictions of the first model, for random latents "
        "and random captions determined by the seed: they show how much models differ, not how good their images are.",
    )
    command.set_defaults(function=compare)
    command.add_argument(
        "files", type=Path, nargs="+", metavar="MODEL", help=".safetensors file or diffusers folder, the teacher first"
    )
    command.add_argument("--names", metavar="A,B", help="names of the models (default: from their files)")
    _add_image(command, "comparison.png")
    command.add_argument("--size", type=_size_px, default=512, help="side of the images in pixels (default: %(default)s)")
    command.add_argument("--batch", type=_at_least(1), default=1, help="images per step (default: %(default)s)")
    command.add_argument("--rounds", type=_at_least(1), default=10, help="timed steps of each model (default: %(default)s)")
    command.add_argument(
        "--examples", type=_at_least(1), default=4, help="examples per timestep bin for the distance (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=CODES, help="precision to compute in (default: fp16 on a GPU, else fp32)")
    command.add_argument("--seed", type=int, default=0, help="seed for latents and captions (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    from .base.storage import CODES
    from .pruning.plan import preset_names

    command = commands.add_parser(
        "bench",
        help="measure on this machine what pruning gains: time, memory and training speed of every preset",
        description="Builds the full model of a family and its pruned versions with random weights, which cost as much as real "
        "ones, and measures sampling and training on this machine. Nothing is downloaded.",
    )
    command.set_defaults(function=bench)
    command.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1", help="family (default: %(default)s)")
    command.add_argument("--preset", action="append", choices=preset_names(), help="measure only this preset; may be repeated")
    command.add_argument("--size", type=_size_px, help="side of the images in pixels (default: 512, sdxl: 1024)")
    command.add_argument("--batch", type=_at_least(1), default=1, help="images at once (default: %(default)s)")
    command.add_argument("--rounds", type=_at_least(1), default=5, help="timed rounds (default: %(default)s)")
    command.add_argument("--dtype", choices=CODES, help="precision (default: fp16 on a GPU, else fp32)")
    command.add_argument("--no-training", action="store_true", help="measure sampling only")
    command.add_argument(
        "--quick", action="store_true", help="the smallest preset, few rounds, small images on a CPU: about a minute"
    )
    _add_image(command, "bench.png")
    command.add_argument("--json", action="store_true", help="print JSON")


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog="distill", description="Make a diffusion checkpoint smaller and faster.")
    parser.add_argument("--version", action="version", version=f"distill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_presets,
        _add_inspect,
        _add_prune,
        _add_recipes,
        _add_train,
        _add_remap_lora,
        _add_convert_lora,
        _add_compare,
        _add_bench,
    ):
        add(commands)
    return parser


class _Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """While open, SIGTERM ends the work like Ctrl+C: completed work is kept, half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for invalid input, 130 if interrupted, 143 if terminated.

    141 if what reads its output has ended, as head does: nobody is left to tell, and nothing went wrong.
    """
    from .base.storage import ExistsError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        arguments = _parser().parse_args(argv)
        with _ended_in_order():
            arguments.function(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 141
    except ExistsError as error:
        print(f"distill: {error.path} exists already; choose another name, or add --overwrite", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"distill: {error}; install it with: python -m pip install {error.name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"distill: interrupted; {_how_to_go_on(argv)}", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"distill: terminated; {_how_to_go_on(argv)}", file=sys.stderr)
        return 143
    return 0
