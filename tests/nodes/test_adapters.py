"""A teacher's LoRA on its student, applied by ComfyUI's own loaders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.demo.teacher import teacher_file
from distill_core.networks.layouts import LAYOUTS
from distill_core.pruning.plan import name_map, preset, pruned

from .graphs import PROMPT, RANK, lora, newest, remapped, sampled, save

FORMATS = {
    "kohya": lora("diffusers", "_", "lora_unet_", "lora"),
    "kohya sdxl": lora("ldm", "_", "lora_unet_", "lora"),
    "kohya loha": lora("diffusers", "_", "lora_unet_", "loha"),
    "lycoris lokr": lora("diffusers", "_", "lycoris_", "lokr"),
    "comfyui": lora("ldm", ".", "diffusion_model.", "lora"),
    "comfyui peft": lora("ldm", ".", "diffusion_model.", "peft"),
    "diffusers": lora("diffusers", ".", "unet.", "lora", processor=True),
}
PLANS = {"base": "bk-sdm-base", "tiny": "bk-sdm-tiny", "uneven": "keep down 2:1+0,1,2 mid none up 3,[1,2]:0+1,3"}


@pytest.fixture(scope="module")
def loras(server):
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in FORMATS.items():
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", FORMATS)
def test_lora_then_prune_is_prune_then_remapped_lora(form, plan, loras, server):
    prune = {
        "class_type": "DistillPruneUNetBlocks",
        "inputs": {"model": ["teacher", 0], "preset": "bk-sdm-base", "plan": PLANS[plan]},
    }
    key = f"{form} {plan}"
    result = server.run({
        **PROMPT,
        "prune": prune,
        "stock": {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["teacher", 0], "lora_name": f"{form}.safetensors", "strength_model": 0.7}},
        "baked": {"class_type": "DistillPruneUNetBlocks", "inputs": prune["inputs"] | {"model": ["stock", 0]}},
        "remap": remapped(f"{form}.safetensors", strength_model=0.7),
        "one": save(["baked", 0], f"baked {key}"), "two": save(["remap", 0], f"remapped {key}"),
        "zero": save(["prune", 0], f"without {key}"),
        **(sampled(["remap", 0], f"drawn {key}") if plan == "tiny" else {}),
    })  # fmt: skip
    assert result.succeeded, result.error
    baked, ours, without = (load_file(newest(server, f"{who} {key}_*.safetensors")) for who in ("baked", "remapped", "without"))
    assert baked.keys() == ours.keys()
    changed = 0
    for name, weight in baked.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)
        changed += not torch.equal(weight, without[name])
    assert changed >= len([n for n in baked if "attn" in n and n.endswith("to_q.weight")]) > 0


def test_a_lora_of_diffusers_is_as_strong_as_its_metadata_tells(loras, server):
    """Which the stock loader ignores: there it is compared with the same LoRA in kohya's form, where alpha is a tensor."""
    names = LAYOUTS["diffusers"].from_canonical(teacher_file().architecture.shapes)
    layers = [path.removesuffix(".weight") for path in names.values() if path.endswith(("attn1.to_q.weight", "ff.net.2.weight"))]
    alphas = {layer: 12.0 if layer.endswith("to_q") else 2.0 for layer in layers}
    last = next(layer for layer in layers if layer.startswith("up_blocks.1.attentions.2") and layer.endswith("to_q"))
    alphas[last] = 40.0
    theirs, kohyas = {}, {}
    for layer in layers:
        name = f"lora_unet_{layer.replace('.', '_')}"
        matrices = {key.split(".")[-2]: FORMATS["kohya"][key] for key in FORMATS["kohya"] if key.startswith(f"{name}.lora")}
        theirs |= {f"unet.{layer}.lora_A.weight": matrices["lora_down"], f"unet.{layer}.lora_B.weight": matrices["lora_up"]}
        kohyas |= {f"{name}.{matrix}.weight": tensor for matrix, tensor in matrices.items()}
        kohyas[f"{name}.alpha"] = torch.tensor(alphas[layer])
    told = {"unet.r": RANK, "unet.lora_alpha": 2, "unet.alpha_pattern": {last: 40, "to_q": 12}, "unet.rank_pattern": {}}
    save_file(theirs, loras / "metadata.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    save_file(kohyas, loras / "alphas.safetensors")
    prune = {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["teacher", 0], "preset": "bk-sdm-base"}}
    result = server.run({
        **PROMPT, "prune": prune,
        "stock": {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["teacher", 0], "lora_name": "alphas.safetensors", "strength_model": 1.0}},
        "baked": {"class_type": "DistillPruneUNetBlocks", "inputs": prune["inputs"] | {"model": ["stock", 0]}},
        "remap": remapped("metadata.safetensors"),
        "one": save(["baked", 0], "alphas"), "two": save(["remap", 0], "metadata"), "zero": save(["prune", 0], "no lora"),
    })  # fmt: skip
    assert result.succeeded, result.error
    baked, ours, without = (load_file(newest(server, f"{who}_*.safetensors")) for who in ("alphas", "metadata", "no lora"))
    for name, weight in baked.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)
    assert sum(not torch.equal(weight, without[name]) for name, weight in baked.items()) > 10


