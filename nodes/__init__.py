"""The nodes, one topic per file."""

from comfy_api.latest import ComfyExtension, io

from . import bench, bridge, compare, demo, experts, lora, prune, recipe, router, save, shared_base, teacher_data, train


class DistillExtension(ComfyExtension):
    async def on_load(self) -> None:
        bridge.serve_runs()
        bridge.serve_presets()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        topics = (demo, prune, teacher_data, recipe, train, save, lora, shared_base, router, experts, compare, bench)
        return [node for topic in topics for node in topic.NODES]
