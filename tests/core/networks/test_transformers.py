"""Transformers: recognised by their names, cut by plans, written so that ComfyUI counts the right number of blocks."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_core.cli import main
from distill_core.networks.files import open_unet
from distill_core.networks.network import open_network
from distill_core.networks.transformers.architecture import FAMILIES, Transformer, ranges
from distill_core.networks.transformers.files import open_transformer, rewritten
from distill_core.pruning.folding import middle, runs
from distill_core.pruning.plan import PruningPlan, all_preset_names, folded, name_map, plan_in, preset, preset_names, pruned
from distill_core.pruning.plan_text import read_plan, write_plan
from distill_core.pruning.prune import prune_file

INNER = {
    "double_blocks": ("img_attn.qkv.weight", "img_attn.norm.key_norm.scale", "txt_mlp.0.bias"),
    "single_blocks": ("linear1.weight", "linear2.bias"),
    "transformer_blocks": ("attn.q.weight", "norm.bias"),
    "joint_blocks": ("context_block.attn.qkv.weight", "x_block.mlp.fc1.bias"),
    "blocks": ("attn.q.weight", "norm.bias"),
    "layers": ("attention.qkv.weight", "ffn_norm1.weight"),
    "double_stream_blocks": ("block.attn1.to_q.weight", "block.ff_i.gate.weight"),
    "single_stream_blocks": ("block.attn1.to_q.weight",),
    "double_layers": ("attn.w1q.weight", "mlpX.c_fc1.weight"),
    "single_layers": ("attn.w1q.weight",),
    "visual_transformer_blocks": ("cross_attention.key_norm.weight", "feed_forward.in_layer.weight"),
}
"""Some parameters of the blocks of each list."""
WIDTHS = {"z-image": 3840, "lumina2": 2304, "qwen-image": 3584}
DEPTHS = {"double": 19, "single": 38, "block": 60, "layer": 30, "joint": 24}
CAN_BE_CUT = [name for name, family in FAMILIES.items() if not family.refusal]


def shapes_of(name, depths=None):
    """A narrow network of a family, with the parameters it is recognised by."""
    family = FAMILIES[name]
    shapes = {mark.split("|")[0]: (WIDTHS.get(name, 4), 4) for mark in family.marks}
    if name == "qwen-image":
        shapes["txt_norm.weight"] = (3584,)
    shapes |= {"final_layer.linear.weight": (4, 4), "txt_in.individual_token_refiner.blocks.1.norm1.weight": (4,)}
    if name != "hunyuan":
        del shapes["txt_in.individual_token_refiner.blocks.1.norm1.weight"]
    lists = {blocks.path for blocks in family.lists}
    inner = {path: [*INNER[path]] for path in lists}
    for mark in family.marks:  # what block 0 is recognised by, all blocks have
        path, _, rest = mark.split("|")[0].partition(".0.")
        if path in lists and rest not in inner[path]:
            inner[path].append(rest)
    if family.beside:
        count = sum((depths or DEPTHS)[blocks.word] for blocks in family.lists) + 1
        shapes |= {f"{family.beside}.{number}.linear.weight": (4, 4) for number in range(count)}
    for blocks in family.lists:
        for number in range((depths or DEPTHS)[blocks.word]):
            shapes |= {
                f"{blocks.path}.{number}.{rest}": (4, 4) if rest.endswith("weight") else (4,) for rest in inner[blocks.path]
            }
    return shapes


def network(name, depths=None):
    teacher, prefix = Transformer.find(shapes_of(name, depths))
    assert prefix == "" and teacher.family == name
    teacher.check_whole()
    return teacher


def weights_of(shapes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


SMALL = {"double": 4, "single": 6, "block": 5, "layer": 5, "joint": 4}


# --- recognised


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_a_family_is_recognised_with_its_lists(name):
    teacher = network(name, SMALL)
    assert teacher.describe_lists() == {blocks.word: ranges(range(SMALL[blocks.word])) for blocks in FAMILIES[name].lists}
    for prefix in ("model.diffusion_model.", "diffusion_model.", "net."):
        found, at = Transformer.find({prefix + key: shape for key, shape in teacher.shapes.items()})
        assert found == teacher and at == prefix


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].refusal])
def test_a_family_that_cannot_be_cut_is_refused_with_the_reason(name):
    shapes = {mark.split("|")[0]: (4, 4) for mark in FAMILIES[name].marks} | {"img_in.weight": (4, 4)}
    if name == "wan-injected":
        shapes["vace_patch_embedding.weight"] = (4, 4)
    with pytest.raises(ValueError, match="which cannot be cut: ") as caught:
        Transformer.find(shapes)
    assert FAMILIES[name].title in str(caught.value) and "\n" not in str(caught.value)


class Counted(dict):
    """Counts how often all of its names are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def items(self):
        self.passes += 1
        return super().items()

    def keys(self):
        self.passes += 1
        return super().keys()

    def values(self):
        self.passes += 1
        return super().values()


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_a_deeper_network_is_not_gone_through_more_often(name):
    passes = []
    for depth in (5, 60):
        teacher = Transformer(FAMILIES[name], Counted(shapes_of(name, dict.fromkeys(DEPTHS, depth))))
        teacher.check_whole()
        teacher.describe_lists()
        passes.append(teacher.shapes.passes)
    assert passes[0] == passes[1] < 10


