"""Every format the program reads: valid examples, how they are made wrong, and the reader."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from distill_core.base.storage import fingerprint, read_header, write_tensors
from distill_core.data import cache as dataset_cache
from distill_core.data import images
from distill_core.data.cache import CachedDataset
from distill_core.demo.teacher import teacher_file
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.ranges import TimestepRanges, read_ranges
from distill_core.diffusion.schedule import scaled_linear
from distill_core.lora import remap as lora
from distill_core.networks.architecture import Architecture
from distill_core.networks.files import open_unet, save_unet
from distill_core.networks.lora_names import kohya_names
from distill_core.networks.model_sampling import EDM, ZERO_SNR, ModelSampling
from distill_core.networks.residuals import KeptBlocks, read_kept
from distill_core.pruning.plan import name_map, plan_in, preset, pruned
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.prune import prune_file
from distill_core.recipe import EXAMPLES, Recipe
from distill_core.routing.experts import MANIFEST, Experts, write_experts
from distill_core.training.run import METRICS, Inputs, Run, read_metrics
from distill_core.training.settings import TrainingSettings

from . import mutations


class Target(NamedTuple):
    """One format."""

    seeds: Callable[[Path], list[bytes]]
    """Valid examples, made in an empty folder."""
    mutate: mutations.Mutation
    read: Callable[[bytes, Path], None]
    """What the program does with it, in a folder that the files of other reads may still lie in."""


# --- UNets ----------------------------------------------------------------------------------------------------------


@cache
def small_shapes() -> dict[str, tuple[int, ...]]:
    """The demo's teacher, an eighth as wide."""
    return {
        name: tuple(size // 8 if size > 8 else size for size in shape)
        for name, shape in teacher_file().architecture.shapes.items()
    }


@cache
def small_unet() -> Architecture:
    return Architecture(small_shapes(), head_channels=teacher_file().architecture.head_channels // 8)


def _weights(shapes) -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).remainder(7).reshape(shape)
        for name, shape in shapes.items()
    }


