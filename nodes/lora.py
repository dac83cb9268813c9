"""A node that applies a teacher's LoRA to its student."""

import folder_paths
from comfy_api.latest import io

from ..distill_core.base.storage import read_header
from ..distill_core.lora.remap import remap_lora
from . import bridge


class RemapLoRAToStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillRemapLoRAToStudent",
            display_name="Remap LoRA to Student",
            category="distill",
            description="Applies a LoRA made for the teacher to a pruned student. The student's blocks have new numbers, so the "
            "stock loader would put the LoRA on the wrong blocks without a warning. Layers of removed blocks are left out and "
            "counted.",
            search_aliases=["lora", "load lora", "lora for pruned model", "convert lora", "lycoris", "distill"],
            inputs=[
                io.Model.Input(
                    "teacher",
                    tooltip="The full model the LoRA was made for: the input of Prune UNet Blocks or Prune Transformer Blocks.",
                ),
                io.Model.Input(
                    "student",
                    tooltip="The student: from Prune UNet Blocks, Prune Transformer Blocks, Distill Train Step or Load Distilled "
                    "Model.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="LoRA, LoHa, LoKr, DoRA or OFT under models/loras, with the layer names of kohya, diffusers, peft or "
                    "ComfyUI.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the student. 0 changes nothing; below 0 reverses the effect.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Connect it if the LoRA also changes the text encoder."),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How strongly the LoRA changes the text encoder, if one is connected.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The student with the LoRA."),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder with its part of the LoRA; unchanged if the LoRA has none."
                ),
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The remapped LoRA, for Save LoRA Weights."),
                io.String.Output(display_name="summary", tooltip="How many layers fit, and how many were left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_):
        return bridge.fingerprint_of(bridge.file_written, "loras", lora_name)

    @classmethod
    def execute(
        cls, teacher, student, lora_name: str, strength_model: float, strength_clip: float = 1.0, clip=None
    ) -> io.NodeOutput:
        source = bridge.Model(teacher)
        mapping = bridge.Model(student).mapping_from(source)
        stored, metadata = read_header(bridge.file_in("loras", lora_name))
        # a UNet's in names that ComfyUI always reads
        remapped = remap_lora(stored, source.network, mapping, metadata=metadata, layout="ldm")
        lora = remapped.read()
        summary = remapped.describe()
        bridge.show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(*bridge.with_lora(student, clip, lora, strength_model, strength_clip), lora, summary)


NODES = [RemapLoRAToStudent]
