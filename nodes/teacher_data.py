"""A node that makes training data without images: the teacher samples it."""

from comfy_api.latest import io

from ..distill_core.base.documents import lines
from ..distill_core.data.teacher_data import GenerationSettings
from . import bridge
from .inputs import seed_input, size_inputs


class TeacherDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTeacherDataset",
            display_name="Teacher Dataset",
            category="distill",
            description="Training data without images: the teacher makes an image for each prompt, for Distill Train Step. Every "
            "image is kept under output/distill_data: after a cancel, or with more prompts, the node makes only the missing "
            "ones.",
            search_aliases=[
                "synthetic data",
                "training data",
                "make dataset",
                "data-free distillation",
                "trajectories",
                "distill",
            ],
            is_input_list=True,
            inputs=[
                io.Model.Input("teacher", tooltip="The model to distil. It is only read."),
                io.Clip.Input("clip", tooltip="The teacher's own text encoder."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What the images should show, one prompt per line. Use prompts of the kind the student will be used "
                    "with; more are better. You can also connect a list of texts.",
                ),
                io.String.Input(
                    "name",
                    default="teacher_data",
                    tooltip="Folder under output/distill_data for the images. Images of different settings can share a folder.",
                ),
                *size_inputs(),
                io.Int.Input(
                    "images_per_prompt", default=1, min=1, max=10_000, tooltip="Images per prompt, each from different noise."
                ),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Sampling steps for each image (DDIM)."),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="cfg the teacher samples with: 7.5 for Stable Diffusion, 3 for the demo. 1 = no guidance, twice as "
                    "fast.",
                ),
                seed_input("Decides the noise. The same seed gives the same images."),
                io.Int.Input(
                    "trajectory_states",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Noisy states kept from the sampling of each image, at most as many as steps. The student then "
                    "learns from them instead of added noise; each takes as much memory as the image. 0 turns them off.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="Images made at once. Lower it if memory runs out. A cancel or a crash loses at most one batch.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents", is_output_list=True, tooltip="The images, for Distill Train Step or VAE Decode."
                ),
                io.Conditioning.Output(
                    display_name="captions", is_output_list=True, tooltip="The prompt of each image, encoded."
                ),
                io.Conditioning.Output(
                    display_name="null_caption", tooltip="The empty prompt, encoded, for null_caption of Distill Train Step."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, teacher, clip, prompts, name, width, height, images_per_prompt, steps, guidance, seed,
                trajectory_states, batch_size) -> io.NodeOutput:  # fmt: skip
        prompts = [line for text in prompts for line in lines(text)]
        if not any(map(str.strip, prompts)):
            raise ValueError("there are no prompts; write what the images should show, one prompt per line")
        generation = GenerationSettings(
            size=(height[0], width[0]),
            guidance=guidance[0],
            num_steps=steps[0],
            num_per_prompt=images_per_prompt[0],
            num_states=trajectory_states[0],
            seed=seed[0],
        )
        node_id = cls.hidden.unique_id
        try:
            made = bridge.make_data(
                bridge.Model(teacher[0]),
                clip[0],
                prompts,
                generation,
                bridge.data_folder(name[0]),
                batch_size[0],
                on_caption=bridge.Progress(node_id, "prompts encoded").at,
                on_step=bridge.Progress(node_id, "images", each=generation.num_steps).at,
            )
        finally:
            bridge.release_memory()
        return io.NodeOutput(*made)


NODES = [TeacherDataset]
