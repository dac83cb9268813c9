"""Make the demo from two packages of emoji: pictures, autoencoder, judge, then teacher and text encoder together.

``npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6`` fetches the packages;
``python -m distill_core.demo.build OUT --packages FOLDER`` draws and trains. Needs resvg-py. Some hours on two CPU
cores: what is in OUT already is kept, and the teacher goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from ..base.storage import atomic
from ..diffusion.denoiser import DiffusersDenoiser
from ..diffusion.schedule import scaled_linear
from ..networks.architecture import Architecture
from ..networks.files import save_unet
from ..training.ema import EMA
from ..training.optim import Optimizer
from ..training.weighting import example_weights
from . import files
from .autoencoder import ScenesAutoencoder
from .drawing import EMOJI_PX, PER_ROW, as_images, draw_all
from .grammar import OBJECTS, STYLES, random_scenes, tokenize
from .judge import NOT_ASKED, ScenesJudge, asked_of
from .teacher import DATA_SEED, latents_of
from .text import CONTEXT_WIDTH, ScenesTextEncoder

PACKAGES = {"flat": "iconify-json-fluent-emoji-flat-*.tgz", "shaded": "iconify-json-noto-*.tgz"}
"""Files of the packages by style."""
ICONS = {"apple": "red-apple", "cake": "birthday-cake", "bee": "honeybee", "tree": "deciduous-tree", "car": "automobile",
         "train": "locomotive", "boat": "sailboat", "lamp": "light-bulb", "book": "closed-book", "gift": "wrapped-gift"}  # fmt: skip
"""Their names of objects that are named otherwise here."""
UNET_CONFIG = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(64, 64, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=CONTEXT_WIDTH,
    attention_head_dim=(2, 2, 2),  # the number of heads, despite its name: 32 channels each
)
"""A small SD1.x: three levels, the innermost without attention, two layers per level, one mid block."""
BATCH_SIZE = 64
CAPTION_DROPOUT = 0.1
DECAY_SHARE = 0.25
"""The learning rate of the teacher is constant, and falls to 0 in this share of the steps at the end."""


# --- emoji ----------------------------------------------------------------------------------------------------------


def build_emoji(path: Path, packages: Path) -> None:
    atlas = Image.new("RGBA", (EMOJI_PX * PER_ROW * len(STYLES), EMOJI_PX * -(-len(OBJECTS) // PER_ROW)))
    for column, style in enumerate(STYLES):
        icons = _icons(packages, PACKAGES[style])
        for number, noun in enumerate(OBJECTS):
            place = EMOJI_PX * (number % PER_ROW * len(STYLES) + column), EMOJI_PX * (number // PER_ROW)
            atlas.paste(_rendered(icons, ICONS.get(noun, noun)), place)
    with atomic(path) as made:
        atlas.save(made, format="png", optimize=True)


def _icons(folder: Path, pattern: str) -> dict:
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"{folder} has no {pattern}; fetch the two packages by npm pack, as the head of this script says")
    with tarfile.open(files[-1]) as package:
        member = package.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)


def _rendered(icons: dict, name: str) -> Image.Image:
    import resvg_py

    icon = icons["icons"][name]
    left, top, width, height = (icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=EMOJI_PX, height=EMOJI_PX)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


# --- autoencoder and judge ------------------------------------------------------------------------------------------


def build_autoencoder(path: Path, *, num_steps: int, seed: int = 0) -> None:
    pixels, generator = draw_all(random_scenes(40_000, 100, held_out=None), 100), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    autoencoder = ScenesAutoencoder()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, num_steps, pct_start=0.05)
    progress = trange(num_steps, desc="autoencoder")
    for _ in progress:
        images = _random_batch(pixels, 32, generator)
        latents = autoencoder.encoder(images)
        away = latents.mean((0, 2, 3)).square().sum() + (latents.std((0, 2, 3)) - 1).square().sum()
        loss = _loss_of_decoder(autoencoder, latents, images, generator) + 1e-2 * away
        _descend(loss, optimizer, autoencoder)
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        latents = autoencoder.encoder(as_images(pixels[:2000]))
    autoencoder.mean.copy_(latents.mean((0, 2, 3)).reshape(4, 1, 1))
    autoencoder.std.copy_(latents.std((0, 2, 3)).reshape(4, 1, 1))
    _save(path, autoencoder)


def finish_decoder(path: Path, *, num_steps: int, seed: int = 0) -> None:
    """Train the decoder of ``path`` further while latents stay what they are: half of each batch are single objects, which are
    drawn largest and came out softest."""
    scenes = random_scenes(40_000, 100, held_out=None)
    pixels, generator = draw_all(scenes, 100), torch.Generator().manual_seed(seed)
    single = pixels[torch.tensor([scene.second is None and scene.first.count == 1 for scene in scenes])]
    autoencoder = ScenesAutoencoder()
    autoencoder.load_state_dict(load_file(path))
    autoencoder.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(autoencoder.decoder.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.05)
    progress = trange(num_steps, desc="decoder")
    for _ in progress:
        images = torch.cat([_random_batch(pixels, 16, generator), _random_batch(single, 16, generator)])
        loss = _loss_of_decoder(autoencoder, autoencoder.encoder(images), images, generator)
        _descend(loss, optimizer, autoencoder.decoder)
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    _save(path, autoencoder)


def _loss_of_decoder(autoencoder: ScenesAutoencoder, latents: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
    error = autoencoder.decoder(latents + 0.05 * torch.randn(latents.shape, generator=generator)) - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def build_judge(path: Path, *, num_steps: int, num_held_out: int = 2000, seed: int = 0) -> None:
    scenes, generator = random_scenes(60_000, 101, held_out=None), torch.Generator().manual_seed(seed)
    pixels, asked = draw_all(scenes, 101), asked_of(scenes)
    torch.manual_seed(seed)
    judge = ScenesJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps, pct_start=0.05)
    for _ in trange(num_steps, desc="judge"):
        pick = torch.randint(num_held_out, len(pixels), (BATCH_SIZE,), generator=generator)
        images = as_images(pixels[pick])
        noise = 0.1 * torch.rand(BATCH_SIZE, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
        logits = judge(images + noise)
        losses = [F.cross_entropy(logits[question], answer[pick], ignore_index=NOT_ASKED) for question, answer in asked.items()]
        _descend(torch.stack(losses).sum(), optimizer, judge)
        schedule.step()
    judge.eval()
    right = judge.agrees(as_images(pixels[:num_held_out]), scenes[:num_held_out])
    print(f"reads {right.float().mean():.2%} of {num_held_out} unseen pictures whole")
    _save(path, judge)


def _random_batch(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    pick = torch.randint(len(pixels), (size,), generator=generator)
    return as_images(pixels[pick])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def _save(path: Path, network: nn.Module) -> None:
    halves = {
        name: value.half().contiguous() if value.is_floating_point() else value for name, value in network.state_dict().items()
    }
    with atomic(path, overwrite=True) as made:
        save_file(halves, made)


# --- teacher and text encoder ---------------------------------------------------------------------------------------


class _Teaching:
    """Teacher and text encoder while they are trained: everything the next step needs, on disk and back."""

    def __init__(self, file: Path, *, num_steps: int, learning_rate: float = 1e-3, seed: int = 0):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(seed)
        self.file, self.num_steps, self.learning_rate, self.done = file, num_steps, learning_rate, 0
        self.unet, self.text = UNet2DConditionModel(**UNET_CONFIG), ScenesTextEncoder()
        networks = {"unet": self.unet, "text": self.text}
        self.weights: dict[str, nn.Parameter] = {
            f"{name}.{path}": weight for name, network in networks.items() for path, weight in network.named_parameters()
        }
        self.optimizer = Optimizer("adamw", self.weights, learning_rate=learning_rate, weight_decay=1e-3)
        self.average = EMA(self.weights, 0.9995)
        if file.exists():
            self._load()

    def rate(self) -> float:
        return self.learning_rate * min(1, (self.done + 1) / 300, (self.num_steps - self.done) / (DECAY_SHARE * self.num_steps))

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step(self.rate())
        self.done += 1
        self.average.update(self.weights, self.done)

    def save(self) -> None:
        state, rest = self.optimizer.state()
        parts = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "average": self.average.weights,
            "state": state,
        }
        tensors = {f"{part} {name}": tensor.contiguous() for part, named in parts.items() for name, tensor in named.items()}
        with atomic(self.file, overwrite=True) as made:
            save_file(tensors, made, metadata={"done": str(self.done), "rest": json.dumps(rest)})

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            metadata = opened.metadata()
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "state": {}}
        for key, tensor in load_file(self.file).items():
            part, name = key.split(" ", 1)
            parts[part][name] = tensor
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(parts["weights"][name])
        self.average.load(parts["average"])
        self.optimizer.load(parts["state"], json.loads(metadata["rest"]))
        self.done = int(metadata["done"])

    def use_average(self) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.average.weights[name])


def build_teacher(out: Path, *, num_steps: int, num_scenes: int = 80_000, save_every_steps: int = 500) -> None:
    teaching, schedule = _Teaching(out / "teaching.safetensors", num_steps=num_steps), scaled_linear()
    latents, tokens = _cached_latents(out, num_scenes)
    progress = trange(teaching.done, num_steps, desc="teacher", initial=teaching.done, total=num_steps, mininterval=10)
    mean_loss = None
    for step in progress:
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        token_ids = tokens[pick]
        token_ids[torch.rand(BATCH_SIZE, generator=generator) < CAPTION_DROPOUT] = 0
        x0, t = latents[pick], torch.randint(schedule.num_timesteps, (BATCH_SIZE,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        error = teaching.unet(schedule.add_noise(x0, eps, t), t, teaching.text(token_ids)).sample - eps
        # Without weights, the large errors at low noise hide the small ones at high noise, which sampling amplifies most.
        loss = (example_weights("min-snr", "eps", schedule, t) * error.square().flatten(1).mean(1)).mean()
        teaching.update(loss)
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if teaching.done % save_every_steps == 0:
            teaching.save()
    teaching.use_average()
    export(teaching, out)


def _cached_latents(out: Path, num_scenes: int) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, 8, 8) of scenes that are trained on, kept in a file, and the token ids of their captions (N, 10)."""
    file, scenes = out / "latents.safetensors", random_scenes(num_scenes, DATA_SEED)
    if not file.exists():
        with atomic(file) as made:
            save_file({"latents": latents_of(scenes, DATA_SEED, ScenesAutoencoder.bundled())}, made)
    return load_file(file)["latents"], torch.tensor([tokenize(scene.caption) for scene in scenes])


def export(teaching: _Teaching, out: Path) -> None:
    _save(out / "text_encoder.safetensors", teaching.text)
    architecture = Architecture.from_state_dict(teaching.unet.state_dict(), head_channels=32)
    weights: Mapping[str, Tensor] = DiffusersDenoiser(network=teaching.unet, architecture=architecture).named_parameters()
    metadata = {"modelspec.title": "Distill demo teacher: scenes of emoji"}
    save_unet(out / "teacher.safetensors", weights, architecture, dtype="fp16", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("."), help="folder of the two packages (default: the current one)")
    parser.add_argument("--steps", type=int, default=12_000, help="training steps of the teacher (default: %(default)s)")
    arguments = parser.parse_args()
    out = files.DATA = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not (path := out / "emoji.png").exists():
        build_emoji(path, arguments.packages)
    if not (path := out / "autoencoder.safetensors").exists():
        build_autoencoder(path, num_steps=7500)
        finish_decoder(path, num_steps=4000)
    if not (path := out / "judge.safetensors").exists():
        build_judge(path, num_steps=4000)
    if not (out / "teacher.safetensors").exists():
        build_teacher(out, num_steps=arguments.steps)


if __name__ == "__main__":
    main()
