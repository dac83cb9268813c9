"""The nodes, one topic a file."""

from comfy_api.latest import ComfyExtension, io

from . import demo, lora, prune, recipe, save, teacher_data, train


class DistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*demo.NODES, *prune.NODES, *teacher_data.NODES, *recipe.NODES, *train.NODES, *save.NODES, *lora.NODES]
