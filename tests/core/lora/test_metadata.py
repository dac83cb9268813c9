"""A LoRA as diffusers writes it, strength and patterns in the metadata: on the student it does what it did on the teacher."""

import copy
import json
import time

import diffusers.loaders.lora_base
import pytest
import torch
from peft import LoKrConfig, LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_core.lora.metadata import KEY, PeftConfig, read_configs, written
from distill_core.lora.remap import convert_lora_file, remap_lora, remap_lora_file
from distill_core.networks.build import build_unet
from distill_core.networks.layouts import LAYOUTS
from distill_core.pruning.plan import name_map, preset, pruned
from distill_core.pruning.plan_text import read_plan

from .test_remap import kohya

MOVED = "up_blocks.1.attentions.2.transformer_blocks.0.attn1"  # the student counts it anew
STAYS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONFIGS = {
    "alpha": dict(lora_alpha=16),
    "rsLoRA": dict(lora_alpha=16, use_rslora=True),
    "patterns of paths": dict(rank_pattern={f"{MOVED}.to_q": 8, f"{STAYS}.to_q": 2}, alpha_pattern={f"{MOVED}.to_q": 64, f"{STAYS}.to_v": 1.5}),
    "patterns of names": dict(rank_pattern={"to_v": 2}, alpha_pattern={"attn2.to_q": 32, "to_q": 1}),
    "patterns": dict(alpha_pattern={r"up_blocks\.\d+\..*to_q": 32, f"^{STAYS}.to_v": 24, ".*(to_q|to_v)": 2}),
    "paths": dict(lora_alpha=16, target_modules=[f"{MOVED}.to_q", f"{STAYS}.to_q"]),
    "regular expression": dict(lora_alpha=16, target_modules=r"up_blocks\.1\..*\.to_[qv]"),
    "all but some": dict(lora_alpha=16, exclude_modules=[f"{STAYS}.to_q", f"{MOVED}.to_v"]),
    "by number": dict(lora_alpha=16, layers_to_transform=[2], layers_pattern="attentions"),
    "convolutions": dict(lora_alpha=2, target_modules=["conv1", "proj_in", "ff.net.0.proj"]),
    "DoRA": dict(lora_alpha=16, use_dora=True),
    "LoRA with biases": dict(lora_alpha=16, target_modules=["to_out.0"], lora_bias=True),
}  # fmt: skip


reads_metadata = pytest.mark.skipif(
    not hasattr(diffusers.loaders.lora_base, "LORA_ADAPTER_METADATA_KEY"),
    reason="diffusers does not read the metadata itself yet",
)


def saved(network, path, config, prefix="unet."):
    """Put an adapter with random matrices on a copy of a network, and write it as diffusers does; returns the copy."""
    network = copy.deepcopy(network)
    torch.manual_seed(1)
    network.add_adapter(config)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name or ".lokr_w" in name or "lora_magnitude" in name:
            parameter.data = torch.rand_like(parameter) * 0.1 if "magnitude" not in name else parameter.data * 1.1
    fields = {name: sorted(v) if isinstance(v, set) else v for name, v in network.peft_config["default"].to_dict().items()}
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(network).items()}
    save_file(tensors, path, {KEY: json.dumps({f"{prefix}{name}": value for name, value in fields.items()}, default=str)})
    return network


def loaded(network, path):
    """A copy of a network with a LoRA, by diffusers' own loader."""
    network = copy.deepcopy(network)
    with safe_open(path, "pt") as file:
        text = file.metadata().get(KEY)
    network.load_lora_adapter(load_file(path), prefix="unet", metadata=json.loads(text) if text else None)
    return network


def changed_weights(network):
    """Weights with their adapter merged, by canonical name."""
    network = copy.deepcopy(network)
    network.fuse_lora()
    network.unload_lora()
    state = network.state_dict()
    return {name: state[path] for path, name in LAYOUTS["diffusers"].to_canonical(state).items()}


def student_of(teacher, mapping):
    architecture = pruned(teacher.architecture, mapping)
    network = build_unet(architecture)
    weights = mapping.apply(weights_of(teacher.network, teacher.architecture))
    network.load_state_dict({path: weights[name] for name, path in paths_of(architecture).items()})
    return network


def weights_of(network, architecture):
    state = network.state_dict()
    return {name: state[path] for name, path in paths_of(architecture).items()}


def paths_of(architecture):
    return LAYOUTS["diffusers"].from_canonical(architecture.shapes)


def close(got, expected, before):
    """Whether changed weights agree, measured by the change; returns how many of them changed."""
    changed = 0
    for name, weight in expected.items():
        change = (weight - before[name]).norm()
        assert (got[name] - weight).norm() <= 1e-4 * change + 1e-5, name
        changed += bool(change > 1e-3)
    return changed


