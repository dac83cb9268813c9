"""Nodes that sample with one model for each range of noise levels."""

from pathlib import Path

from comfy_api.latest import io, ui

from ..distill_core.diffusion.ranges import Boundary, read_boundaries
from ..distill_core.evaluation import plots
from ..distill_core.routing.experts import Experts
from . import bridge
from .inputs import sampler_inputs

MAX_MODELS = 8
FOLDER = "experts folder"


def _models(least: int) -> io.Autogrow.Input:
    template = io.Autogrow.TemplateNames(
        io.Model.Input("model", tooltip="Takes over where the previous model ends. Put LoRAs on each model before this node."),
        names=[f"model_{number}" for number in range(1, MAX_MODELS + 1)],
        min=least,
    )
    return io.Autogrow.Input(
        "models",
        template=template,
        tooltip="The models in the order they are used, model_1 for the noisiest part. A new input appears as you connect "
        "models.",
    )


def _split(*more: io.DynamicCombo.Option) -> io.DynamicCombo.Input:
    share = io.Float.Input(
        "share",
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip="Share of the sampling that model_1 does: 0 is none, 1 is all. The other models divide the rest evenly.",
    )
    boundaries = io.String.Input(
        "boundaries",
        default="50%",
        tooltip="Where one model hands over to the next, one fewer boundary than models: 50%, 75% of the sampling; or timesteps, "
        "500, 250; or noise levels, sigma 4.5, 1.2.",
    )
    return io.DynamicCombo.Input(
        "split",
        options=[
            io.DynamicCombo.Option("share", [share]),
            io.DynamicCombo.Option("boundaries", [boundaries]),
            io.DynamicCombo.Option("even", []),
            *more,
        ],
        tooltip="How the sampling is divided. share: a slider for model_1's part. boundaries: as the experts were trained. "
        "even: the same number of timesteps for each." + f" {FOLDER}: as the folder says." * bool(more),
    )


def _experts_folder() -> io.DynamicCombo.Option:
    experts = io.Combo.Input(
        "experts",
        options=list(bridge.experts_folders()),
        tooltip="A folder from Train Timestep Experts or distill train, instead of models. Press R after training a new one.",
    )
    return io.DynamicCombo.Option(FOLDER, [experts])


def _route(models: dict, split: dict):
    """The routed MODEL and the names of its models."""
    if split["split"] == FOLDER:
        if models:
            raise ValueError("an experts folder has its own models: disconnect those of the node, or choose another split")
        experts = Experts.read(bridge.experts_folder(split["experts"]))
        return bridge.load_experts(experts), [Path(member.file).stem for member in experts.members]
    if len(models) < 2:
        raise ValueError(f"connect at least two models, got {len(models)}")
    names, given = list(models), list(models.values())
    return bridge.route_models(given, _boundaries(given, **split)), names


def _boundaries(models: list, split: str, share: float = 0.5, boundaries: str = "") -> list[Boundary]:
    if split == "boundaries":
        return bridge.sorted_boundaries(models[0], read_boundaries(boundaries))
    return bridge.share_boundaries(len(models), 1 / len(models) if split == "even" else share)


class TimestepRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTimestepRouter",
            display_name="Timestep Router",
            category="distill",
            description="Combines several models into one MODEL, each in charge of a part of the sampling: experts trained for "
            "ranges of timesteps; a small model for the noisy part and a big one for the details, without any training; or high- "
            "and low-noise models. Works with every sampler: it chooses the model by noise level, never by step number.",
            search_aliases=[
                "route",
                "switch model",
                "o2mkd",
                "t-stitch",
                "moe",
                "high noise low noise",
                "experts",
                "wan",
                "refiner",
            ],
            inputs=[_models(2), _split()],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For any sampler. Nodes that act on guidance (RescaleCFG, PAG) go after this node.",
                ),
                io.String.Output(display_name="ranges", tooltip="Which model is in charge of which part."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, models: dict, split: dict) -> io.NodeOutput:
        routed, names = _route(models, split)
        ranges = bridge.describe_route(routed, names)
        bridge.show_text(ranges, cls.hidden.unique_id)
        return io.NodeOutput(routed, ranges)


class TimestepRouterSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTimestepRouterSampler",
            display_name="Timestep Router Sampler",
            category="distill",
            description="KSampler with a model for each part of the sampling, and a chart that shows which model ran at which "
            "noise level. The same as Timestep Router plus KSampler.",
            search_aliases=["route", "ksampler", "switch model", "o2mkd", "t-stitch", "moe", "high noise low noise", "wan"],
            inputs=[
                _models(0),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What the image should not show."),
                io.Latent.Input(
                    "latent_image", tooltip="What to denoise: an empty latent, or an encoded image for image to image."
                ),
                _split(_experts_folder()),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Decides the noise."),
                *sampler_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1, sampling starts with less noise and keeps part of the latent.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                io.Image.Output(display_name="route", tooltip="Chart of which model ran at which noise level."),
                io.String.Output(display_name="ranges", tooltip="Which model is in charge of which part."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, split: dict, **_):
        """When an experts folder was last written."""
        return bridge.fingerprint_of(bridge.experts_written, split.get("experts", ""))

    @classmethod
    def execute(cls, split: dict, latent_image, models: dict | None = None, **settings) -> io.NodeOutput:
        routed, names = _route(models or {}, split)
        ranges = bridge.describe_route(routed, names)
        bridge.show_text(ranges, cls.hidden.unique_id)
        latent, evaluations = bridge.sample_routed(routed, latent_image, **settings)
        title = f"{settings['sampler_name']}, {settings['scheduler']}, {settings['steps']} steps"
        chart = bridge.to_image(plots.route_chart(evaluations, names, bridge.boundary_sigmas(routed), title))
        return io.NodeOutput(latent, chart, ranges, ui=ui.PreviewImage(chart, cls=cls))


NODES = [TimestepRouter, TimestepRouterSampler]
