import pytest
import torch

from distill_core.lora.remap import remap_lora
from distill_core.networks.build import build_unet
from distill_core.networks.stock import encoder_depths, opens_in_comfyui
from distill_core.pruning.plan import preset, preset_names
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.prune import mapping_between, prune

REFUSED = {
    "sd1, no attention in the encoder": ("sd1", "keep down 2:0", "leaves no attention in the down stages"),
    "sdxl, [0,0,2,2,3,3]": ("sdxl", "keep down 2,2,2:3", r"depths \[0, 0, 2, 2, 3, 3\].*\[0, 0, 2, 2, 4, 4\] \(SSD-1B\)"),
    "sdxl, [0,0,1,1,4,4]": ("sdxl", "keep down 2,2:1,2:4", r"depths \[0, 0, 1, 1, 4, 4\]"),
    "sdxl, no attention in a layer": ("sdxl", "keep down 2,2:0+2,2 mid none", r"depths \[0, 0, 0, 2, 10, 10\]"),
    "sdxl, one layer less, depth 4": ("sdxl", "keep down 1,1,1:4 up 2,2,2", r"depths \[0, 2, 4\]"),
}
BEYOND_PADDING = {
    "sdxl, one layer less, depth 10": ("sdxl", "keep down 1 up 2", r"depths \[0, 2, 10\]"),
    "sdxl, inner stage dropped": ("sdxl", "keep down 2,2,0 mid none up 0,3,3", "no working UNet|input channels"),
}


@pytest.mark.parametrize("name", preset_names())
def test_presets_and_their_teachers_open_in_comfyui(name, published):
    teacher = published[preset(name).teacher]
    assert opens_in_comfyui(teacher) and opens_in_comfyui(prune(teacher, preset(name)).student)


@pytest.mark.parametrize("case", REFUSED | BEYOND_PADDING)
def test_what_comfyui_would_refuse_is_refused_here(case, published):
    family, text, message = (REFUSED | BEYOND_PADDING)[case]
    with pytest.raises(ValueError, match=message) as caught:
        prune(published[family], read_plan(text, published[family]))
    assert ("--pad" in str(caught.value)) == (case in REFUSED)


@pytest.mark.parametrize("case", REFUSED)
def test_padding_makes_it_open(case, published):
    family, text, _ = REFUSED[case]
    teacher = published[family]
    pruning = prune(teacher, read_plan(text, teacher), pad=True)
    assert pruning.padding and opens_in_comfyui(pruning.student)
    assert pruning.plan.name.endswith(", padded")


def test_a_lora_of_a_padded_students_teacher_changes_no_identity_block(published):
    """It goes to the blocks that do something, numbered as in the student's file."""
    teacher = published["sdxl"]
    pruning = prune(teacher, read_plan("keep down 2,2,2:[7,8,9]", teacher), pad=True)
    weights = {name: torch.empty(shape, device="meta") for name, shape in teacher.shapes.items()}
    told = pruning.plan.metadata | {"distill.padding": " ".join(pruning.padding)}
    mapping = mapping_between(teacher, pruning.student, told)
    assert (
        "down.2.attn.0.block.0" in pruning.padding
        and mapping == pruning.mapping
        and mapping.apply(weights).keys() == pruning.student.shapes.keys()
    )
    layer = "unet.down_blocks.2.attentions.0.transformer_blocks.{}.attn1.to_out.0.lora_{}.weight"
    lora = {
        layer.format(block, way): torch.ones(1, 1280) if way == "A" else torch.ones(1280, 1) for block in (0, 7) for way in "AB"
    }
    remapped = remap_lora(lora, teacher, mapping, layout="diffusers")
    number = mapping.rename("down.2.attn.0.block.7").rpartition(".")[2]
    assert remapped.tensors.keys() == {layer.format(number, way) for way in "AB"} and remapped.num_dropped == 1


@pytest.mark.parametrize(
    "text", ["keep down 2,2,2:3 mid 2 up 3:2,3:1,3", "keep down 2,2:[1],2:[1,3] mid none", "keep down 2,2:0,2:0+2 up 3:1,3:0,3"]
)
def test_padding_changes_no_output(text, small_xl_teacher, xl_batch, monkeypatch):
    """Bit for bit; on an SDXL in small, for which the known depths are made small too."""
    import distill_core.networks.stock as stock

    teacher = small_xl_teacher.architecture
    for model in list(stock.SDXL_DEPTHS):
        monkeypatch.delitem(stock.SDXL_DEPTHS, model)
    monkeypatch.setitem(stock.SDXL_DEPTHS, "full", (0, 0, 2, 2, 4, 4))
    monkeypatch.setattr(type(teacher), "family", property(lambda self: "sdxl"))
    plan = read_plan(text, teacher)
    weights = {name: weight.detach() for name, weight in small_xl_teacher.named_parameters().items()}
    outputs = []
    for pad in (False, True):
        pruning = prune(teacher, plan, pad=pad, for_comfyui=False)
        network = build_unet(pruning.student).eval()
        from distill_core.diffusion.denoiser import DiffusersDenoiser

        denoiser = DiffusersDenoiser(network=network, architecture=pruning.student)
        denoiser.load_state_dict(pruning.weights(weights))
        with torch.no_grad():
            outputs.append(denoiser(*xl_batch))
    assert tuple(encoder_depths(pruning.student).values()) == (0, 0, 2, 2, 4, 4)
    assert torch.equal(*outputs)
    # Padding can still learn: its inner weights are the teacher's.
    assert all(pruning.weights(weights)[name].abs().sum() == 0 for name in pruning.identity)
    assert len(pruning.identity) < len([n for n in pruning.student.shapes if ".block." in n]) / 2


def test_padding_that_puts_everything_back_is_refused(published):
    with pytest.raises(ValueError, match="put back all that it removes"):
        prune(published["sdxl"], read_plan("keep down 2,2:0+2,2", published["sdxl"]), pad=True)


def test_a_padded_student_needs_no_padding_twice(published):
    teacher = published["sdxl"]
    padded = prune(teacher, read_plan("keep down 2,2,2:3", teacher), pad=True)
    again = prune(teacher, padded.plan, pad=True)
    assert again.padding == () and again.student.shapes == padded.student.shapes


def test_models_comfyui_never_opens_are_pruned_all_the_same(small_teacher):
    """The demo, say: nothing is lost that was there."""
    assert not opens_in_comfyui(small_teacher.architecture)
    prune(small_teacher.architecture, read_plan("keep down 2:0", small_teacher.architecture))
