"""Distill, a ComfyUI node pack: make a diffusion checkpoint smaller and faster on your own machine."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .distill_core.base.packages import REQUIRED, check_installed

    check_installed(REQUIRED, "Distill")  # one line in the log in place of the first import that fails
    from .nodes import DistillExtension

    return DistillExtension()
