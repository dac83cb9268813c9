"""Sampling with a model for each range of noise levels."""

from pathlib import Path

from comfy_api.latest import io, ui

from ..distill_core import plots
from ..distill_core.ranges import Boundary, read_boundaries
from ..distill_core.students import MANIFEST, Students
from . import bridge
from .inputs import sampler_inputs

MAX_MODELS = 8
FOLDER = "students folder"


def _models(least: int) -> io.Autogrow.Input:
    template = io.Autogrow.TemplateNames(
        io.Model.Input("model", tooltip="In charge from where the one before it ends. Put LoRAs on each model before this node."),
        names=[f"model_{number}" for number in range(1, MAX_MODELS + 1)],
        min=least,
    )
    return io.Autogrow.Input(
        "models",
        template=template,
        tooltip="The models in the order they are used, model_1 for the noisiest part. Another input appears for each that is connected.",
    )


def _split(*more: io.DynamicCombo.Option) -> io.DynamicCombo.Input:
    share = io.Float.Input(
        "share",
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip="How much of the sampling model_1 does: 0 is none of it, 1 all. The other models share the rest evenly.",
    )
    boundaries = io.String.Input(
        "boundaries",
        default="50%",
        tooltip="Where one model hands over to the next, one boundary less than models: 50%, 75% of the sampling; or timesteps, "
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
        tooltip="How the sampling is divided. share: a slider for model_1's part. boundaries: as students were trained. even: as "
        "many timesteps for each." + f" {FOLDER}: as the folder tells." * bool(more),
    )


def _students_folder() -> io.DynamicCombo.Option:
    students = io.Combo.Input(
        "students",
        options=list(bridge.students_folders()),
        tooltip="A folder that Train Timestep Students or distill train wrote, in place of models. Press R after training a new one.",
    )
    return io.DynamicCombo.Option(FOLDER, [students])


def _route(models: dict, split: dict):
    """The routed MODEL and the names of its models."""
    if split["split"] == FOLDER:
        if models:
            raise ValueError("a students folder has models of its own: disconnect those of the node, or choose another split")
        students = Students.read(bridge.students_folder(split["students"]))
        return bridge.load_students(students), [Path(member.file).stem for member in reversed(students.members)]
    if len(models) < 2:
        raise ValueError(f"connect at least two models, got {len(models)}")
    names, given = list(models), list(models.values())
    return bridge.route_models(given, _boundaries(given, **split)), names


def _boundaries(models: list, split: str, share: float | None = None, boundaries: str = "") -> list[Boundary]:
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
            description="One MODEL of several, each in charge of a part of the sampling: students that were trained for a range "
            "of timesteps; a small model for the noisy part and a big one for the details, without any training; or high- and "
            "low-noise experts. Works with every sampler: the model is chosen by noise level, never by step.",
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
                    tooltip="For any sampler. What acts on guidance (RescaleCFG, PAG) belongs behind this node.",
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
            description="KSampler with a model for each part of the sampling, and a picture of which model was asked at which "
            "noise level. The same as Timestep Router and KSampler.",
            search_aliases=["route", "ksampler", "switch model", "o2mkd", "t-stitch", "moe", "high noise low noise", "wan"],
            inputs=[
                _models(0),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not."),
                io.Latent.Input("latent_image", tooltip="What is denoised: an empty latent, or a picture for image to image."),
                _split(_students_folder()),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Decides the noise."),
                *sampler_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the sampling begins at less noise and keeps something of the latent.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                io.Image.Output(display_name="route", tooltip="Which model was asked at which noise level."),
                io.String.Output(display_name="ranges", tooltip="Which model is in charge of which part."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, split: dict, **_):
        """When a students folder was written."""
        folder = bridge.students_folders().get(split.get("students"))
        return folder and (folder / MANIFEST).stat().st_mtime_ns

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