@reads_metadata
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,plan", [*((name, "bk-sdm-base") for name in CONFIGS), ("patterns of paths", "bk-sdm-tiny")])
def test_diffusers_gives_the_student_what_it_gave_the_teacher(name, plan, small_teacher, tmp_path):
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]} | CONFIGS[name]
    with_lora = saved(small_teacher.network, tmp_path / "lora.safetensors", LoraConfig(**options))
    mapping = name_map(small_teacher.architecture, preset(plan))
    remapped = remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", small_teacher.architecture, mapping)
    student = student_of(small_teacher, mapping)
    got = changed_weights(loaded(student, tmp_path / "out.safetensors"))
    before = weights_of(student, pruned(small_teacher.architecture, mapping))
    expected = mapping.apply(changed_weights(with_lora))
    assert close(got, expected, before) >= remapped.num_kept > 0


@reads_metadata
@pytest.mark.filterwarnings("ignore")
def test_a_lokr_keeps_its_strength(small_teacher, tmp_path):
    config = LoKrConfig(r=4, alpha=12, target_modules=["to_q"], alpha_pattern={f"{MOVED}.to_q": 40})
    with_lora = saved(small_teacher.network, tmp_path / "lora.safetensors", config)
    mapping = name_map(small_teacher.architecture, preset("bk-sdm-base"))
    remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", small_teacher.architecture, mapping)
    student = student_of(small_teacher, mapping)
    before = weights_of(student, pruned(small_teacher.architecture, mapping))
    got = changed_weights(loaded(student, tmp_path / "out.safetensors"))
    assert close(got, mapping.apply(changed_weights(with_lora)), before)


@reads_metadata
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["alpha", "rsLoRA", "patterns of paths", "patterns", "convolutions"])
def test_converted_and_in_kohyas_form_it_is_as_strong(name, small_teacher, tmp_path):
    teacher, plan = small_teacher.architecture, "keep down 2,1,2,2 up 3,3,2,3"  # whose layers ComfyUI finds by LDM names alone
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]} | CONFIGS[name]
    with_lora = saved(small_teacher.network, tmp_path / "lora.safetensors", LoraConfig(**options))
    path, mapping = tmp_path / "lora.safetensors", name_map(teacher, read_plan(plan, teacher))
    convert_lora_file(path, tmp_path / "converted.safetensors", teacher)
    expected = changed_weights(with_lora)
    before = weights_of(small_teacher.network, teacher)
    assert close(changed_weights(loaded(small_teacher.network, tmp_path / "converted.safetensors")), expected, before)

    remapped = remap_lora_file(path, tmp_path / "out.safetensors", teacher, mapping)
    file, student = load_file(tmp_path / "out.safetensors"), pruned(teacher, mapping)
    assert remapped.switched_to_ldm and KEY not in remapped.metadata
    for layer, weight in mapping.apply({name: expected[name] - before[name] for name in expected}).items():
        key = kohya("ldm")(layer.removesuffix(".weight"), student) if layer.endswith(".weight") and weight.ndim > 1 else ""
        if f"{key}.lora_B.weight" in file:
            up, down = file.pop(f"{key}.lora_B.weight"), file.pop(f"{key}.lora_A.weight")
            change = file.pop(f"{key}.alpha").item() / len(down) * (up.flatten(1) @ down.flatten(1))  # as ComfyUI computes it
            torch.testing.assert_close(change.reshape(weight.shape), weight, rtol=1e-4, atol=1e-5)
        else:
            assert not weight.any()
    assert not file


