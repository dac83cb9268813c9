"""The node that measures this machine."""

import json
import time

from comfy_api.latest import io, ui

from ..distill_core.base.disk import check_writable
from ..distill_core.base.image_grid import save_png
from ..distill_core.base.storage import write_text
from ..distill_core.evaluation import bench
from ..distill_core.pruning.plan import preset_names
from . import bridge
from .inputs import setting_input

ALL, PUBLISHED, AUTOMATIC = "all", 0, "automatic"


class BenchmarkPresets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillBenchmarkPresets",
            display_name="Benchmark Presets",
            category="distill",
            description="Measures on your own machine what pruning gains before you train anything: time, memory and training speed "
            "of a model family and its presets. It builds them with random weights, which cost as much as real ones; nothing is "
            "loaded or downloaded. Unloads the models that ComfyUI holds in memory.",
            search_aliases=["benchmark", "bench", "speed test", "my gpu", "how fast", "vram", "it/s", "distill"],
            is_output_node=True,
            inputs=[
                setting_input("family", bench.Settings),
                io.Combo.Input("preset", options=[ALL, *preset_names()], default=preset_names("sd1")[0],
                               tooltip="Preset to measure beside the full model; it must belong to the family. all: each in turn."),
                io.Int.Input("size_px", default=PUBLISHED, min=0, max=8192, step=64,
                             tooltip="Side of the images in pixels. 0: 512 for sd1 and sd2, 1024 for sdxl. A CPU takes minutes at these."),
                setting_input("batch_size", bench.Settings),
                setting_input("num_rounds", bench.Settings),
                setting_input("train", bench.Settings, more="Left out where the forecast exceeds the free memory."),
                io.Combo.Input("dtype", options=[AUTOMATIC, "fp16", "bf16", "fp32"], default=AUTOMATIC, advanced=True,
                               tooltip="Precision. automatic: fp16 on a GPU, fp32 on a CPU."),
                io.String.Input("filename_prefix", default="distill/bench",
                                tooltip="Name under the output folder of the chart and of the figures as JSON; a number is added. "
                                "It never overwrites a file."),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="All figures as a table and a chart."),
                io.String.Output(display_name="figures", tooltip="The same as JSON, with the name of your card."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Each run measures anew."""
        return time.time()

    @classmethod
    def execute(
        cls,
        family: str,
        preset: str,
        size_px: int,
        batch_size: int,
        num_rounds: int,
        train: bool,
        dtype: str,
        filename_prefix: str,
    ) -> io.NodeOutput:
        settings = bench.Settings(
            family=family,
            presets=() if preset == ALL else (preset,),
            size_px=size_px or None,
            batch_size=batch_size,
            num_rounds=num_rounds,
            train=train,
            dtype=None if dtype == AUTOMATIC else dtype,
        )
        path = bridge.output_path(filename_prefix, ".png")
        check_writable(path)
        measured = bridge.run_bench(settings, cls.hidden.unique_id)
        figures = json.dumps(measured.facts(), indent=2)
        drawn = bench.summary_image(measured)
        save_png(path, drawn)
        write_text(path.with_suffix(".json"), figures)
        bridge.show_text(f"Saved {path}", cls.hidden.unique_id)
        image = bridge.to_image(drawn)
        return io.NodeOutput(image, figures, ui=ui.PreviewImage(image, cls=cls))


NODES = [BenchmarkPresets]