def _unets(folder: Path) -> list[bytes]:
    teacher = folder / "t.safetensors"
    save_unet(teacher, _weights(small_shapes()), small_unet(), dtype="fp16")
    prune_file(open_unet(teacher), folder / "s.safetensors", preset("bk-sdm-tiny"))
    save_unet(folder / "d", _weights(small_shapes()), small_unet(), layout="diffusers", dtype="fp16")
    means = {"latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4}
    for name, sampling in {
        "v": ModelSampling(prediction="v", noise=ZERO_SNR),
        "vedm": ModelSampling(prediction="v", noise=EDM, sigmas=(0.002, 120.0)),
        "edm": ModelSampling(prediction="edm", noise=EDM, sigmas=(0.002, 80.0), **means),
    }.items():
        save_unet(folder / f"{name}.safetensors", _weights(small_shapes()), small_unet(), dtype="fp16", sampling=sampling)
    files = (*folder.glob("*.safetensors"), *(folder / "d").glob("*.safetensors"))
    return [file.read_bytes() for file in files]


def _read_unet(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    file = open_unet(folder / "x.safetensors")
    json.dumps(file.describe())
    fingerprint(file.tensors)
    if text := file.metadata.get("distill.skips"):
        read_kept(text)
    out = folder / "out.safetensors"
    if plan_in(file.metadata):
        return
    prune_file(file, out, preset("bk-sdm-base"), overwrite=True)
    open_unet(out).describe()
    out.unlink()


def _configs(folder: Path) -> list[bytes]:
    save_unet(folder / "d", _weights(small_shapes()), small_unet(), layout="diffusers", dtype="fp16")
    return [
        (folder / "d" / "config.json").read_bytes(),
        b'{"prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "beta_start": 0.00085, "trained_betas": null}',
        b'{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "epsilon"}',
        b'{"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "sigma_max": 700}',
        b'{"weight_map": {"a": "x.safetensors"}}',
    ]


def _read_configs(data: bytes, folder: Path) -> None:
    """The same text as every JSON there is beside a UNet."""
    pipeline = folder / "pipeline"
    if not pipeline.exists():
        save_unet(pipeline / "unet", _weights(small_shapes()), small_unet(), layout="diffusers", dtype="fp16")
        (pipeline / "scheduler").mkdir()
        (pipeline / "shards").mkdir()
        (pipeline / "config.json").write_bytes((pipeline / "unet" / "config.json").read_bytes())
    places = {
        pipeline / "unet" / "config.json": pipeline,
        pipeline / "scheduler" / "scheduler_config.json": pipeline,
        pipeline / "shards" / "diffusion_pytorch_model.safetensors.index.json": pipeline / "shards",
    }
    refused = []
    for place, unet in places.items():
        before = place.read_bytes() if place.exists() else b"{}"
        place.write_bytes(data)
        try:
            json.dumps(open_unet(unet).describe())
        except ValueError as error:
            refused.append(error)
        place.write_bytes(before)
    if len(refused) == len(places):
        raise refused[0]


# --- plans ----------------------------------------------------------------------------------------------------------


def _plans(folder: Path) -> list[bytes]:
    return [preset("bk-sdm-base").to_json().encode(), b'{"name": "p", "remove": ["up.*.attn.1"], "keep": {"down.0.attn.0": [0]}}']


def _plan_texts(folder: Path) -> list[bytes]:
    return [b"keep down 1 mid none up 2", b"keep down 2:1 + [0],1,2 mid resnet up 3, [0,2],3:1 + 1+1"]


def _read_plan(data: bytes, folder: Path) -> None:
    teacher = small_unet()
    pruned(teacher, name_map(teacher, read_plan(data.decode("utf-8", "replace"), teacher)))


def _skips(folder: Path) -> list[bytes]:
    teacher = small_unet()
    return [teacher.kept_residuals(name_map(teacher, preset("bk-sdm-base")).rename).to_text().encode()]


def _read_skips(data: bytes, folder: Path) -> None:
    kept = read_kept(data.decode("utf-8", "replace"))
    for one in kept.lists.values() if isinstance(kept, KeptBlocks) else [kept]:
        one.select(range(one.num_teacher))


def _settings(folder: Path) -> list[bytes]:
    return [b"500, 250", b"50%, 75%", b"sigma 4.5, 1.2", b"768x512,512x768", b"buckets-512", b"640"]


def _read_settings(data: bytes, folder: Path) -> None:
    """The same words as every setting that is read as words."""
    words = data.decode("utf-8", "replace")
    try:
        read_ranges(words, scaled_linear()).describe(scaled_linear())
    except ValueError:
        images.sizes(words)


# --- files of runs --------------------------------------------------------------------------------------------------


def _recipes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(EXAMPLES.glob("*.toml"))]


def _read_recipe(data: bytes, folder: Path) -> None:
    (folder / "recipe.toml").write_bytes(data)
    job = Recipe.read(folder / "recipe.toml")
    _ = job.training.weighted_objective, [job.training.lr_factor(step) for step in (0, 1, job.training.total_steps - 1)]


def _metrics(folder: Path) -> list[bytes]:
    rows = [{"step": n, "lr": 1e-4, "total": 0.5, "task": "", "validation": 0.25} for n in range(1, 5)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return [text.getvalue().encode()]


def _read_metrics(data: bytes, folder: Path) -> None:
    (folder / METRICS).write_bytes(data)
    read_metrics(folder)


def _students_in(folder: Path) -> Path:
    """A folder of three experts, made once."""
    if not (folder / "experts").exists():
        file = folder / "one.safetensors"
        save_unet(file, _weights(small_shapes()), small_unet(), dtype="fp16")
        write_experts(folder / "experts", TimestepRanges((500.0, 250.0)), [file] * 3, teacher="0" * 16)
    return folder / "experts"


def _manifests(folder: Path) -> list[bytes]:
    return [(_students_in(folder) / MANIFEST).read_bytes()]


def _read_manifest(data: bytes, folder: Path) -> None:
    experts = _students_in(folder)
    (experts / MANIFEST).write_bytes(data)
    found = Experts.read(experts)
    found.describe(scaled_linear())
    _ = found.num_bytes, found.unet(0).describe()


# --- LoRAs ----------------------------------------------------------------------------------------------------------


def _loras(folder: Path) -> list[bytes]:
    names, found = kohya_names(small_unet()), []
    layers = [layer for layer in names if ".attn1.to_" in layer][:3]
    shapes = {layer: small_unet().shapes[f"{layer}.weight"] for layer in layers}
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        tensors = {}
        for layer, (outputs, inputs) in shapes.items():
            tensors |= {
                f"{names[layer]}.{down}.weight": torch.ones(2, inputs),
                f"{names[layer]}.{up}.weight": torch.ones(outputs, 2),
            }
            tensors |= {f"{names[layer]}.alpha": torch.tensor(1.0)}
        metadata = {
            "ss_network_dim": "2",
            "ss_network_args": "{}",
            "lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}',
        }
        write_tensors(folder / down, tensors, metadata)
        found.append((folder / down).read_bytes())
    return found


def _read_lora(data: bytes, folder: Path) -> None:
    path, out, teacher = folder / "lora.safetensors", folder / "out.safetensors", small_unet()
    path.write_bytes(data)
    mapping, refused = name_map(teacher, preset("bk-sdm-base")), None
    for turn in (
        lambda: lora.remap_lora_file(path, out, teacher, mapping, overwrite=True),
        lambda: lora.convert_lora_file(path, out, teacher, overwrite=True),
    ):
        try:
            turn()
            read_header(out)
        except ValueError as error:
            refused = error
    if refused:
        raise refused


# --- data -----------------------------------------------------------------------------------------------------------


@cache
def _cached(pooled: bool) -> tuple[bytes, bytes, str]:
    """Index and shard of a small cache, and the name of the shard."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        writer = dataset_cache.CacheWriter(folder)
        for n in range(2):
            writer.add_text(f"{n}" * 32, Caption(torch.full((4, 3), n / 2), torch.ones(2) if pooled else None))
            writer.add_latent(f"a{n}" * 16, torch.ones(4, 2, 2), torch.ones(2, 4, 2, 2))
        sizes = (16, 16, 0, 0, 16, 16)
        writer.finish([dataset_cache.Entry(f"a{n}" * 16, f"{n}" * 32, sizes) for n in range(2)], "0" * 32, [10, 20])
        (shard,) = Path(folder).glob("shard-*")
        return (Path(folder) / "index.json").read_bytes(), shard.read_bytes(), shard.name


def _read_cache(index: bytes, shard: bytes, folder: Path) -> None:
    (folder / "index.json").write_bytes(index)
    (folder / _cached(False)[2]).write_bytes(shard)
    data = CachedDataset.open(folder)
    for bucket, size in enumerate(data.bucket_sizes):
        data.read(bucket, torch.arange(min(size, 4)))
    dataset_cache.CacheWriter(folder, verify=True)


def _lists(folder: Path) -> list[bytes]:
    return [b'file_name,text\na.png,"one, two"\nb.png,three\n']


def _read_list(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        for picture in ("a.png", "b.png"):
            if not (folder / picture).exists():
                Image.new("RGB", (8, 8)).save(folder / picture)
        (folder / name).write_bytes(data)
        try:
            images.folder(folder)
        finally:
            (folder / name).unlink()

    return read


def _pictures(folder: Path) -> list[bytes]:
    found, image = [], Image.effect_noise((32, 24), 50).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    for format, mode in (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB")):
        buffer = io.BytesIO()
        (Image.new(mode, (32, 24)) if mode == "I;16" else image.convert(mode)).save(buffer, format, exif=exif)
        found.append(buffer.getvalue())
    return found


def _read_picture(data: bytes, folder: Path) -> None:
    picture = images.ImageFile("it", "", lambda: data)
    picture.content(), picture.size()
    images.fit(picture.open(), (16, 16))


# --- runs -----------------------------------------------------------------------------------------------------------

RECIPE = TrainingSettings(total_steps=2, batch_size=1)


def _checkpoint(folder: Path) -> Path:
    """What else than the student a run goes on from, in a run's folder."""
    checkpoint = folder / "run" / "checkpoints" / "00000001"
    if not checkpoint.exists():
        run = Run(folder / "run", RECIPE, Inputs(data="some"))
        save_unet(checkpoint / "student.safetensors", _weights(small_shapes()), small_unet())
        told = {"distill.training": '{"optimizer": {}, "scaler": {}}', "distill.run": json.dumps(run._started())}
        write_tensors(checkpoint / "training.safetensors", {"optimizer/conv_in.weight/exp_avg": torch.zeros(4)}, told)
    return checkpoint / "training.safetensors"


def _read_run(data: bytes, folder: Path) -> None:
    file = _checkpoint(folder)
    file.write_bytes(data)
    run = Run(folder / "run", RECIPE, Inputs(data="some"))
    with run.training():
        run.load(_Anything())
    for aside in file.parents[1].glob("*.damaged*"):
        shutil.rmtree(aside)


class _Anything:
    """Stands where what is trained reads its own file."""

    def read(self, path: Path) -> dict:
        return {name: tensor.read() for name, tensor in read_header(path).tensors.items()}


TARGETS = {
    "run": Target(lambda folder: [_checkpoint(folder).read_bytes()], mutations.as_safetensors, _read_run),
    "unet": Target(_unets, mutations.as_safetensors, _read_unet),
    "config": Target(_configs, mutations.as_json, _read_configs),
    "plan": Target(_plans, mutations.as_json, _read_plan),
    "plan_text": Target(_plan_texts, mutations.text, _read_plan),
    "skips": Target(_skips, mutations.as_json, _read_skips),
    "settings": Target(_settings, mutations.text, _read_settings),
    "recipe": Target(_recipes, mutations.as_toml, _read_recipe),
    "metrics": Target(_metrics, mutations.text, _read_metrics),
    "manifest": Target(_manifests, mutations.as_json, _read_manifest),
    "lora": Target(_loras, mutations.as_safetensors, _read_lora),
    "index": Target(lambda _: [_cached(p)[0] for p in (True, False)], mutations.as_json, lambda d, f: _read_cache(d, _cached(True)[1], f)),
    "shard": Target(lambda _: [_cached(p)[1] for p in (True, False)], mutations.as_safetensors, lambda d, f: _read_cache(_cached(True)[0], d, f)),
    "list_csv": Target(_lists, mutations.text, _read_list("metadata.csv")),
    "list_jsonl": Target(
        lambda _: [b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": null}\n'],
        mutations.as_json_lines,
        _read_list("metadata.jsonl"),
    ),
    "caption": Target(lambda _: [b"a cat, \xc3\xa4\n"], mutations.raw, _read_list("a.txt")),
    "picture": Target(_pictures, mutations.raw, _read_picture),
}  # fmt: skip
"""Formats by name; a corpus file is named by one, a dash, and a hash."""


def failure(target: Target, data: bytes, folder: Path) -> BaseException | None:
    """What is wrong with how an input is read: anything but success, or ``ValueError`` in one sentence."""
    try:
        target.read(data, folder)
    except ValueError as error:
        return error if "\n" in str(error) or len(str(error)) > 4000 else None
    except Exception as error:  # whatever it is, it is what we look for
        return error
    return None


def seeds_of(names: Sequence[str], folder: Path) -> dict[str, list[bytes]]:
    """Valid examples of formats."""
    found = {}
    for name in names:
        (folder / name).mkdir()
        found[name] = TARGETS[name].seeds(folder / name)
    return found