def test_pruning_takes_the_weights_of_its_own_model_whichever_was_drawn_with_last(loras, server):
    """ComfyUI's clones share one network, which holds the patches of the last that was loaded."""
    stock = {"class_type": "LoraLoaderModelOnly",
             "inputs": {"model": ["teacher", 0], "lora_name": "kohya.safetensors", "strength_model": 0.7}}  # fmt: skip
    files = {}
    for drawn in ("teacher", "stock"):
        prompts = {
            who: {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": [who, 0], "preset": "bk-sdm-small"}}
            for who in ("teacher", "stock")
        }
        # One prompt draws, the next prunes both.
        assert server.run({**PROMPT, "stock": stock, **sampled([drawn, 0], f"drawn {drawn}", seed=7)}).succeeded
        graph = {**PROMPT, "stock": stock}
        for who, node in prompts.items():
            graph |= {f"p {who}": node, f"s {who}": save([f"p {who}", 0], f"last {drawn} {who}")}
        assert server.run(graph).succeeded
        files[drawn] = {who: load_file(newest(server, f"last {drawn} {who}_*.safetensors")) for who in prompts}
    for who in ("teacher", "stock"):
        one, two = (files[drawn][who] for drawn in ("teacher", "stock"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    names = files["teacher"]["teacher"].keys()
    assert any(not torch.equal(files["teacher"]["teacher"][n], files["teacher"]["stock"][n]) for n in names)
    original = teacher_file()
    ours = {canonical: files["stock"]["teacher"][name] for canonical, name in LAYOUTS["ldm"].from_canonical(
        pruned(original.architecture, name_map(original.architecture, preset("bk-sdm-small"))).shapes).items()}  # fmt: skip
    expected = name_map(original.architecture, preset("bk-sdm-small")).apply(original.state_dict)
    assert all(torch.equal(ours[name], weight.float()) for name, weight in expected.items())


def test_the_remapped_lora_can_be_kept_and_loaded_by_stock_nodes(loras, server):
    result = server.run({
        **PROMPT,
        "remap": remapped("kohya.safetensors"),
        "keep": {"class_type": "SaveLoRA", "inputs": {"lora": ["remap", 2], "prefix": "loras/remapped"}},
        "load": {"class_type": "LoraModelLoader",
                 "inputs": {"model": ["prune", 0], "lora": ["remap", 2], "strength_model": 1.0, "bypass": False}},
        "one": save(["remap", 0], "kept one"), "two": save(["load", 0], "kept two"),
    })  # fmt: skip
    assert result.succeeded, result.error
    one, two = (load_file(newest(server, f"kept {n}_*.safetensors")) for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert load_file(newest(server, "loras/remapped*.safetensors"))


@pytest.mark.parametrize("change,message", [
    ({"teacher": ["prune", 0], "student": ["teacher", 0]}, "do not match"),
    ({"lora_name": "other.safetensors"}, "made for another model|not made for the teacher"),
    ({"lora_name": "damaged.safetensors"}, "lora_up.weight holds NaN or Inf"),
])  # fmt: skip
def test_what_does_not_fit_is_one_clear_sentence(change, message, loras, server):
    import re

    save_file({"lora_unet_input_blocks_40_1_proj_in.lora_up.weight": torch.ones(2, 2)}, loras / "other.safetensors")
    damaged = {name: tensor * float("nan") if "lora_up" in name else tensor for name, tensor in FORMATS["kohya"].items()}
    save_file(damaged, loras / "damaged.safetensors")
    result = server.run(
        {**PROMPT, "remap": remapped(**{"lora_name": "kohya.safetensors"} | change), "x": save(["remap", 0], "x")}
    )
    assert re.search(message, result.error) and "\n" not in result.error
