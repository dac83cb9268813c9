"""Diffusers folders of transformers, cut."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill_core.cli import main
from distill_core.lora.remap import remap_lora_file
from distill_core.networks.network import open_network
from distill_core.networks.transformers.architecture import FAMILIES, Transformer
from distill_core.networks.transformers.files import TransformerFolder, open_transformer
from distill_core.pruning import plan as plans
from distill_core.pruning.plan import name_map, plan_in, pruned
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.prune import prune_file

from ...nodes.cutting import texts

diffusers = pytest.importorskip("diffusers")

CLASSES = [(kind, name) for name, family in FAMILIES.items() if not family.refusal for kind in family.diffusers]
HEADS = dict(attention_head_dim=16, num_attention_heads=2)
ROWS, TEXT = torch.arange(16.0), torch.zeros(6, 3)
IDS = torch.stack([torch.zeros(16), ROWS // 4, ROWS % 4], 1)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


TIME = torch.tensor([0.7, 0.4])
SMALL = {
    "FluxTransformer2DModel": (
        dict(in_channels=4, num_layers=4, num_single_layers=5, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **HEADS),
        dict(hidden_states=noise(2, 16, 4), encoder_hidden_states=noise(2, 6, 32), pooled_projections=noise(2, 16), timestep=TIME, img_ids=IDS, txt_ids=TEXT),
    ),
    "Flux2Transformer2DModel": (
        dict(in_channels=4, num_layers=4, num_single_layers=5, joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), **HEADS),
        dict(hidden_states=noise(2, 16, 4), encoder_hidden_states=noise(2, 6, 32), timestep=TIME, img_ids=torch.cat([IDS, IDS[:, :1]], 1),
             txt_ids=torch.zeros(6, 4), guidance=torch.tensor([4.0, 4.0])),
    ),
    "QwenImageTransformer2DModel": (
        dict(in_channels=16, out_channels=4, num_layers=5, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **HEADS),
        dict(hidden_states=noise(2, 16, 16), encoder_hidden_states=noise(2, 6, 16), encoder_hidden_states_mask=torch.ones(2, 6), timestep=TIME,
             img_shapes=[(1, 4, 4)] * 2),
    ),
    "ZImageTransformer2DModel": (
        dict(in_channels=4, dim=64, n_layers=5, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[16, 8, 8]),
        dict(x=[noise(4, 1, 8, 8)] * 2, t=TIME, cap_feats=[noise(6, 16)] * 2),
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=5, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2,
             axes_dim_rope=(8, 4, 4), cap_feat_dim=16),
        dict(hidden_states=noise(2, 4, 8, 8), timestep=TIME, encoder_hidden_states=noise(2, 6, 16),
             encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool)),
    ),
    "WanTransformer3DModel": (
        dict(in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=5, **HEADS),
        dict(hidden_states=noise(2, 4, 1, 8, 8), timestep=1000 * TIME, encoder_hidden_states=noise(2, 6, 16)),
    ),
    "HiDreamImageTransformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=4, num_single_layers=5, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2,
             num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16), llama_layers=[*range(9)], **HEADS),
        dict(hidden_states=noise(2, 4, 8, 8), timesteps=1000 * TIME, encoder_hidden_states_t5=noise(2, 6, 16),
             encoder_hidden_states_llama3=noise(9, 2, 6, 16), pooled_embeds=noise(2, 16)),
    ),
    "SD3Transformer2DModel": (
        dict(sample_size=8, in_channels=4, out_channels=4, num_layers=6, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
             pos_embed_max_size=8, dual_attention_layers=(0, 1, 3), **HEADS),
        dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 6, 32), pooled_projections=noise(2, 16), timestep=1000 * TIME),
    ),
}  # fmt: skip
"""By diffusers' class: a config that few weights fill, and what the network is asked."""


TRUE = {
    "HiDreamImageTransformer2DModel": dict(
        patch_size=2, in_channels=16, num_layers=16, num_single_layers=32, attention_head_dim=128, num_attention_heads=20,
        caption_channels=[4096, 4096], text_emb_dim=2048, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(64, 32, 32),
        max_resolution=(128, 128), llama_layers=[*range(32), *[31] * 16],
    ),
}  # fmt: skip
"""Configs of classes that have no default of true shape."""


