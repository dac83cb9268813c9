"""Distill, a ComfyUI node pack: make a diffusion checkpoint smaller and faster on your own machine."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import DistillExtension

    return DistillExtension()
