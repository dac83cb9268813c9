"""Train the bundled demo from scratch: digits, classifier, then teacher and text encoder together.

``python -m distill_core.demo.build OUT`` writes the four files of ``distill_core/demo/data`` into OUT. Needs
scikit-learn. About 35 minutes on two CPU cores; stages whose file is already in OUT are skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from ..diffusion.denoiser import DiffusersDenoiser
from ..diffusion.schedule import scaled_linear
from ..networks.architecture import Architecture
from ..networks.files import save_unet
from ..training.weighting import example_weights
from . import digits

UNET_CONFIG = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(32, 64, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=digits.CONTEXT_WIDTH,
    attention_head_dim=(1, 2, 2),  # the number of heads, despite its name: 32 channels each
)
"""A small SD1.x: three levels, the innermost without attention, two layers per level, one mid block."""

CAPTION_DROPOUT = 0.15


def build_digits(path: Path) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.from_numpy(scans.images).to(torch.uint8)
    save_file({"images": images, "labels": torch.from_numpy(scans.target).to(torch.uint8)}, path)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, rotate and scale each image a little, so that a classifier of 1,437 examples generalises."""
    n = len(images)
    angle, size = 0.2 * torch.randn(n, generator=generator), 1 + 0.08 * torch.randn(n, generator=generator)
    shift = 0.08 * torch.randn(n, 2, 1, generator=generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn * size[:, None, None], shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def build_classifier(path: Path, *, num_steps: int = 2500, batch_size: int = 128, seed: int = 0) -> None:
    images, labels = digits.load_digits()
    train, held_out = digits.held_out_split()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = digits.DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in trange(num_steps, desc="classifier"):
        pick = train[torch.randint(len(train), (batch_size,), generator=generator)]
        loss = F.cross_entropy(classifier(jitter(images[pick], generator)), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    print(f"held-out accuracy {digits.accuracy(classifier.eval(), images[held_out], labels[held_out]):.4f}")
    save_file(classifier.state_dict(), path)


def build_teacher(teacher_path: Path, text_path: Path, *, num_steps: int, batch_size: int = 64, seed: int = 0) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    images, labels = digits.load_digits()
    latents, schedule = digits.encode(images), scaled_linear()
    tokens = torch.tensor([[digits.tokenize(digits.caption(n, k)) for k in range(len(digits.TEMPLATES))] for n in range(10)])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet, text = UNet2DConditionModel(**UNET_CONFIG), digits.DigitsTextEncoder()
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    lr = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=num_steps)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
    progress = trange(num_steps, desc="teacher")
    mean_loss = None
    for _ in progress:
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        template = torch.randint(len(digits.TEMPLATES), (batch_size,), generator=generator)
        token_ids = tokens[labels[pick], template]
        token_ids[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = 0
        x0, eps = latents[pick], torch.randn(latents[pick].shape, generator=generator)
        t = torch.randint(schedule.num_timesteps, (batch_size,), generator=generator)
        error = unet(schedule.add_noise(x0, eps, t), t, text(token_ids)).sample - eps
        # Without weights, the large errors at low noise hide the small ones at high noise, which sampling amplifies most.
        loss = (example_weights("min-snr", "eps", schedule, t) * error.square().flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr.step()
        ema.step(parameters)
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        progress.set_postfix(loss=f"{mean_loss:.4f}")
    ema.copy_to(parameters)
    save_file(text.state_dict(), text_path)
    export_teacher(unet, teacher_path)


def export_teacher(unet, path: Path) -> None:
    architecture = Architecture.from_state_dict(unet.state_dict(), head_channels=32)
    weights = DiffusersDenoiser(network=unet, architecture=architecture).named_parameters()
    save_unet(path, weights, architecture, dtype="fp16", metadata={"modelspec.title": "Distill demo teacher: handwritten digits"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=9000, help="training steps of the teacher (default %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    digits.DATA = out
    if not (out / "digits.safetensors").exists():
        build_digits(out / "digits.safetensors")
    if not (out / "classifier.safetensors").exists():
        build_classifier(out / "classifier.safetensors")
    if not (out / "teacher.safetensors").exists():
        build_teacher(out / "teacher.safetensors", out / "text_encoder.safetensors", num_steps=arguments.steps)


if __name__ == "__main__":
    main()
