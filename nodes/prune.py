"""Nodes that remove blocks and find out which blocks to remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..distill_core.base.settings import limits_of
from ..distill_core.evaluation import plots
from ..distill_core.networks.network import TRANSFORMERS, UNETS, Network
from ..distill_core.networks.transformers.architecture import FAMILIES
from ..distill_core.pruning import runs
from ..distill_core.pruning.analyse import CRITERIA, Planner, Settings, decide, examples, report, score
from ..distill_core.pruning.plan import preset, preset_names
from ..distill_core.pruning.plan_text import EXAMPLE, EXAMPLE_OF_FOLDING, EXAMPLE_OF_TRANSFORMERS, read_plan, write_plan
from . import bridge
from .inputs import seed_input, setting_input

if TYPE_CHECKING:
    from PIL.Image import Image


def _prune_inputs(teacher: str, presets: str, names: list[str], ways: str) -> list[io.Input]:
    """Inputs of the nodes that prune. teacher: what a MODEL may be. presets: what their titles say. ways: to write a plan."""
    of_presets = (f"{name} (for {preset(name).teacher}): {preset(name).title}." for name in names)
    return [
        io.Model.Input("model", tooltip=f"The full model: the teacher. {teacher}"),
        io.Combo.Input("preset", options=names, default=names[0], tooltip=" ".join([presets, *of_presets])),
        io.String.Input(
            "plan",
            default="",
            optional=True,
            tooltip=f"A plan of your own instead of the preset: {ways}. Leave it empty to use the preset.",
        ),
    ]


def _prune_outputs(node: str, after: str) -> list[io.Output]:
    return [
        io.Model.Output(display_name="student", tooltip=f"The pruned model. {after}"),
        io.String.Output(display_name="summary", tooltip="What was removed, in one line."),
        io.String.Output(display_name="plan", tooltip=f"The plan as one line of text, for another {node}."),
    ]


def _prune(node: type[io.ComfyNode], teacher: bridge.Model, network: Network, plan: str, pad: bool = False) -> io.NodeOutput:
    student = bridge.Model(bridge.prune_model(teacher, read_plan(plan, network), pad))
    before, after = network.num_parameters, student.network.num_parameters
    note = bridge.precision_note(teacher, student)
    summary = f"{before / 1e6:,.2f} M parameters before, {after / 1e6:,.2f} M now: {1 - after / before:.0%} fewer" + (
        f". {note}" if note else ""
    )
    bridge.show_text(summary, node.hidden.unique_id)
    assert student.plan is not None  # it was pruned just now
    return io.NodeOutput(student.patcher, summary, write_plan(student.plan, network))


class PruneUNetBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillPruneUNetBlocks",
            display_name="Prune UNet Blocks",
            category="distill",
            description="Removes blocks from a UNet and keeps the weights of the rest. The result is an ordinary MODEL, smaller "
            "and faster; its images are poor until you distil it. The input MODEL does not change.",
            search_aliases=[
                "remove blocks",
                "prune",
                "block removal",
                "BK-SDM",
                "SSD-1B",
                "KOALA",
                "small model",
                "smaller",
                "faster",
                "distill",
                "compress",
                "加速",
                "压缩",
            ],
            inputs=[
                *_prune_inputs(
                    "SD1.x, SD2, SDXL and their fine-tunes, or the demo's.",
                    "Which blocks to remove.",
                    preset_names(*UNETS),
                    f"one line such as '{EXAMPLE}', JSON, or the output of Analyse UNet Blocks",
                ),
                io.Boolean.Input(
                    "pad",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="If stock ComfyUI cannot open the student, put removed blocks back as identity blocks: the images "
                    "stay the same, the file gets larger.",
                ),
            ],
            outputs=_prune_outputs("Prune UNet Blocks", "Connect it to Distill Train Step."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset: str, plan: str = "", pad: bool = False) -> io.NodeOutput:
        teacher = bridge.Model(model)
        return _prune(cls, teacher, teacher.architecture, plan.strip() or preset, pad)


class PruneTransformerBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillPruneTransformerBlocks",
            display_name="Prune Transformer Blocks",
            category="distill",
            description="Removes blocks from a diffusion transformer (Flux, Z-Image, Qwen-Image, Wan and others) and keeps the "
            "weights of the rest, quantised ones as they are. The result is an ordinary MODEL, smaller and faster, that stock "
            "ComfyUI opens once it is saved. Image quality drops with every block you remove. The input MODEL does not change.",
            search_aliases=["remove blocks", "prune", "flux", "flux lite", "flux mini", "z-image", "qwen", "wan", "small model",
                            "block removal", "depth", "smaller", "faster", "distill", "compress", "加速", "压缩"],
            inputs=_prune_inputs(
                f"{', '.join(FAMILIES[name].title for name in TRANSFORMERS)}, and their fine-tunes.",
                "Which blocks stay.",
                preset_names(*TRANSFORMERS),
                f"one line such as '{EXAMPLE_OF_TRANSFORMERS}' or '{EXAMPLE_OF_FOLDING}', JSON, or the output of Analyse Transformer Blocks",
            ),
            outputs=_prune_outputs("Prune Transformer Blocks", "Connect it to a sampler, or to Save Distilled Model."),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, preset: str, plan: str = "") -> io.NodeOutput:
        teacher = bridge.Model(model)
        return _prune(cls, teacher, teacher.transformer, plan.strip() or preset)


def _analysis_inputs(settings: type, *names: str) -> list[io.Input]:
    """Inputs of the nodes that analyse. names: settings beside the saving that are not advanced."""
    others = {name: limits.words for name, limits in limits_of(settings).items() if name not in ("saving", *names)}
    return [
        io.Model.Input("model", tooltip="The model to prune. It is only read."),
        io.Latent.Input("latents", tooltip="Images of the kind the model makes: a KSampler's output, or VAE Encode."),
        io.Conditioning.Input("captions", tooltip="The caption of each image, encoded; or one caption for all."),
        setting_input("saving", settings, step=0.01),
        *(setting_input(name, settings) for name in names),
        *(
            seed_input(words, advanced=True) if name == "seed" else setting_input(name, settings, advanced=True)
            for name, words in others.items()
        ),
    ]


def _analysis_outputs(node: str, parts: str) -> list[io.Output]:
    return [
        io.String.Output(display_name="plan", tooltip=f"The plan as one line of text, for {node}."),
        io.Image.Output(display_name="chart", tooltip=f"The score of every {parts}, and which ones go."),
        io.String.Output(display_name="report", tooltip="What each criterion would choose, and how far the criteria agree."),
    ]


def _analysis(node: type[io.ComfyNode], plan: str, drawn: Image, report: str) -> io.NodeOutput:
    bridge.show_text(report.splitlines()[0], node.hidden.unique_id)
    chart = bridge.to_image(drawn)
    return io.NodeOutput(plan, chart, report, ui={**ui.PreviewImage(chart, cls=node).as_dict(), "text": [report]})


class AnalyseUNetBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillAnalyseUNetBlocks",
            display_name="Analyse UNet Blocks",
            category="distill",
            description="Skips each removable part of a UNet in turn, without training, and measures how much the predictions "
            "change. Then outputs the plan that saves as much as you ask for with the smallest summed error. Connect the plan to "
            "Prune UNet Blocks.",
            search_aliases=["importance", "sensitivity", "which blocks", "automatic plan", "LAPTOP-Diff", "analyze", "distill"],
            is_input_list=True,
            is_output_node=True,
            inputs=_analysis_inputs(Settings, "measure", "criterion"),
            outputs=_analysis_outputs("Prune UNet Blocks", "part"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latents, captions, **settings) -> io.NodeOutput:
        model, asked = bridge.Model(model[0]), Settings(**{name: values[0] for name, values in settings.items()})
        random = torch.Generator().manual_seed(asked.seed)
        images, contexts, label = bridge.calibration(latents, captions, model, asked.num_examples, random)
        denoiser = bridge.denoiser(model)
        batches = examples(denoiser, images, contexts, label=label, num_timesteps=asked.num_timesteps, generator=random)
        analysis = score(denoiser, batches, bridge.Progress(cls.hidden.unique_id, "parts scored").at, asked.prompt_weight)
        budget = round(asked.saving * analysis.total(asked.measure))
        planners = {name: Planner(analysis, name, asked.measure) for name in CRITERIA}
        on_plan = bridge.Progress(cls.hidden.unique_id, "plans measured").at
        decision = decide(denoiser, batches, planners[asked.criterion], budget, on_candidate=on_plan)
        plan, text = decision.plan, report(planners, asked.criterion, budget, decision)
        return _analysis(cls, write_plan(plan, denoiser.architecture), plots.score_chart(analysis, plan, asked.criterion), text)


class AnalyseTransformerBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillAnalyseTransformerBlocks",
            display_name="Analyse Transformer Blocks",
            category="distill",
            description="Measures, without training, how well each run of two or more blocks of a transformer could become one "
            "block, and outputs the plan that saves as much as you ask for at the smallest summed cost. Works on quantised models "
            "too. Connect the plan to Prune Transformer Blocks.",
            search_aliases=["importance", "sensitivity", "which blocks", "automatic plan", "PPCL", "flux", "z-image", "qwen", "wan",
                            "fold", "analyze", "distill"],
            is_input_list=True,
            is_output_node=True,
            inputs=_analysis_inputs(runs.Settings, "criterion"),
            outputs=_analysis_outputs("Prune Transformer Blocks", "run of blocks"),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, latents, captions, **settings) -> io.NodeOutput:
        model, asked = bridge.Model(model[0]), runs.Settings(**{name: values[0] for name, values in settings.items()})
        teacher, network = model.transformer, model.patcher.model.diffusion_model
        asking = bridge.examples_of(
            model, latents, captions, num_examples=asked.num_examples, num_levels=asked.num_timesteps, seed=asked.seed
        )
        analysis = runs.analyse(network, teacher, asking, asked, bridge.Progress(cls.hidden.unique_id, "parts measured").at)
        on_pass = bridge.Progress(cls.hidden.unique_id, "images with each plan measured").at
        decision = runs.decide(network, asking, analysis, on_pass)
        chart = plots.run_chart(analysis, decision.plan)
        return _analysis(cls, write_plan(decision.plan, teacher), chart, decision.report())


NODES = [PruneUNetBlocks, PruneTransformerBlocks, AnalyseUNetBlocks, AnalyseTransformerBlocks]
