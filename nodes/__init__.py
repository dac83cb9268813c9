"""The nodes, one topic a file."""

from comfy_api.latest import ComfyExtension, io

from . import demo, lora, prune, recipe, router, save, shared_base, students, teacher_data, train


class DistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        topics = (demo, prune, teacher_data, recipe, train, save, lora, shared_base, router, students)
        return [node for topic in topics for node in topic.NODES]