@pytest.mark.filterwarnings("ignore")
def test_text_encoders_keep_theirs_or_get_alphas(small_teacher, tmp_path):
    saved(small_teacher.network, tmp_path / "lora.safetensors", LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    matrices = {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    theirs = {"text_encoder.r": 4, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {"layers.0.self_attn.q_proj": 6}}
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        text = json.dumps(json.loads(file.metadata()[KEY]) | theirs)
    teacher = small_teacher.architecture
    mapping, tensors = name_map(teacher, preset("bk-sdm-base")), load_file(tmp_path / "lora.safetensors") | matrices
    kept = remap_lora(tensors, teacher, mapping, metadata={KEY: text})
    assert {name: v for name, v in json.loads(kept.metadata[KEY]).items() if name.startswith("text")} == theirs
    assert f"{layer}.alpha" not in kept.tensors
    switched = remap_lora(tensors, teacher, mapping, metadata={KEY: text}, layout="ldm")
    assert switched.tensors[f"{layer}.alpha"].item() == 6 and KEY not in switched.metadata
    alphas = {
        tensor.item() for name, tensor in switched.tensors.items() if name.startswith("lora_unet") and name.endswith(".alpha")
    }
    assert alphas == {8}


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_the_unet_alone_need_not_name_it(small_teacher, tmp_path):
    """As save_lora_adapter of a model writes it."""
    teacher = small_teacher.architecture
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], alpha_pattern={f"{MOVED}.to_q": 2})
    saved(small_teacher.network, tmp_path / "lora.safetensors", config, prefix="")
    remap_lora_file(
        tmp_path / "lora.safetensors", tmp_path / "out.safetensors", teacher, name_map(teacher, preset("bk-sdm-base"))
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        fields = json.loads(file.metadata()[KEY])
    assert fields["alpha_pattern"] == {"up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q": 2}
    assert set(fields["target_modules"]) == {key.removesuffix(".lora_A.weight") for key in load_file(tmp_path / "out.safetensors")
                                             if "lora_A" in key}  # fmt: skip


@pytest.mark.parametrize("pattern", ["to_q", r"down.*to_q", "^a.b.to_q", "b.to_q", "(to_q|to_k)", "o_q", r"a\.b", "a.*b"])
def test_patterns_match_as_peft_matches_them(pattern):
    from peft.utils.other import get_pattern_key

    config = PeftConfig({"alpha_pattern": {pattern: 3}})
    for path in ("a.b.to_q", "down.0.to_q", "to_q", "b.to_k", "a.b"):
        assert (config.alpha(path) == 3) == (get_pattern_key([pattern], path) == pattern)


def test_what_is_written_is_read_again():
    text = json.dumps({"unet.r": 4, "text_encoder.r": 8, "unet.alpha_pattern": {"a.b": 2}})
    assert json.loads(written(read_configs({KEY: text}))) == json.loads(text)
    assert read_configs({}) == {}


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object"),
        ({"unet.r": 0}, "r must be a whole number above 0, got '0'"),
        ({"unet.r": "4"}, "r must be a whole number"),
        ({"unet.r": True}, "r must be a whole number"),
        ({"unet.lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"unet.lora_alpha": None}, "lora_alpha must be a number"),
        ({"unet.rank_pattern": {"to_q": 2.5}}, "rank_pattern of 'to_q' must be a whole number"),
        ({"unet.alpha_pattern": {"to_q": [1]}}, "alpha_pattern of 'to_q' must be a number"),
        ({"unet.alpha_pattern": ["to_q"]}, "alpha_pattern must map"),
        ({"unet.alpha_pattern": {f"a{i}": 1 for i in range(5000)}}, "alpha_pattern must map at most 4096"),
        ({"unet.alpha_pattern": {"(": 1}}, "is not a pattern"),
        ({"unet.alpha_pattern": {"(.+)+X": 1}}, "is not a pattern"),
        ({"unet.alpha_pattern": {"(.|.)" * 30 + "X": 1}}, "is not a pattern"),
        ({"unet.alpha_pattern": {"(" * 400 + ")" * 400: 1}}, "is not a pattern"),
        ({"unet.alpha_pattern": {f".*.*.*{i}X": 1 for i in range(100)}}, "too many patterns with wildcards"),
    ],
)
def test_metadata_that_is_damaged_or_hostile_is_refused_at_once(text, message, small_teacher):
    teacher, began = small_teacher.architecture, time.monotonic()
    text = text if isinstance(text, str) else json.dumps(text)
    tensors = {f"unet.{MOVED}.to_q.lora_A.weight": torch.ones(2, 64), f"unet.{MOVED}.to_q.lora_B.weight": torch.ones(64, 2)}
    with pytest.raises(ValueError, match=message) as caught:
        remap_lora(tensors, teacher, name_map(teacher, preset("bk-sdm-base")), metadata={KEY: text})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and time.monotonic() - began < 5


def test_a_layer_with_an_endless_name_is_refused_at_once(small_teacher):
    path, began = "text_encoder." + "a." * 1500 + "to_q", time.monotonic()
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}
    tensors |= {f"unet.{MOVED}.to_q.lora_A.weight": torch.ones(2, 64), f"unet.{MOVED}.to_q.lora_B.weight": torch.ones(64, 2)}
    text = json.dumps({"text_encoder.alpha_pattern": {".*.*.*z": 1}})
    with pytest.raises(ValueError, match="too long for the name of a layer"):
        remap_lora(
            tensors,
            small_teacher.architecture,
            name_map(small_teacher.architecture, preset("bk-sdm-base")),
            metadata={KEY: text},
            layout="ldm",
        )
    assert time.monotonic() - began < 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,message", [("DoRA", "part of peft's DoRA"), ("LoRA with biases", "a bias of a LoRA")])
def test_what_comfyui_has_no_place_for_is_refused_in_its_layout(name, message, small_teacher, tmp_path):
    teacher = small_teacher.architecture
    saved(
        small_teacher.network, tmp_path / "lora.safetensors", LoraConfig(**{"r": 4, "target_modules": ["to_q"]} | CONFIGS[name])
    )
    with pytest.raises(ValueError, match=message):
        remap_lora(load_file(tmp_path / "lora.safetensors"), teacher, name_map(teacher, preset("bk-sdm-base")), layout="ldm")
