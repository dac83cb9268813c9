"""Removing blocks."""

from comfy_api.latest import io

from ..distill_core.plan import preset, preset_names
from . import bridge


class PruneUNetBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillPruneUNetBlocks",
            display_name="Prune UNet Blocks",
            category="distill",
            description="Removes blocks from a UNet and keeps the weights of the rest. The result is an ordinary MODEL, smaller "
            "and faster; its pictures are poor until it has been distilled. The MODEL that goes in stays as it is.",
            search_aliases=["remove blocks", "prune", "block removal", "BK-SDM", "small model", "distill", "compress"],
            inputs=[
                io.Model.Input("model", tooltip="The full model: the teacher. SD1.x and its fine-tunes, or the demo teacher."),
                io.Combo.Input(
                    "preset",
                    options=preset_names(),
                    default="bk-sdm-base",
                    tooltip="Which blocks go. " + " ".join(f"{name}: {preset(name).title}." for name in preset_names()),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The pruned model. Connect it to Distill Train Step."),
                io.String.Output(display_name="summary", tooltip="What was removed, in one line."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset: str) -> io.NodeOutput:
        student = bridge.prune_model(model, _plan(preset))
        before, after = (bridge.architecture_of(m).num_parameters for m in (model, student))
        summary = f"{before / 1e6:,.2f} M parameters before, {after / 1e6:,.2f} M now: {1 - after / before:.0%} fewer"
        bridge.show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(student, summary)


_plan = preset  # the name of the input hides the function inside execute

NODES = [PruneUNetBlocks]
