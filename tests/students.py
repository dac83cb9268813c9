"""Students of a teacher, pruned in memory, and what the published ones hold."""

from __future__ import annotations

from hypothesis import strategies as st

from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.networks.build import build_unet
from distill_core.pruning.plan import PruningPlan, name_map, pruned

PUBLISHED = {
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "bk-sdm-v2-base": 583_480_964,
    "bk-sdm-v2-small": 485_787_524,
    "bk-sdm-v2-tiny": 326_825_604,
    "segmind-small-sd": 579_384_964,
    "segmind-tiny-sd": 323_384_964,
    "ssd-1b": 1_331_334_404,
    "segmind-vega": 745_225_604,
    "koala-700m": 782_822_724,
    "koala-1b": 1_161_184_324,
}


def student_of(teacher: DiffusersDenoiser, plan: PruningPlan) -> DiffusersDenoiser:
    mapping = name_map(teacher.architecture, plan)
    architecture = pruned(teacher.architecture, mapping)
    student = DiffusersDenoiser(network=build_unet(architecture).eval(), architecture=architecture)
    student.load_state_dict({n: w.detach() for n, w in mapping.apply(teacher.named_parameters()).items()})
    return student


@st.composite
def plans(draw, stages, depths, mid_depth):
    """The text of a plan that can exist: per stage one layer less or none, attentions thinned out or gone."""
    down, up = [], [""] * stages
    inner_goes = draw(st.integers(0, 5)) == 0 and depths[-1] == 0
    for stage in range(stages):
        if inner_goes and stage == stages - 1:
            down.append("0")
            up[0] = "0"
            continue
        thin = draw(st.booleans())
        layers = {
            "down": draw(st.sampled_from(["1", "[0]"])) if thin else "2",
            "up": draw(st.sampled_from(["2", "[0,2]", "[1,2]"])) if thin else "3",
        }
        for side, count in (("down", 1 if thin else 2), ("up", 2 if thin else 3)):
            if depths[stage] and draw(st.booleans()):
                numbers = [draw(_stack(depths[stage])) for _ in range(count)]
                layers[side] += ":" + "+".join(numbers)
        down.append(layers["down"])
        up[stages - 1 - stage] = layers["up"]
    mid = draw(st.sampled_from(["full", "none", "resnet", *(_texts(mid_depth) if mid_depth > 1 else [])]))
    return f"keep down {','.join(down)} mid {mid} up {','.join(up)}"


def _texts(depth):
    return [str(n) for n in range(1, depth)] + [f"[{','.join(map(str, range(n, depth)))}]" for n in range(depth)]


def _stack(depth):
    return st.sampled_from(["0", str(depth), *_texts(depth)])
