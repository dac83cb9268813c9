"""The bundled teacher as a denoiser, and its data as a dataset."""

from __future__ import annotations

import torch

from ..data.dataset import LatentDataset
from ..diffusion.denoiser import DiffusersDenoiser
from ..networks.files import UNetFile, open_unet
from . import digits

LATENT_SHAPE = (4, 8, 8)


def teacher_file() -> UNetFile:
    return open_unet(digits.DATA / "teacher.safetensors")


def load_denoiser(file: UNetFile) -> DiffusersDenoiser:
    """A denoiser in float32, on the GPU if there is one."""
    from ..networks.build import load_unet

    network = load_unet(file).to("cuda" if torch.cuda.is_available() else "cpu")
    return DiffusersDenoiser.of_file(file, network)


def load_dataset() -> LatentDataset:
    """All digits with their captions ("the digit seven")."""
    images, labels = digits.load_digits()
    text = digits.DigitsTextEncoder.bundled()
    by_label = text.captions([digits.caption(n) for n in range(10)])
    return LatentDataset.of(digits.encode(images), by_label[labels], text.captions([""])[0])