def of_shape(kind, family, config=()):
    """A network without weights, and the transformer it is."""
    config = config or TRUE.get(kind)
    with torch.device("meta"):
        network = getattr(diffusers, kind).from_config(dict(config)) if config else getattr(diffusers, kind)()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return network, Transformer(FAMILIES[family].in_diffusers, shapes)


def opened_by_from_config(kind, family):
    """A model of true shape, and by plan whether ``from_config`` builds just the student's weights from the config that is written."""
    network, teacher = of_shape(kind, family)
    teacher.check_whole()
    config = json.loads(network.to_json_string())
    folder = TransformerFolder(
        Path("x"), "", {}, teacher, "bf16", config=config | {"_use_default_values": ["num_layers", "n_layers"]}
    )
    found = [text for text in texts(teacher, plans) if text.startswith(("keep ", "fold "))]
    students = {}
    for text in found:
        mapping = name_map(teacher, read_plan(text, teacher))
        student = pruned(teacher, mapping)
        students[text] = of_shape(kind, family, folder.config_of(student, mapping.rename))[1].shapes == student.shapes
    return teacher, students


@pytest.mark.slow
@pytest.mark.parametrize("kind,family", CLASSES)
def test_from_config_opens_every_kind_of_plan_at_true_shape(kind, family):
    _, students = opened_by_from_config(kind, family)
    assert len(students) >= 4 and all(students.values()), students


@pytest.fixture(params=SMALL)
def written(request, tmp_path):
    """A small network with random weights, what it is asked, and its folder."""
    config, asked = SMALL[request.param]
    torch.manual_seed(0)
    network = getattr(diffusers, request.param)(**config).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name or weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * (0.3 if weight.ndim < 2 else weight[0].numel() ** -0.5))
    network.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="60KB")
    return network, asked, tmp_path / "pipeline"


