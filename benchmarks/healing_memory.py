"""Forecast memory of teaching cut transformers outside ComfyUI, at true shape: ``python benchmarks/healing_memory.py``.

The recipes heal-flux, heal-z-image and heal-qwen with one image of 1024 px at once, their weights in 16, 8 and 4 bits, the student as
a whole, after every block, and block by block. Where the plan of a recipe folds nothing, the folds of PPCL's kind take its place for
the last. Text encoders are not counted, as they leave the device before the training, nor is the autoencoder, of less than half a GiB. Weights and the LoRA are counted
exactly, activations by simulating the step. Writes ``results/healing_memory.md``; nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from report import publish, table

from distill_core.base.sizes import gib
from distill_core.networks.transformers.architecture import FAMILIES, Transformer
from distill_core.preparation.transformers import empty_network, forecast_of
from distill_core.pruning.plan import name_map, preset
from distill_core.pruning.plan_text import find_plan
from distill_core.recipe import EXAMPLES, Recipe
from distill_core.training.lesson import on_own_weights
from distill_core.training.memory import Forecast, MemorySettings

DTYPES = ("bf16", "fp8", "nf4")
WAYS = ("output", "blocks", "local")
CARDS_GIB = (12, 16, 24, 32, 48, 80)


class Model(NamedTuple):
    """A published transformer, as its config in diffusers says what differs from the defaults of its class."""

    recipe: str
    family: str
    config: dict[str, Any]
    caption: tuple[tuple[int, int], int | None]
    """Tokens of a caption and their width; width of the pooled embedding."""
    folds: str = ""
    """Plan that folds runs, where that of the recipe does not."""


MODELS = {
    "Flux.1 dev": Model(
        "heal-flux",
        "flux1",
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        ((512, 4096), 768),
        folds="fold double 3-5,6-8,9-11,12-14,15-17",
    ),
    "Z-Image": Model("heal-z-image", "z-image", {"_class_name": "ZImageTransformer2DModel"}, ((256, 2560), None)),
    "Qwen-Image": Model("heal-qwen", "qwen-image", {"_class_name": "QwenImageTransformer2DModel"}, ((256, 3584), None)),
}


def main() -> None:
    rows = []
    for title, model in MODELS.items():
        shapes = {name: tuple(weight.shape) for name, weight in empty_network(model.config).state_dict().items()}
        transformer = Transformer(FAMILIES[model.family].in_diffusers, shapes)
        for dtype in DTYPES:
            forecasts = [_forecast(model, transformer, dtype, way) for way in WAYS]
            rows.append([f"{title}, {dtype}", *(_told(forecast) for forecast in forecasts)])
            print(*rows[-1], sep=" | ", flush=True)
    publish(
        "healing_memory",
        [
            "One image of 1024 x 1024 px at once, LoRA of rank 64, adamw8bit, gradient checkpointing.",
            "",
            *table(["model, weights", *WAYS], rows),
        ],
    )


def _forecast(model: Model, transformer: Transformer, dtype: str, way: str) -> Forecast:
    recipe = Recipe.read(Path(EXAMPLES / f"{model.recipe}.toml"))
    assert recipe.student.preset is not None
    folds = way == "local" and model.folds
    plan = find_plan(model.folds, transformer) if folds else preset(recipe.student.preset)
    mapping = name_map(transformer, plan)
    training = replace(recipe.training, objective=way, local_steps=0, batch_size=1, accumulation_steps=1)
    settings = MemorySettings(training=on_own_weights(training, mapping), teacher_dtype=dtype, shares_base=True)
    return forecast_of(model.config, transformer, mapping, (16, 128, 128), model.caption, settings)


def _told(forecast: Forecast) -> str:
    """The forecast, and the smallest card that has as much."""
    card = next((card for card in CARDS_GIB if card << 30 >= forecast.total_bytes / 0.95), None)
    return gib(forecast.total_bytes) + (f" ({card} GiB)" if card else "")


if __name__ == "__main__":
    main()
