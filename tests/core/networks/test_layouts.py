import pytest

from distill_core.networks.architecture import Architecture
from distill_core.networks.layouts import LAYOUTS, UnknownParameter, _ldm_modules, find_unet
from distill_core.pruning.plan import PruningPlan, name_map, preset, preset_names, pruned


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", *preset_names()])
def test_names_survive_a_round_trip(layout, name, published):
    teacher = published[name if name in published else preset(name).teacher]
    shapes = teacher.shapes if name in published else pruned(teacher, name_map(teacher, preset(name))).shapes
    table = LAYOUTS[layout].from_canonical(shapes)
    assert len(set(table.values())) == len(shapes)
    back = LAYOUTS[layout].to_canonical(table.values())
    assert {back[theirs] for theirs in table.values()} == set(shapes)
    assert all(back[table[canonical]] == canonical for canonical in shapes)


def test_ldm_names_of_many_stages_take_no_longer_for_each():
    """A damaged header may declare thousands; each stage must not look through all modules again."""
    calls = []

    class Counted(str):
        def startswith(self, *args):
            calls.append(self)
            return super().startswith(*args)

        def partition(self, *args):
            calls.append(self)
            return super().partition(*args)

    for count in (100, 400):
        calls.clear()
        table = _ldm_modules([Counted(f"down.{n}.resnet.0") for n in range(count)])
        assert table[f"down.{count - 1}.resnet.0"] == f"input_blocks.{count}.0" and len(calls) <= 4 * count


def test_ldm_names_of_sd15_are_those_of_the_published_checkpoint(sd15):
    names = LAYOUTS["ldm"].from_canonical(sd15.shapes)
    # Written down from CompVis' own checkpoint.
    for canonical, theirs in {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embed.1.bias": "time_embed.2.bias",
        "down.0.resnet.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down.0.attn.1.block.0.attn2.to_k.weight": "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "down.0.downsample.conv.weight": "input_blocks.3.0.op.weight",
        "down.1.resnet.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down.3.resnet.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
        "mid.attn.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid.resnet.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up.0.upsample.conv.weight": "output_blocks.2.1.conv.weight",
        "up.1.upsample.conv.weight": "output_blocks.5.2.conv.weight",
        "up.3.attn.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
        "norm_out.weight": "out.0.weight",
        "conv_out.weight": "out.2.weight",
    }.items():
        assert names[canonical] == theirs


@pytest.mark.parametrize("name,blocks_in,blocks_out", [("bk-sdm-base", 8, 8), ("bk-sdm-small", 8, 8), ("bk-sdm-tiny", 6, 6)])
def test_student_blocks_are_numbered_without_gaps(name, blocks_in, blocks_out, sd15):
    student = pruned(sd15, name_map(sd15, preset(name)))
    names = LAYOUTS["ldm"].from_canonical(student.shapes).values()
    inputs = {int(n.split(".")[1]) for n in names if n.startswith("input_blocks.")}
    outputs = {int(n.split(".")[1]) for n in names if n.startswith("output_blocks.")}
    num_downsamplings = len(student.stages("down")) - 1
    assert inputs == set(range(1 + blocks_in // 2 + num_downsamplings))
    assert outputs == set(range(blocks_out))


def test_an_upsampling_behind_a_resnet_without_attention_keeps_its_place(sd15):
    plan = PruningPlan(name="no attention in up.1", remove=("up.1.attn.*",))
    student = pruned(sd15, name_map(sd15, plan))
    names = LAYOUTS["ldm"].from_canonical(student.shapes)
    assert names["up.1.upsample.conv.weight"] == "output_blocks.5.1.conv.weight"
    assert Architecture.from_state_dict({names[n]: shape for n, shape in student.shapes.items()}).shapes == student.shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_prefix_are_found(layout, prefix, sd15):
    names = [prefix + n for n in LAYOUTS[layout].from_canonical(sd15.shapes).values()]
    assert find_unet([*names, "first_stage_model.encoder.conv_in.weight"]) == (layout, prefix)


def test_a_model_without_unet_is_refused():
    with pytest.raises(ValueError, match="no Stable Diffusion UNet"):
        find_unet(["double_blocks.0.img_attn.qkv.weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_parameter_is_named(layout):
    with pytest.raises(UnknownParameter, match="lora_up"):
        LAYOUTS[layout].to_canonical(["lora_up.weight"])
