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
            description="A small model of emoji scenes, shaped like Stable Diffusion or like Flux, with its text encoder, VAE and "
            "training data. Use it to see a whole distillation in minutes, on any computer, with nothing to download. Prompts name one or two objects, "
            'their number, color and place, and a style: "two red apples left of a cat, flat". Images are 64 by 64 pixels.',
            search_aliases=["demo", "scenes", "emoji", "example model", "distill demo"],
            inputs=[
                io.Combo.Input(
                    "network",
                    options=["unet", "transformer"],
                    default="unet",
                    optional=True,
                    tooltip="unet: shaped like Stable Diffusion 1.x. transformer: shaped like Flux.1 schnell, 4 double and 8 single "
                    "blocks, to try what transformers are for. Its latents have 16 channels: start from EmptySD3LatentImage.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The teacher: the UNet has 3.2 million parameters, the transformer 4.5. Samples well at cfg 3.",
                ),
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
    def execute(cls, network: str = "unet") -> io.NodeOutput:
        transformer = network == "transformer"
        model = bridge.demo_transformer() if transformer else bridge.demo_teacher()
        return io.NodeOutput(model, bridge.demo_clip(), bridge.DemoVAE(transformer), *bridge.demo_data(transformer))


NODES = [LoadDemoTeacher]