def test_other_networks_are_none_of_them(small_teacher):
    assert Transformer.find(small_teacher.architecture.shapes) is None
    assert Transformer.find({"transformer_blocks.0.attn.to_q.weight": (4, 4)}) is None


# --- plans


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_what_stays_is_the_teachers_numbered_from_0(name):
    teacher = network(name, SMALL)
    last = {path: teacher.numbers(path)[-1] for path in teacher.lists}
    kept = {blocks.word: (1, last[blocks.path]) for blocks in teacher.of.lists}
    mapping = name_map(teacher, PruningPlan(name="p", keep=kept))
    student = pruned(teacher, mapping)
    student.check_whole()
    for path in teacher.lists:
        assert student.numbers(path) == [0, 1]
        assert mapping.rename(f"{path}.{last[path]}.x.weight") == f"{path}.1.x.weight"
        assert mapping.rename(f"{path}.0.x.weight") is None
    rest = {key for key in teacher.shapes if key.split(".")[0] not in (*teacher.lists, teacher.of.beside)}
    assert all(mapping.rename(key) == key for key in rest)


def test_a_cut_that_changes_what_comfyui_computes_a_z_image_in_is_told(tmp_path, capsys):
    shapes = shapes_of("z-image", SMALL)
    weights = weights_of(shapes)
    for number, spread in enumerate((0.1, 0.1, 0.9, 0.1, 0.9)):  # of five layers the fourth decides
        weights[f"layers.{number}.ffn_norm1.weight"] = spread * torch.tensor([[-1.0, 1.0, -1.0, 1.0]] * 4)
    file = tmp_path / "z.safetensors"
    save_file(weights, file)
    told = {
        "keep layer 0-2,4": "The student may not, its teacher may",  # the third decides now
        "keep layer 1-4": "",
        "keep layer 0-1,4": "",
        "keep layer 2": "",  # no last but one
    }
    for number, (plan, message) in enumerate(told.items()):
        assert main(["prune", str(file), str(tmp_path / f"{number}.safetensors"), "--plan", plan]) == 0
        assert message in (text := capsys.readouterr().out) and ("float16" in text) == bool(message), plan
    save_file(weights | {"layers.3.ffn_norm1.weight": weights["layers.2.ffn_norm1.weight"].clone()}, file)
    assert main(["prune", str(file), str(tmp_path / "black.safetensors"), "--plan", "keep layer 0-1,4"]) == 0
    assert "on cards without bfloat16 images may turn black" in capsys.readouterr().out


