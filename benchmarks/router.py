"""What routing costs while sampling, in ComfyUI at the width of SD1.5: ``python benchmarks/router.py``.

Random weights, stock KSampler. Each round samples with the big model alone, with the big model behind the router, with the
small model alone, and with half of each, in turn. The router's own time is also measured inside the samplings: what its
wrappers take less what they wrap. Needs a ComfyUI and its requirements (see README.md). Times are of the processor on a CPU,
of the clock on a GPU. Writes ``results/router.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from report import device_words, publish, table

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "nodes")]
SETTINGS = {"seed": 0, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
SMALL = "bk-sdm-small"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="an even number")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    arguments = parser.parse_args()
    if arguments.steps % 2:
        parser.error("--steps must be even, so that each model does half")
    bench = Bench(arguments.size, arguments.steps)
    times, own = bench.measure(arguments.rounds)
    publish("router", [
        "# Cost of routing",
        "",
        f"SD1.5 and its {SMALL}, random weights, {arguments.size} px, guided, {arguments.steps} steps, ComfyUI's KSampler, "
        f"{arguments.rounds} rounds in turn. {device_words()}, torch {torch.__version__}.",
        "",
        *_figures(times, own),
    ])  # fmt: skip


class Bench:
    """Models of random weights in ComfyUI, and ways to sample with them."""

    def __init__(self, size: int, steps: int):
        from in_comfyui import pack, start

        from tests.comfyui import find

        start(str(find() or sys.exit("no ComfyUI found: set COMFYUI_PATH")), cpu=not torch.cuda.is_available())
        import nodes

        bridge = pack()
        from pack.distill_core.diffusion.ranges import Boundary
        from pack.distill_core.evaluation.catalog import published_teacher
        from pack.distill_core.pruning.plan import preset
        from pack.nodes.bridge.build import build_model

        architecture, random = published_teacher("sd1"), torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in architecture.shapes.items()}
        big = build_model(weights, architecture, None, dtype=torch.float32 if not torch.cuda.is_available() else torch.float16)
        small = bridge.prune_model(bridge.Model(big), preset(SMALL))
        self.models = {
            "big": big,
            "big, routed": self._timed(big, lambda model: bridge.route_models([model, small], [Boundary(100, "percent")])),
            "small": small,
            "half of each": self._timed(big, lambda model: bridge.route_models([model, small], [Boundary(50, "percent")])),
        }
        self.ksampler, self.steps = nodes.common_ksampler, steps
        self.latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}
        self.positive, self.negative = ([[torch.randn(1, 77, 768, generator=random), {}]] for _ in range(2))
        self.seconds = defaultdict(float)

    def _timed(self, model, route: Callable):
        """A routed MODEL that notes the time in the router's wrappers, and in what they wrap."""
        from comfy.patcher_extension import WrappersMP

        model, kinds = model.clone(), (WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH)

        def timed(sign: int):
            def wrapper(executor, *args, **kwargs):
                started = _now()
                try:
                    return executor(*args, **kwargs)
                finally:
                    self.seconds["router"] += sign * (_now() - started)

            return wrapper

        for kind in kinds:
            model.add_wrapper_with_key(kind, "around the router", timed(1))
        routed = route(model)
        for kind in kinds:
            routed.add_wrapper_with_key(kind, "within the router", timed(-1))
        return routed

    def sample(self, model) -> float:
        """Seconds of one sampling."""
        started = _now()
        with torch.inference_mode():
            self.ksampler(model, steps=self.steps, positive=self.positive, negative=self.negative, latent=self.latent, **SETTINGS)
        return _now() - started

    def measure(self, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds of each kind of sampling, round by round; and the router's own share of the time, in each routed one."""
        for model in self.models.values():  # loads what is loaded once
            self.sample(model)
        times, own = {name: [] for name in self.models}, []
        for turn in range(rounds):
            for name in list(self.models)[:: 1 if turn % 2 else -1]:
                self.seconds.clear()
                times[name].append(self.sample(self.models[name]))
                if self.seconds:
                    own.append(self.seconds["router"] / times[name][-1])
        return times, own


def _figures(times: dict[str, list[float]], own: list[float]) -> list[str]:
    big = statistics.median(times["big"])
    mixed = [m / ((b + s) / 2) for m, b, s in zip(times["half of each"], times["big"], times["small"], strict=True)]
    routed = [r / b for r, b in zip(times["big, routed"], times["big"], strict=True)]
    rows = [[name, f"{statistics.median(t):.2f}", f"{statistics.median(t) / big:.3f}"] for name, t in times.items()]
    return [
        *table(["sampling with", "seconds, median", "of big"], rows),
        "",
        *table(
            ["claim", "measured"],
            [
                ["router's own time, of the sampling, largest of all", f"{max(own):.3%}"],
                ["big, routed, against big alone: median of the rounds (lowest to highest)", _ratio(routed)],
                ["half of each, against the mean of both alone: median of the rounds (lowest to highest)", _ratio(mixed)],
            ],
        ),
    ]


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
