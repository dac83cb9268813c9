"""Nodes that save students to disk and load them."""

import posixpath

import folder_paths
from comfy_api.latest import io, ui

from ..distill_core.base.storage import CODES
from ..distill_core.networks.files import FILE_LAYOUTS
from . import bridge

AS_IT_IS = "as it is"
STUDENT_FOLDER = "diffusion_models"  # where the stock Load Diffusion Model looks
DEFAULT_FOLDERS = {"ldm": "diffusion_models", "checkpoint": "checkpoints", "diffusers": "diffusers"}


class SaveDistilledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillSaveDistilledModel",
            display_name="Save Distilled Model",
            category="distill",
            description="Saves a student in ComfyUI's output folder. With the default name, the stock Load Diffusion Model node "
            "lists the file after a refresh (press R). It never overwrites a file.",
            search_aliases=["save student", "export model", "save unet", "save checkpoint", "distill"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The student to save, with any LoRA applied to it."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/student",
                    tooltip="Name under the output folder; a number is added. Keep diffusion_models/ in front for Load Diffusion "
                    "Model; another layout replaces it with its own folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[AS_IT_IS, *CODES],
                    default=AS_IT_IS,
                    tooltip="Precision of the weights: as the MODEL holds them, or another. fp16 is what most published UNets use, "
                    "bf16 what most transformers need; fp32 doubles the size. Quantised transformers are saved as they are.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(FILE_LAYOUTS),
                    default="ldm",
                    advanced=True,
                    tooltip=" ".join(f"{name}: {what}." for name, what in FILE_LAYOUTS.items()),
                ),
                io.Clip.Input("clip", optional=True, tooltip="The teacher's text encoder, for the checkpoint layout."),
                io.Vae.Input("vae", optional=True, tooltip="The teacher's VAE, for the checkpoint layout."),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A sample image to keep in the file; the model library shows it. Not for the diffusers layout.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Path of the saved student.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, filename_prefix: str, dtype: str, layout: str, clip=None, vae=None, thumbnail=None) -> io.NodeOutput:
        if layout == "checkpoint" and (clip is None or vae is None):
            raise ValueError("the checkpoint layout also needs CLIP and VAE: connect both, or choose the ldm layout")
        filename_prefix = filename_prefix.replace("\\", "/")  # a graph made on Windows
        if not filename_prefix.endswith("/"):
            filename_prefix = posixpath.normpath(filename_prefix)
        first, slash, rest = filename_prefix.partition("/")
        if slash and first in DEFAULT_FOLDERS.values():
            filename_prefix = f"{DEFAULT_FOLDERS[layout]}/{rest}"
        path = bridge.output_path(filename_prefix, "" if layout == "diffusers" else ".safetensors")
        precision = None if dtype == AS_IT_IS else dtype
        about = {} if layout == "diffusers" else bridge.about_graph(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        if thumbnail is not None and layout != "diffusers":
            about["modelspec.thumbnail"] = bridge.thumbnail(thumbnail)
        loading_note = bridge.save_model(
            bridge.Model(model), path, layout=layout, dtype=precision, clip=clip, vae=vae, about=about
        )
        note = "\n".join(filter(None, [f"Saved {path}", loading_note]))
        bridge.show_text(note, cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(note))


class LoadDistilledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillLoadDistilledModel",
            display_name="Load Distilled Model",
            category="distill",
            description="Loads a student with everything its file records: its prediction type, and its plan, so that you can "
            "continue training and use the teacher's LoRAs and ControlNets. Also opens students of the demo, which the stock "
            "node does not recognise.",
            search_aliases=["load student", "load pruned model", "load unet", "load diffusion model", "distill"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(STUDENT_FOLDER),
                    tooltip="A file under models/diffusion_models or output/diffusion_models. Press R after saving a new one.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="student", tooltip="An ordinary MODEL, the same as after Prune UNet Blocks or training."
                ),
                io.String.Output(display_name="summary", tooltip="Family, size, prediction type and plan."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str):
        return bridge.fingerprint_of(bridge.file_written, STUDENT_FOLDER, name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        student, facts = bridge.load_student(bridge.file_in(STUDENT_FOLDER, name))
        summary = (
            f"{facts['family']}, {facts['parameters'] / 1e6:,.2f} M parameters, predicts {facts['prediction']}, "
            f"plan: {facts['pruned_by'] or 'none in the file'}"
        )
        bridge.show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(student, summary)


NODES = [SaveDistilledModel, LoadDistilledModel]
