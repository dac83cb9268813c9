"""Make the demo from two packages of emoji: images, autoencoder, judge, then its teachers, a UNet and a transformer.

``npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6`` fetches the packages;
``python -m distill_core.demo.build OUT --packages FOLDER`` draws and trains. Needs resvg-py. Some hours on two CPU
cores: what is in OUT already is kept, and a teacher goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange

from ..base.storage import atomic
from . import files
from .autoencoder import ScenesAutoencoder
from .drawing import EMOJI_PX, PER_ROW, as_images, draw_all
from .grammar import OBJECTS, STYLES, random_scenes
from .judge import NOT_ASKED, ScenesJudge, asked_of
from .teaching import build_transformer, build_unet, save_half

PACKAGES = {"flat": "iconify-json-fluent-emoji-flat-*.tgz", "shaded": "iconify-json-noto-*.tgz"}
"""Files of the packages by style."""
ICONS = {"apple": "red-apple", "cake": "birthday-cake", "bee": "honeybee", "tree": "deciduous-tree", "car": "automobile",
         "train": "locomotive", "boat": "sailboat", "lamp": "light-bulb", "book": "closed-book", "gift": "wrapped-gift"}  # fmt: skip
"""Their names of objects that are named otherwise here."""
BATCH_SIZE = 64


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
    save_half(path, autoencoder.state_dict())


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
    save_half(path, autoencoder.state_dict())


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
    print(f"reads {right.float().mean():.2%} of {num_held_out} unseen images whole")
    save_half(path, judge.state_dict())


def _random_batch(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    pick = torch.randint(len(pixels), (size,), generator=generator)
    return as_images(pixels[pick])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("."), help="folder of the two packages (default: the current one)")
    parser.add_argument("--steps", type=int, default=12_000, help="training steps of each teacher (default: %(default)s)")
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
        build_unet(out, num_steps=arguments.steps)
    if not (out / "transformer.safetensors").exists():
        build_transformer(out, num_steps=arguments.steps)


if __name__ == "__main__":
    main()
