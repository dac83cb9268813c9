"""Writing students to disk."""

from comfy_api.latest import io, ui

from ..distill_core.files import save_unet
from ..distill_core.layouts import LAYOUTS
from ..distill_core.storage import DTYPES
from . import bridge


class SaveDistilledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillSaveDistilledModel",
            display_name="Save Distilled Model",
            category="distill",
            description="Writes a student to ComfyUI's output folder. With the default name, the stock Load Diffusion Model node "
            "lists the file after a refresh (press R). No file is ever overwritten.",
            search_aliases=["save student", "export model", "save unet", "distill"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The student to save, with whatever LoRA is applied to it."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/student",
                    tooltip="Name under the output folder; a number is added. Keep diffusion_models/ in front for Load Diffusion Model.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="Precision of the weights. fp16 is half the size of fp32 and what published checkpoints use.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="ldm",
                    advanced=True,
                    tooltip="ldm: one .safetensors file for ComfyUI and most other programs. diffusers: a folder for "
                    "UNet2DConditionModel.from_pretrained.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the student was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, filename_prefix: str, dtype: str, layout: str) -> io.NodeOutput:
        path = bridge.output_path(filename_prefix, ".safetensors" if layout == "ldm" else "")
        save_unet(
            path,
            bridge.state_dict_of(model),
            bridge.architecture_of(model),
            form=layout,
            dtype=dtype,
            prediction=bridge.prediction_of(model),
            plan=bridge.plan_of(model),
        )
        note = f"Saved {path}"
        if (prediction := bridge.prediction_of(model)) != "eps":
            note += f"\nIt predicts {prediction}: after Load Diffusion Model add ModelSamplingDiscrete with that setting."
        bridge.show_text(note, cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(note))


NODES = [SaveDistilledModel]
