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
            description="A small Stable-Diffusion-shaped model of emoji scenes, with its text encoder, VAE and training data. Use it "
            "to see a whole distillation in minutes, on any computer, with nothing to download. Prompts name one or two objects, "
            'their number, color and place, and a style: "two red apples left of a cat, flat". Images are 64 by 64 pixels.',
            search_aliases=["demo", "scenes", "emoji", "example model", "distill demo"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The teacher, 3.2 million parameters. Samples well at cfg 3."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Its text encoder, one token a word. Knows 64 objects such as cat, bus and guitar, six colors, numbers "
                    "up to three, left of, right of, above, below, flat and shaded.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Decodes its latents into images of 64 by 64 pixels."),
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="4,096 of the scenes it was trained on."),
                io.Conditioning.Output(
                    display_name="captions", is_output_list=True, tooltip="The caption of each scene, encoded."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(bridge.demo_teacher(), bridge.demo_clip(), bridge.DemoVAE(), *bridge.demo_data())


NODES = [LoadDemoTeacher]
