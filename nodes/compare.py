"""Nodes that compare models side by side and write a report."""

from comfy_api.latest import io, ui

from ..distill_core.base.disk import check_writable
from ..distill_core.base.image_grid import stacked
from ..distill_core.evaluation import compare, plots
from ..distill_core.evaluation.comparison import read_names
from ..distill_core.evaluation.metrics import distance_metrics
from . import bridge
from .inputs import sampler_inputs, seed_input

MAX_MODELS = 8
Compared = io.Custom("DISTILL_COMPARISON")


class CompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.Autogrow.TemplateNames(
            io.Model.Input("model", tooltip="model_1 is the reference for the others: usually the teacher."),
            names=[f"model_{number}" for number in range(1, MAX_MODELS + 1)],
            min=2,
        )
        return io.Schema(
            node_id="DistillCompareModels",
            display_name="Compare Models",
            category="distill",
            description="Samples the same seeds with several models, side by side, and measures what each costs: parameters, "
            "GMACs, time per step, peak memory, size, and how far its predictions are from the first model's at every noise "
            "level. Any MODEL works: experts, routed models, models with LoRAs.",
            search_aliases=["compare", "benchmark", "side by side", "xy plot", "speed test", "teacher student", "distill"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "models",
                    template=template,
                    tooltip="The models to compare, the teacher first. A new input appears as you connect models.",
                ),
                io.Conditioning.Input("positive", tooltip="What the images should show."),
                io.Conditioning.Input("negative", tooltip="What the images should not show."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of the image size; the whole batch is sampled for every seed."
                ),
                io.Vae.Input("vae", tooltip="Decodes latents into images; the same for all models."),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Names of the models, separated by commas: teacher, pruned, distilled (images can show only Latin "
                    "letters). Empty: model_1, model_2 ...",
                ),
                io.Int.Input(
                    "num_seeds",
                    default=4,
                    min=1,
                    max=10_000,
                    tooltip="Number of seeds per model, starting at seed; each is also timed. The grid shows the first 8 images.",
                ),
                seed_input("The first seed. Every model uses the same seeds; each image is what KSampler makes from its seed."),
                *sampler_inputs(),
                io.String.Input(
                    "cfg_of_each",
                    default="",
                    advanced=True,
                    tooltip="For models that need different guidance: one cfg per model, separated by commas. 7.5, 1 compares a "
                    "teacher with a student that has learnt its guidance. Empty: cfg for all.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="A row for each model, a column for each of the first 8 images."),
                io.Image.Output(
                    display_name="table", tooltip="The measurements, and the distance from the first model over timesteps."
                ),
                Compared.Output(display_name="comparison", tooltip="All results, for Distillation Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, models: dict, latent_image, names: str, cfg: float, cfg_of_each: str, **settings) -> io.NodeOutput:
        connected = list(models.values())
        if len(connected) < 2:
            raise ValueError(f"connect at least two models, got {len(connected)}")
        called = read_names(names, list(models))
        cfgs = _cfgs(cfg_of_each, cfg, len(connected))
        asked = bridge.SampleSettings(latent=latent_image, cfg=cfgs, **settings)
        comparison = bridge.compare_models(dict(zip(called, connected, strict=True)), asked, cls.hidden.unique_id)
        bridge.show_text(comparison.summary(), cls.hidden.unique_id)
        grid, table = (bridge.to_image(image) for image in (compare.grid(comparison), compare.chart(comparison)))
        return io.NodeOutput(grid, table, comparison, ui=ui.PreviewImage(grid, cls=cls))


def _cfgs(text: str, cfg: float, count: int) -> list[float]:
    if not text.strip():
        return [cfg] * count
    try:
        cfgs = [float(part) for part in text.split(",")]
    except ValueError:
        cfgs = []
    if len(cfgs) != count or not all(0 <= one <= 100 for one in cfgs):
        raise ValueError(f"cfg_of_each: give one number from 0 to 100 per model ({count}), got {text!r}; or leave it empty")
    return cfgs


class DistillationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillReport",
            display_name="Distillation Report",
            category="distill",
            description="Writes a comparison as one HTML page into the output folder: images, measurements, distances and "
            "settings, and the loss curve of a run; and beside it a page for blind votes on the images. With your own CLIP "
            "models it also evaluates the images: Fréchet and kernel distance, diversity, and CLIP score. Nothing is downloaded.",
            search_aliases=["report", "vote", "diversity", "fid", "kid", "clip score", "html", "metrics", "evaluate", "distill"],
            is_output_node=True,
            inputs=[
                Compared.Input("comparison", tooltip="From Compare Models."),
                io.String.Input("title", default="Distillation report", tooltip="Heading of the page."),
                io.String.Input(
                    "filename_prefix",
                    default="distill/report",
                    tooltip="Name under the output folder; a number is added. It never overwrites a file.",
                ),
                io.String.Input(
                    "run_name",
                    default="",
                    tooltip="A run under output/distill_runs whose loss curve the report shows. Empty: none.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision. With it the report evaluates the images: Fréchet and kernel distance of each "
                    "model's images from the first model's, or from real_images.",
                ),
                io.Image.Input(
                    "real_images",
                    optional=True,
                    tooltip="Images to compare all models with, instead of the first model's. Use a few hundred of the same "
                    "subjects for meaningful numbers.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For the CLIP score. Must be the text encoder that belongs to clip_vision: SDXL's CLIP with CLIP "
                    "ViT-bigG, SD2's with CLIP ViT-H. SD1.x checkpoints lack the projection it needs.",
                ),
                io.String.Input("prompt", default="", tooltip="What the images should show, for the CLIP score."),
            ],
            outputs=[
                io.Image.Output(display_name="report", tooltip="The report as one image."),
                io.String.Output(display_name="path", tooltip="Path of the page. Open it in a browser."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: str = "", **_):
        """When the run wrote its losses."""
        return bridge.fingerprint_of(bridge.losses_written, run_name)

    @classmethod
    def execute(
        cls,
        comparison,
        title: str,
        filename_prefix: str,
        run_name: str,
        prompt: str,
        clip_vision=None,
        real_images=None,
        clip=None,
    ) -> io.NodeOutput:
        path = bridge.output_path(filename_prefix, ".html")
        check_writable(path)
        curves = [plots.loss_curve(losses, name) for name, losses in bridge.losses_of(run_name).items()] if run_name else []
        if clip_vision is None and (clip is not None or real_images is not None):
            raise ValueError(
                "evaluating images needs a CLIP Vision model: connect clip_vision, or disconnect clip and real_images"
            )
        if clip is not None and not prompt.strip():
            raise ValueError(
                "prompt is empty: the CLIP score measures how well images match a prompt; write one, or disconnect clip"
            )
        judged, by = (
            _judged(comparison, clip_vision, real_images, clip, prompt, cls.hidden.unique_id) if clip_vision else ((), {})
        )
        losses = stacked(curves) if curves else None
        drawn = compare.write_report(path, comparison, title=title, judged=judged, judged_by=by, losses=losses)
        told = [f"Saved {path}"]
        if compare.votes_path(path).exists():
            told.append(f"Blind votes: {compare.votes_path(path).name} beside it")
        bridge.show_text("\n".join(told), cls.hidden.unique_id)
        image = bridge.to_image(drawn)
        return io.NodeOutput(image, str(path), ui=ui.PreviewImage(image, cls=cls))


def _judged(comparison, clip_vision, real_images, clip, prompt: str, node_id: str) -> tuple[list[compare.Judged], dict[str, str]]:
    """The evaluation of every model's images, and a description of how it was done."""
    real = None if real_images is None else bridge.pixels_of(real_images)
    total = sum(map(len, comparison.images.values())) + (0 if real is None else len(real))
    progress = bridge.Progress(node_id, "images evaluated", total)
    first, images = next(iter(comparison.images.items()))
    text = None
    if real is not None or len(comparison.images) > 1:  # refuse before the long work, like a clip that does not match
        distance_metrics(len(images if real is None else real), len(images))
    if clip is not None:
        width = bridge.image_features(clip_vision, images[:1]).shape[1]
        text = bridge.text_features(clip, prompt, width)
    features = {name: bridge.image_features(clip_vision, seen, progress.add) for name, seen in comparison.images.items()}
    of_real = None if real is None else bridge.image_features(clip_vision, real, progress.add)
    reference = f"{len(images)} images by {first}" if real is None else f"{len(real)} real images"
    return compare.judge(features, of_real, text), {
        "judged": f"{len(images)} images of each model, compared with {reference}",
        **({"prompt": prompt} if clip is not None else {}),
    }


NODES = [CompareModels, DistillationReport]