def test_what_has_an_entry_for_each_block_loses_those_of_removed_blocks():
    teacher = network("hidream", SMALL)  # 4 doubles, 6 singles, and one entry more
    mapping = name_map(teacher, read_plan("keep double 0,3 single 2,5", teacher))
    entries = {f"caption_projection.{number}": mapping.rename(f"caption_projection.{number}") for number in range(11)}
    kept = {0: 0, 3: 1, 4 + 2: 2, 4 + 5: 3, 10: 4}
    assert {int(old.split(".")[1]): int(new.split(".")[1]) for old, new in entries.items() if new} == kept
    assert teacher.kept_residuals(mapping.rename).places == [0, 3, 6, 9]
    with pytest.raises(
        ValueError, match="removes single_stream_blocks.5, the last block, whose place no other can take; keep it"
    ):
        name_map(teacher, read_plan("keep single 0,1", teacher))
    with pytest.raises(ValueError, match="names 'caption_projection.1', which this transformer does not have"):
        name_map(teacher, PruningPlan(name="p", remove=("caption_projection.1",)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_plan_survives_as_text(data):
    teacher = network(data.draw(st.sampled_from(CAN_BE_CUT)), SMALL)
    keep, fold = {}, {}
    for blocks in teacher.of.lists:
        numbers = teacher.numbers(blocks.path)
        if data.draw(st.booleans()):
            ends = sorted(data.draw(st.lists(st.sampled_from(numbers[:-1]), unique=True, min_size=2)))
            fold[blocks.word] = tuple(zip(ends[: len(ends) // 2 * 2 : 2], ends[1::2], strict=True))
            continue
        kept = data.draw(st.lists(st.sampled_from(numbers), unique=True, min_size=max(1, blocks.least)))
        kept = {*kept, *(numbers[-1:] if blocks.last_stays else ())}
        if len(kept) < len(numbers):
            keep[blocks.word] = tuple(sorted(kept))
    if not keep and not fold:
        return
    plan = PruningPlan(name="p", keep=keep, fold=fold)
    mapping = name_map(teacher, plan)
    again = read_plan(write_plan(plan, teacher), teacher)
    assert folded(teacher, again) == folded(teacher, plan)
    for path, runs_of in folded(teacher, plan).items():
        assert all([n for n in run if mapping.rename(f"{path}.{n}")] == [(run[0] + run[-1]) // 2] for run in runs_of)
    assert name_map(teacher, again) == mapping == name_map(teacher, PruningPlan.from_json(plan.to_json()))
    student = pruned(teacher, mapping)
    student.check_whole()
    assert student.num_parameters == sum(
        torch.Size(shape).numel() for key, shape in teacher.shapes.items() if mapping.rename(key) is not None
    )
    # Every kept block holds what one block of the teacher held, and blocks keep their order.
    for path in teacher.lists:
        pairs = [(int(a.split(".")[1]), int(b.split(".")[1])) for a, b in mapping.table.items() if a.startswith(f"{path}.")]
        assert [b for _, b in sorted(pairs)] == [*range(len(pairs))]


@pytest.mark.parametrize(
    "text,message",
    [
        ("keep double 0-18", "it keeps everything"),
        ("keep double 0-40", "'0-40' does not list blocks of double in ascending order; the transformer has 0-18"),
        ("keep double 3,1", "ascending order"),
        ("keep triple 1", "does not say for each of double, single, once at most, which blocks to keep or fold"),
        ("keep double 1 double 2", "does not say for each of"),
        ("keep double", "does not say for each of"),
        ("keep down 1 mid none", "does not say for each of"),
        ("fold double 3", "'3' does not list runs of double, such as '5-7,9-10', in ascending order; the transformer has 0-18"),
        ("fold double 3-5,5-7", "does not list runs of double"),
        ("fold double 7-5", "does not list runs of double"),
        ("fold double 3-40", "does not list runs of double"),
        ("fold double none", "does not list runs of double"),
        ("fold", "does not say for each of double, single"),
        ("keep double 1 fold double 3-4", "does not say for each of double, single"),
        ('{"fold": {"double": [[3, 50]]}}', "folds transformer block 50 of double_blocks, which has 19"),
        ('{"fold": {"double": [[3]]}}', "'fold' of 'double' must list the first and the last block of each run"),
        ('{"fold": {"double": [[5, 6], [6, 7]]}}', "must list the first and the last block of each run, in ascending order"),
        ('{"fold": {"double": [3, 4]}}', "'fold' of 'double' must be"),
        ('{"fold": {"img_in": [[0, 1]]}}', "names 'img_in', which this transformer does not have"),
        ("keep double none", "removes every block of double_blocks; keep one at least"),
        ('{"remove": ["double.50"]}', "names 'double.50', which this transformer does not have"),
        ('{"remove": ["img_in"]}', "names 'img_in', which this transformer does not have"),
        ('{"keep": {"double": [50]}}', "keeps transformer block 50 of double_blocks, which has 19"),
        ("ssd-1b", "ssd-1b is a plan for SDXL-shaped UNets, but this one is Flux.1"),
        ("qwen-image-12b", "qwen-image-12b is a plan for Qwen-Image transformers, but this one is Flux.1"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_clear_sentence(text, message):
    teacher = network("flux1")
    with pytest.raises(ValueError) as caught:
        name_map(teacher, read_plan(text, teacher))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_block_of_sd3_stays_and_its_students_say_who_opens_them():
    teacher = network("sd3")
    with pytest.raises(ValueError, match="removes joint_blocks.23, the last block, whose place no other can take; keep it"):
        name_map(teacher, read_plan("keep joint 0-20", teacher))
    student = pruned(teacher, name_map(teacher, read_plan("keep joint 0-20,23", teacher)))
    assert student.told_depths == {"num_blocks": 22} and "Load Distilled Model" in student.loading_note
    assert network("flux1").told_depths == {} and network("flux1").loading_note == ""


def test_a_transformers_plan_on_a_unet_says_whose_it_is(small_teacher):
    with pytest.raises(ValueError, match="flux-mini is a plan for Flux.1 transformers, but this one is SD1.x-shaped"):
        name_map(small_teacher.architecture, preset("flux-mini"))


def test_plans_are_removed_by_word_or_by_path_and_all_of_a_list_may_go():
    teacher = network("flux1")
    by_word, by_path = (PruningPlan(name="p", remove=(f"{head}.5", f"{head}.1*")) for head in ("double", "double_blocks"))
    assert name_map(teacher, by_word) == name_map(teacher, by_path)
    none = name_map(teacher, read_plan("keep single none", teacher))
    assert (
        pruned(teacher, none).numbers("single_blocks") == []
        and write_plan(read_plan("keep single none", teacher), teacher) == "keep double 0-18 single none"
    )


@pytest.mark.parametrize(
    "name,kept",
    [
        ("flux-1-lite", {"double": 8, "single": 38}),
        ("flux-mini", {"double": 5, "single": 10}),
        ("qwen-image-12b", {"block": 35}),
        ("qwen-image-13b", {"block": 40}),
    ],
)
def test_published_plans_keep_what_was_published(name, kept):
    plan = preset(name)
    teacher = network(plan.teacher, plan.depths)
    assert pruned(teacher, name_map(teacher, plan)).depths == kept
    assert plan.source and name in all_preset_names() and name in preset_names(plan.teacher) and name not in preset_names()


@pytest.mark.parametrize("name", [name for name in all_preset_names() if preset(name).source.startswith("ours")])
def test_plans_of_our_own_fold_short_runs_behind_the_first_blocks(name):
    plan = preset(name)
    teacher = network(plan.teacher, plan.depths)
    assert "no student of it has been taught yet" in plan.choice
    for path, folds in folded(teacher, plan).items():
        word = teacher.lists[path].word
        assert folds == runs(range(plan.depths[word]), sum(len(run) - 1 for run in folds), head=0 if word == "single" else 3)
    assert read_plan(name, teacher) == plan and name_map(teacher, plan)


def test_a_plan_for_one_depth_is_not_taken_for_another():
    teacher = network("wan", {"block": 40})
    with pytest.raises(ValueError, match="for Wan with 30 blocks, but this one has 40 blocks; choose another plan"):
        name_map(teacher, preset("wan-30-small"))


@given(st.integers(6, 60), st.integers(0, 40), st.integers(0, 3), st.integers(1, 99))
def test_folded_runs_do_not_touch_the_ends_or_each_other(depth, gone, head, tail):
    try:
        found = runs(range(depth), gone, head=head, tail=tail)
    except ValueError as error:
        assert gone > max(0, depth - head - tail) // 3, error
        return
    blocks = [number for run in found for number in run]
    assert blocks == sorted({*blocks}) and {len(run) for run in found} <= {2, 3}
    assert all(run == [*range(run[0], run[-1] + 1)] and middle(run) in run[:2] for run in found)
    assert not {*blocks} & {*range(head), *range(depth - tail, depth)} and sum(len(run) - 1 for run in found) == gone


# --- files


@pytest.fixture
def flux(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file(weights_of(shapes_of("flux1", SMALL)), path, metadata={"modelspec.title": "a Flux"})
    return path


def test_a_file_is_cut_and_the_rest_is_bit_equal(flux, tmp_path):
    out = tmp_path / "out.safetensors"
    teacher, plan = open_transformer(flux), PruningPlan(name="mine", keep={"double": (0, 3), "single": (2,)})
    student = prune_file(teacher, out, plan).student
    before, after = load_file(flux), load_file(out)
    mapping = name_map(teacher.architecture, plan)
    assert {mapping.rename(name) for name in before} - {None} == after.keys()
    assert all(torch.equal(after[new], before[name]) for name in before if (new := mapping.rename(name)))
    file = open_network(out)
    assert file.architecture == student and plan_in(file.metadata).keep == plan.keep
    assert file.metadata["modelspec.title"] == "flux pruned by mine" and file.metadata["distill.teacher"]
    with pytest.raises(ValueError, match="exists already"):
        prune_file(teacher, out, plan)
    assert prune_file(teacher, out, plan, dtype="bf16", overwrite=True).student == student
    assert {tensor.code for tensor in open_transformer(out).tensors.values()} == {"BF16"}


def test_a_full_checkpoint_keeps_what_is_beside_the_network_if_asked(tmp_path):
    path, out = tmp_path / "all.safetensors", tmp_path / "out.safetensors"
    beside = {"vae.decoder.weight": torch.ones(3), "text_encoders.t5xxl.shared.weight": torch.ones(2, 2)}
    save_file({f"model.diffusion_model.{n}": w for n, w in weights_of(shapes_of("flux1", SMALL)).items()} | beside, path)
    plan = PruningPlan(name="mine", keep={"double": (1,)})
    teacher = open_transformer(path)
    prune_file(teacher, out, plan, layout="checkpoint")
    file = open_transformer(out)
    assert file.prefix == "model.diffusion_model." and file.others.keys() == beside.keys()
    prune_file(teacher, out, plan, overwrite=True)
    assert open_transformer(out).prefix == "" and not open_transformer(out).others
    with pytest.raises(ValueError, match="holds no VAE and text encoder"):
        prune_file(open_transformer(out), tmp_path / "no", PruningPlan(name="p", remove=("single",)), layout="checkpoint")


def test_gaps_in_the_numbers_are_closed(tmp_path):
    """As PPCL's Qwen-Image has them; ComfyUI stops counting at the first."""
    weights = weights_of(shapes_of("qwen-image", SMALL))
    path, out = tmp_path / "gaps.safetensors", tmp_path / "out.safetensors"
    save_file({name: weight for name, weight in weights.items() if not name.startswith("transformer_blocks.2.")}, path)
    teacher = open_transformer(path)
    assert teacher.describe()["blocks"] == {"block": "0-1,3-4"}
    prune_file(teacher, out, read_plan("keep block 0,1,4", teacher.architecture))
    assert open_transformer(out).describe()["blocks"] == {"block": "0-2"}
    name = "transformer_blocks.{}.attn.add_q_proj.weight"
    assert torch.equal(load_file(out)[name.format(2)], weights[name.format(4)])


def test_scales_go_with_their_block_and_metadata_name_the_new_numbers(tmp_path):
    weights = weights_of(shapes_of("flux1", SMALL))
    layers = [f"double_blocks.{n}.img_attn.qkv" for n in range(4)]
    for n, layer in enumerate(layers):
        weights |= {f"{layer}.weight": weights[f"{layer}.weight"].to(torch.float8_e4m3fn), f"{layer}.weight_scale": torch.tensor(1.0 + n),
                    f"{layer}.comfy_quant": torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)}  # fmt: skip
    table = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    path, out = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    save_file(weights, path, metadata={"_quantization_metadata": json.dumps(table)})
    teacher = open_transformer(path)
    assert teacher.architecture.quantised and teacher.architecture.num_parameters == network("flux1", SMALL).num_parameters
    prune_file(teacher, out, PruningPlan(name="p", keep={"double": (1, 3)}))
    after = load_file(out)
    assert [after[f"double_blocks.{n}.img_attn.qkv.weight_scale"].item() for n in range(2)] == [2.0, 4.0]
    assert torch.equal(
        after["double_blocks.1.img_attn.qkv.weight"].view(torch.uint8), weights[f"{layers[3]}.weight"].view(torch.uint8)
    )
    with safe_open(out, "pt") as opened:
        told = json.loads(opened.metadata()["_quantization_metadata"])
    assert [*told["layers"]] == layers[:2] and told["format_version"] == "1.0"
    with pytest.raises(ValueError, match="can only be copied"):
        prune_file(teacher, tmp_path / "no.safetensors", PruningPlan(name="p", keep={"double": (1,)}), dtype="bf16")


@pytest.mark.parametrize(
    "layout,named",
    [
        ("ldm", "double_blocks.0.img_attn.qkv"),
        ("checkpoint", "model.diffusion_model.double_blocks.0.img_attn.qkv text_encoders.t5.q"),
    ],
)
def test_quantised_layers_are_listed_by_the_names_that_the_student_has(layout, named, tmp_path):
    """ComfyUI takes each name of the list for that of a tensor's layer."""
    prefix, layer, beside = "model.diffusion_model.", "double_blocks.{}.img_attn.qkv", "text_encoders.t5.q"
    weights = {prefix + name: weight for name, weight in weights_of(shapes_of("flux1", SMALL)).items()}
    layers = [*(prefix + layer.format(n) for n in (1, 2)), beside]
    weights |= {f"{name}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn) for name in layers}
    table = json.dumps({"layers": {name: {"format": "float8_e4m3fn"} for name in layers}})
    save_file(weights, tmp_path / "whole.safetensors", metadata={"_quantization_metadata": table})
    teacher, out = open_transformer(tmp_path / "whole.safetensors"), tmp_path / "out.safetensors"
    prune_file(teacher, out, read_plan("keep double 2,3", teacher.architecture), layout=layout)
    with safe_open(out, "pt") as opened:
        listed = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
        assert [*listed] == named.split() and all(f"{name}.weight" in opened.keys() for name in listed)
    with pytest.raises(ValueError, match="can only be copied"):
        prune_file(teacher, tmp_path / "no", PruningPlan(name="p", keep={"double": (1,)}), dtype="bf16")


@pytest.mark.parametrize(
    "code,beside", [("uint8", "absmax"), ("uint8", "s_rel"), ("int8", ""), ("float16", "quant_state.bitsandbytes__nf4")]
)
def test_what_is_quantised_is_told_by_its_storage(code, beside, tmp_path):
    """bitsandbytes' ``weight.absmax``, and scales of kinds that are not known here: such numbers are copied, never rounded."""
    weights = weights_of(shapes_of("flux1", SMALL))
    name = "double_blocks.{}.img_attn.qkv.weight"
    weights |= {name.format(n): torch.ones(4, 4, dtype=getattr(torch, code)) for n in range(4)}
    weights |= {f"{name.format(n)}{'_' if beside == 's_rel' else '.'}{beside}": torch.ones(4) for n in range(4) if beside}
    save_file(weights, tmp_path / "t.safetensors")
    teacher, plan, out = (
        open_transformer(tmp_path / "t.safetensors"),
        PruningPlan(name="p", keep={"double": (3,)}),
        tmp_path / "out",
    )
    assert teacher.architecture.quantised and teacher.architecture.num_parameters == network("flux1", SMALL).num_parameters
    with pytest.raises(ValueError, match="can only be copied"):
        prune_file(teacher, out, plan, dtype="fp16")
    prune_file(teacher, out, plan)
    assert torch.equal(load_file(out)[name.format(0)], weights[name.format(3)])


def test_a_depth_in_the_metadata_is_the_students():
    teacher = network("ltxv", SMALL)
    mapping = name_map(teacher, PruningPlan(name="p", keep={"block": (0, 1)}))
    student = pruned(teacher, mapping)
    config = {"transformer": {"num_layers": 5, "attention_head_dim": 64}, "vae": {"num_layers": 7}}
    told = json.loads(rewritten({"config": json.dumps(config), "other": "x"}, teacher, student, mapping.rename)["config"])
    assert told == {"transformer": {"num_layers": 2, "attention_head_dim": 64}, "vae": {"num_layers": 7}}
    assert (
        "num_layers"
        not in json.loads(rewritten({"config": '{"transformer": {}}'}, teacher, student, mapping.rename)["config"])["transformer"]
    )
    with pytest.raises(ValueError, match="its metadata 'config'"):
        rewritten({"config": "{"}, teacher, student, mapping.rename)


def test_layers_that_no_block_has_are_not_told_to_comfyui():
    teacher = network("flux1", SMALL)
    layers = json.dumps({"layers": {"net.double_blocks.1.x": {}, "double_blocks.9.x": {}, "vae.x": {}}})
    told = rewritten({"_quantization_metadata": layers}, teacher, teacher, teacher.contiguous, "net.")
    assert json.loads(told["_quantization_metadata"]) == {"layers": {"double_blocks.1.x": {}}}


def test_an_incomplete_file_says_what_is_missing(tmp_path):
    weights = weights_of(shapes_of("flux1", SMALL))
    del weights["single_blocks.3.linear1.weight"]
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"incomplete or damaged: single_blocks.3.linear1.weight is missing .* download it again"
    ):
        open_network(tmp_path / "x.safetensors")


def test_kept_blocks_of_other_lists_are_refused(tmp_path):
    for number, skips in enumerate(
        ('{"lists": {"foo": {"teacher": 4, "kept": [0]}}}', '{"teacher": 4, "kept": [0], "mid": true}')
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(weights_of(shapes_of("flux1", SMALL)), path, metadata={"distill.skips": skips})
        with pytest.raises(ValueError, match="metadata on kept residuals is damaged"):
            prune_file(open_transformer(path), tmp_path / "out.safetensors", PruningPlan(name="p", keep={"double": (1,)}))


# --- commands


def test_the_command_cuts_and_shows(flux, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["prune", str(flux), str(out), "--plan", "keep double 0-1 single none"]) == 0
    assert "fewer than the teacher's" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "flux1" and facts["blocks"] == {"double": "0-1", "single": "none"}
    assert main(["inspect", str(out)]) == 0 and "double   0-1" in capsys.readouterr().out
    for arguments, message in {
        ("--plan", "keep double 1", "--pad"): "identity blocks (pad) are for UNets",
        (
            "--plan",
            "keep double 1",
            "--layout",
            "diffusers",
        ): "a single file of a transformer is cut into a single file; write the ldm layout",
        ("--preset", "ssd-1b"): "is a plan for SDXL-shaped UNets, but this one is Flux.1",
    }.items():
        target = tmp_path / ("no" if "diffusers" in arguments else "no.safetensors")
        assert main(["prune", str(flux), str(target), *arguments]) == 2
        assert message in capsys.readouterr().err and not target.exists()


def test_what_needs_a_unet_says_that_this_is_a_transformer(flux):
    with pytest.raises(
        ValueError,
        match="it is Flux.1, a transformer, and this takes UNets; distill prune, train and remap-lora take transformers",
    ):
        open_unet(flux)
