"""A teacher's LoRA on its student."""

import folder_paths
from comfy_api.latest import io

from ..distill_core.lora import remap_lora
from ..distill_core.storage import read_header
from . import bridge


class RemapLoRAToStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillRemapLoRAToStudent",
            display_name="Remap LoRA to Student",
            category="distill",
            description="Applies a LoRA that was made for the teacher to a pruned student. The stock loader would put it on the "
            "wrong blocks without a word: the student's are numbered anew. What belongs to removed blocks is left out and counted.",
            search_aliases=["lora", "load lora", "lora for pruned model", "convert lora", "lycoris", "distill"],
            inputs=[
                io.Model.Input("teacher", tooltip="The full model the LoRA was made for, as it went into Prune UNet Blocks."),
                io.Model.Input(
                    "student", tooltip="The student: out of Prune UNet Blocks, Distill Train Step or Load Distilled Model."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="LoRA, LoHa, LoKr or DoRA under models/loras, in kohya's, diffusers' or ComfyUI's names.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the student is changed. 0 leaves it as it is, below 0 turns the effect round.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Connect it if the LoRA changes the text encoder too."),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How strongly the text encoder is changed, where one is connected.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The student with the LoRA."),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder with its part of the LoRA; as it came if it has none."
                ),
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The remapped LoRA, for Save LoRA Weights."),
                io.String.Output(display_name="summary", tooltip="How many layers fit, and how many were left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_):
        return bridge.file_in("loras", lora_name).stat().st_mtime_ns

    @classmethod
    def execute(
        cls, teacher, student, lora_name: str, strength_model: float, strength_clip: float = 1.0, clip=None
    ) -> io.NodeOutput:
        mapping = bridge.mapping_between(student, teacher)
        stored, metadata = read_header(bridge.file_in("loras", lora_name))
        remapped = remap_lora(
            stored, bridge.architecture_of(teacher), mapping, metadata=metadata, spelling="ldm"
        )  # a layout ComfyUI always reads
        lora = remapped.read()
        summary = remapped.describe()
        bridge.show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(*bridge.with_lora(student, clip, lora, strength_model, strength_clip), lora, summary)


NODES = [RemapLoRAToStudent]