def answer(network, asked):
    with torch.no_grad():
        found = network(**asked, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


def test_a_student_computes_as_its_teacher_without_the_blocks(written, tmp_path):
    network, asked, pipeline = written
    whole = answer(network, asked)
    file = open_network(pipeline)
    assert type(file) is TransformerFolder and len([*(pipeline / "transformer").glob("*.safetensors")]) > 1
    assert file.describe()["layout"] == f"diffusers ({type(network).__name__})" and file.describe()["dtype"] == "f32"
    folds = " ".join(f"{blocks.word} 1-3" for blocks in file.architecture.of.lists)
    pruning = prune_file(file, tmp_path / "student", read_plan(f"fold {folds}", file.architecture), layout="diffusers")
    student = type(network).from_pretrained(tmp_path / "student").eval()
    for path in file.architecture.lists:
        blocks = network.get_submodule(path)
        setattr(network, path, nn.ModuleList(block for number, block in enumerate(blocks) if number not in (1, 3)))
        assert len(student.get_submodule(path)) == len(blocks) - 2
    if hasattr(network, "caption_projection") and file.architecture.of.beside:
        stays = [number for number in range(10) if number not in (1, 3, 4 + 1, 4 + 3)]
        network.caption_projection = nn.ModuleList(network.caption_projection[number] for number in stays)
        assert student.config.llama_layers == stays[:-1]
        network.register_to_config(llama_layers=stays[:-1])
    assert torch.equal(answer(student, asked), answer(network, asked))
    assert not torch.equal(answer(student, asked), whole) and answer(student, asked).isfinite().all()
    again = open_network(tmp_path / "student")
    assert plan_in(again.metadata) == pruning.plan and pruning.plan.fold and again.architecture.shapes == pruning.student.shapes
    assert again.config["_class_name"] == type(network).__name__
    if "dual_attention_layers" in again.config:
        assert again.config["dual_attention_layers"] == [0]  # of 0, 1, 3 those that stay, counted anew


@pytest.mark.parametrize("listed,message", [(5, "must be a list"), (["0"], "must be numbers"), ([0.5], "must be numbers")])
def test_a_config_with_an_odd_list_of_blocks_is_refused(listed, message, tmp_path):
    diffusers.SD3Transformer2DModel(**SMALL["SD3Transformer2DModel"][0]).save_pretrained(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    (tmp_path / "t" / "config.json").write_text(json.dumps(config | {"dual_attention_layers": listed}))
    file = open_network(tmp_path / "t")
    plan = read_plan(f"keep joint 1-{len(file.architecture.in_order) - 1}", file.architecture)
    with pytest.raises(ValueError, match=f"dual_attention_layers in .*config.json {message}"):
        prune_file(file, tmp_path / "out", plan, layout="diffusers")


@pytest.fixture
def flux(tmp_path):
    folder = tmp_path / "flux"
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(**SMALL["FluxTransformer2DModel"][0]).save_pretrained(folder)
    return folder


def test_the_command_cuts_a_folder_into_a_folder(flux, tmp_path, capsys):
    out = tmp_path / "cut"
    plan = "keep double 0,3 single 0,4"
    assert main(["prune", str(flux), str(out), "--plan", plan, "--layout", "diffusers", "--dtype", "bf16"]) == 0
    assert main(["inspect", str(out / "diffusion_pytorch_model.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "bf16" in told and plan in told
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert main(["prune", str(flux), str(tmp_path / "cut.safetensors"), "--plan", plan]) == 2
    assert "is a diffusers folder, which is cut into one; write the diffusers layout" in capsys.readouterr().err
    assert main(["prune", str(flux), str(out), "--plan", plan, "--layout", "diffusers"]) == 2  # it exists
    before = (out / "config.json").read_text()
    assert json.loads(before)["num_layers"] == json.loads(before)["num_single_layers"] == 2


def test_a_teachers_lora_fits_the_folder_of_a_student(flux, tmp_path):
    prune_file(
        open_network(flux),
        tmp_path / "cut",
        read_plan("keep double 0,3 single 0,4", open_network(flux).architecture),
        layout="diffusers",
    )
    heads = {"transformer.transformer_blocks.{}.attn.to_q": 4, "lora_unet_single_blocks_{}_linear2": 5}
    lora = {
        f"{head.format(number)}.{matrix}.weight": torch.full((32, 2) if matrix == "lora_B" else (2, 32), float(number))
        for head, depth in heads.items()
        for number in range(depth)
        for matrix in ("lora_A", "lora_B")
    }
    save_file(lora, tmp_path / "lora.safetensors")
    teacher, plan = open_network(flux).architecture, plan_in(open_network(tmp_path / "cut").metadata)
    remapped = remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", teacher, name_map(teacher, plan))
    found = load_file(tmp_path / "out.safetensors")
    assert (remapped.num_kept, remapped.num_dropped) == (4, 5)
    assert {name: int(weight[0, 0]) for name, weight in found.items() if "lora_A" in name} == {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": 0,
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": 3,
        "lora_unet_single_blocks_0_linear2.lora_A.weight": 0,
        "lora_unet_single_blocks_1_linear2.lora_A.weight": 4,
    }


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"_class_name": "ChromaTransformer2DModel"}, "it is Chroma, which cannot be cut: one network makes the modulations"),
        ({"_class_name": "WanVACETransformer3DModel"}, "it is a Wan with control, sound or poses, which cannot be cut"),
        ({"_class_name": "QwenImageTransformer2DModel"}, None),
        (
            {"_class_name": "SanaTransformer2DModel"},
            "SanaTransformer2DModel is not known here; these can be cut: AuraFlowTransformer2DModel",
        ),
    ],
)
def test_what_cannot_be_cut_says_why(flux, changes, message):
    config = json.loads((flux / "config.json").read_text())
    (flux / "config.json").write_text(json.dumps(config | changes))
    if message is None:  # the weights decide nothing, the class does
        assert open_network(flux).architecture.family == "qwen-image"
        return
    with pytest.raises(ValueError) as caught:
        open_network(flux)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_folder_says_what_is_missing(flux, tmp_path):
    weights = load_file(flux / "diffusion_pytorch_model.safetensors")
    del weights["transformer_blocks.2.attn.to_q.weight"]
    save_file(weights, flux / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match=r"transformer_blocks.2.attn.to_q.weight is missing or has another shape .* download it again"
    ):
        open_network(flux)
    (flux / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors"):
        open_network(flux)
    with pytest.raises(ValueError, match="it contains no transformer of a known family"):
        open_transformer(tmp_path / "nothing")
