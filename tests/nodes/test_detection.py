"""What stock ComfyUI takes our files for: never for something they are not."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from distill_core.networks.files import save_unet
from distill_core.networks.layouts import LAYOUTS
from distill_core.networks.stock import opens_in_comfyui
from distill_core.pruning.plan import name_map, preset, preset_names, pruned
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.prune import prune

from ..students import plans

NUM_RANDOM = 120  # of each family

# The rows of students that ComfyUI reads wrongly, or not at all, from the diffusers layout.
DANGEROUS = {
    "sd1, no mid block": ("sd1", "keep mid none"),
    "sd1, mid block of one resnet": ("sd1", "keep mid resnet"),
    "sd1, no attention in the decoder": ("sd1", "keep up 3:0"),
    "sd2, tiny": ("sd2", "bk-sdm-v2-tiny"),
    "sdxl, ssd-1b with a smaller decoder and no mid block": ("sdxl", "keep down 2,2,2:4 mid none up 3:4,3:1,3"),
    "sdxl, decoder pruned, no mid block": ("sdxl", "keep mid none up 3:4,3:1,3"),
}
SILENTLY_WRONG = DANGEROUS.keys() - {"sd2, tiny"}


@pytest.fixture(scope="module")
def detected(in_comfyui, tmp_path_factory, published):
    """Everything this module asks, answered by one process of ComfyUI."""
    folder, students = tmp_path_factory.mktemp("detection"), {}
    for name in preset_names():
        students[name] = prune(published[preset(name).teacher], preset(name)).student
    for name, (family, text) in DANGEROUS.items():
        students[name] = prune(published[family], read_plan(text, published[family])).student
    for family, (stages, depths, mid) in {
        "sd1": (4, [1, 1, 1, 0], 1),
        "sd2": (4, [1, 1, 1, 0], 1),
        "sdxl": (3, [0, 2, 10], 10),
    }.items():
        students |= {f"{family}: {text}": student for text, student in _random(published[family], plans(stages, depths, mid))}
    questions = {
        (name, way): LAYOUTS[way].from_canonical(student.shapes) for name, student in students.items() for way in LAYOUTS
    }
    shapes = [{names[n]: students[name].shapes[n] for n in names} for (name, _), names in questions.items()]
    (folder / "shapes.json").write_text(json.dumps(shapes))
    in_comfyui("detect", folder / "shapes.json", folder / "found.json")
    return students, dict(zip(questions, json.loads((folder / "found.json").read_text()), strict=True))


def _random(teacher, strategy):
    found = {}

    @settings(max_examples=NUM_RANDOM, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text=strategy)
    def collect(text):
        try:
            found[text] = pruned(teacher, name_map(teacher, read_plan(text, teacher)))
        except ValueError:
            pass

    collect()
    return found.items()


CLASSES = {"sd1": {"SD15"}, "sd2": {"SD20"}, "sdxl": {"SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B"}}


def test_in_the_ldm_layout_every_network_is_read_right_or_refused_and_we_know_which(detected):
    students, found = detected
    opened = 0
    for name, student in students.items():
        kind, missing, unused = found[name, "ldm"]
        assert (missing, unused) == (0, 0), name
        assert (kind in CLASSES[student.family]) == opens_in_comfyui(student), (name, kind)
        opened += kind is not None
    assert len(students) > 250 and 150 < opened < len(students)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_recognised(name, detected):
    students, found = detected
    assert found[name, "ldm"][0] in CLASSES[preset(name).teacher]


@pytest.mark.parametrize("name", DANGEROUS)
def test_what_would_load_wrong_from_the_diffusers_layout_is_never_put_where_comfyui_looks(name, detected, tmp_path):
    students, found = detected
    kind, missing, _ = found[name, "diffusers"]
    assert kind is not None and missing > 0  # the danger is real: ComfyUI takes it for another model, or leaves weights empty
    assert found[name, "ldm"][1:] == [0, 0]  # and the layout we write there is read right
    student = students[name]
    weights = {n: torch.zeros(1).expand(shape) for n, shape in student.shapes.items()}
    for place in (
        "models/diffusion_models/student",
        "output/diffusion_models/student",
        "models/checkpoints/student",
        "models/unet/student",
    ):
        with pytest.raises(ValueError, match="misreads students in the diffusers layout"):
            save_unet(tmp_path / place, weights, student, layout="diffusers")
    assert list(tmp_path.iterdir()) == []
