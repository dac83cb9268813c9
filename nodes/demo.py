"""The node that loads the bundled demo."""

from comfy_api.latest import io

from . import bridge


class LoadDemoTeacher(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillLoadDemoTeacher",
            display_name="Load Demo Teacher",
            category="distill",
            description="A small Stable-Diffusion-shaped model of handwritten digits, with its text encoder, VAE and training "
            "data. Use it to see a whole distillation in minutes, on any computer, with nothing to download. Prompts are words "
            'such as "the digit seven"; images are 64 by 64 pixels.',
            search_aliases=["demo", "digits", "example model", "distill demo", "mnist"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The teacher, 2.2 million parameters. Samples well at cfg 2."),
                io.Clip.Output(display_name="clip", tooltip='Its text encoder. Knows "the digit zero" to "the digit nine".'),
                io.Vae.Output(display_name="vae", tooltip="Decodes its latents into images of 64 by 64 pixels."),
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="The 1,797 digits it was trained on."),
                io.Conditioning.Output(
                    display_name="captions", is_output_list=True, tooltip="The caption of each digit, encoded."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(bridge.demo_teacher(), bridge.demo_clip(), bridge.DigitsVAE(), *bridge.demo_data())


NODES = [LoadDemoTeacher]
