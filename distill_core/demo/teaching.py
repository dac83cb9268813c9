"""Train the demo's teachers: a UNet together with its text encoder, then a transformer that reads the same text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from ..base.storage import atomic
from ..diffusion.denoiser import DiffusersDenoiser
from ..diffusion.pipelines import PATCH, patches, positions
from ..diffusion.schedule import scaled_linear
from ..networks.architecture import Architecture
from ..networks.files import save_unet
from ..training.ema import EMA
from ..training.optim import Optimizer
from ..training.weighting import example_weights
from .autoencoder import COPIES, NUM_CHANNELS, ScenesAutoencoder
from .grammar import NUM_TOKENS, random_scenes, tokenize
from .teacher import DATA_SEED, LATENT_SHAPE, latents_of
from .text import CONTEXT_WIDTH, ScenesTextEncoder
from .transformer import CONFIG, for_copies

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
"""The learning rate of a teacher is constant, and falls to 0 in this share of the steps at the end."""
SIGMA_MEAN, SIGMA_STD = 0.5, 1.1
"""Noise levels of the transformer are drawn as the sigmoid of a normal distribution."""
NUM_SCENES = 80_000
SAVE_EVERY_STEPS = 500


class _Teaching:
    """Networks while they are trained together: everything the next step needs, on disk and back."""

    def __init__(self, file: Path, networks: Mapping[str, nn.Module], *, num_steps: int, learning_rate: float = 1e-3):
        self.file, self.num_steps, self.learning_rate, self.done = file, num_steps, learning_rate, 0
        self.weights: dict[str, nn.Parameter] = {
            f"{name}.{path}": weight for name, network in networks.items() for path, weight in network.named_parameters()
        }
        self.optimizer = Optimizer("adamw", self.weights, learning_rate=learning_rate, weight_decay=1e-3)
        self.average = EMA(self.weights, 0.9995)
        if file.exists():
            self._load()

    def run(self, loss_of_step: Callable[[torch.Generator], Tensor]) -> None:
        """Train to the end from where it is, and leave the average in the networks.

        ``loss_of_step(generator)``: of a batch drawn by the generator, which each step has one of its own of.
        """
        progress = trange(self.done, self.num_steps, desc=self.file.stem, initial=self.done, total=self.num_steps, mininterval=10)
        mean_loss = None
        for step in progress:
            loss = loss_of_step(torch.Generator().manual_seed(step))
            self._update(loss)
            mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            if self.done % SAVE_EVERY_STEPS == 0:
                self._save()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.average.weights[name])

    def _rate(self) -> float:
        return self.learning_rate * min(1, (self.done + 1) / 300, (self.num_steps - self.done) / (DECAY_SHARE * self.num_steps))

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step(self._rate())
        self.done += 1
        self.average.update(self.weights, self.done)

    def _save(self) -> None:
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


class _Scenes:
    """What teachers are trained on: latents (N, 4, 8, 8), kept in a file, and token ids (N, 10) of their captions."""

    def __init__(self, out: Path):
        file, scenes = out / "latents.safetensors", random_scenes(NUM_SCENES, DATA_SEED)
        if not file.exists():
            with atomic(file) as made:
                save_file({"latents": latents_of(scenes, DATA_SEED, ScenesAutoencoder.bundled())}, made)
        self.latents = load_file(file)["latents"]
        self.tokens = torch.tensor([tokenize(scene.caption) for scene in scenes])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and token ids of a batch, some without their caption."""
        pick = torch.randint(len(self.latents), (BATCH_SIZE,), generator=generator)
        token_ids = self.tokens[pick]
        token_ids[torch.rand(BATCH_SIZE, generator=generator) < CAPTION_DROPOUT] = 0
        return self.latents[pick], token_ids


def build_unet(out: Path, *, num_steps: int, seed: int = 0) -> None:
    """Train the UNet and the text encoder together, into ``teacher.safetensors`` and ``text_encoder.safetensors``."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet, text, schedule, scenes = UNet2DConditionModel(**UNET_CONFIG), ScenesTextEncoder(), scaled_linear(), _Scenes(out)

    def loss_of_step(generator: torch.Generator) -> Tensor:
        x0, token_ids = scenes.draw(generator)
        t = torch.randint(schedule.num_timesteps, (BATCH_SIZE,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        error = unet(schedule.add_noise(x0, eps, t), t, text(token_ids)).sample - eps
        # Without weights, the large errors at low noise hide the small ones at high noise, which sampling amplifies most.
        return (example_weights("min-snr", "eps", schedule, t) * error.square().flatten(1).mean(1)).mean()

    _Teaching(out / "teaching.safetensors", {"unet": unet, "text": text}, num_steps=num_steps).run(loss_of_step)
    save_half(out / "text_encoder.safetensors", text.state_dict())
    architecture = Architecture.from_state_dict(unet.state_dict(), head_channels=32)
    weights: Mapping[str, Tensor] = DiffusersDenoiser(network=unet, architecture=architecture).named_parameters()
    metadata = {"modelspec.title": "Distill demo teacher: scenes of emoji"}
    save_unet(out / "teacher.safetensors", weights, architecture, dtype="fp16", metadata=metadata)


def build_transformer(out: Path, *, num_steps: int, seed: int = 0) -> None:
    """Train the transformer by flow matching, with the text encoder as it is, into ``transformer.safetensors``."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    network, text, scenes = (
        FluxTransformer2DModel(**{**CONFIG, "in_channels": PATCH**2 * NUM_CHANNELS}),
        ScenesTextEncoder.bundled(),
        _Scenes(out),
    )
    ids, no_ids = positions(*LATENT_SHAPE[1:]), torch.zeros(NUM_TOKENS, 3)
    nn.init.zeros_(network.proj_out.weight)

    def loss_of_step(generator: torch.Generator) -> Tensor:
        x0, token_ids = scenes.draw(generator)
        sigma = torch.sigmoid(SIGMA_MEAN + SIGMA_STD * torch.randn(BATCH_SIZE, generator=generator))
        noise = torch.randn(x0.shape, generator=generator) * COPIES**-0.5  # that of the mean of copies
        x_t = torch.lerp(x0, noise, sigma.reshape(-1, 1, 1, 1))
        with torch.no_grad():
            context = text(token_ids)
        answer = network(patches(x_t), context, context.mean(1), sigma, ids, no_ids).sample
        return (answer - patches(noise - x0)).square().mean()

    _Teaching(out / "teaching_transformer.safetensors", {"transformer": network}, num_steps=num_steps).run(loss_of_step)
    metadata = {"modelspec.title": "Distill demo transformer: scenes of emoji"}
    save_half(out / "transformer.safetensors", for_copies(network.state_dict()), metadata)


def save_half(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Weights in half precision."""
    halves = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in weights.items()}
    with atomic(path, overwrite=True) as made:
        save_file(halves, made, metadata)
