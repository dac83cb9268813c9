"""Transformers, cut: of true shape without weights, and small ones that compute."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distill_core.networks.network import open_network
from distill_core.pruning.plan import all_preset_names, plan_in, preset

from .graphs import PROMPT, newest, sampled, save

pytestmark = pytest.mark.comfy

PARAMETERS = {
    "Flux.1 dev": 11_901_408_320,
    "Flux.2 dev": 32_223_281_152,
    "Flux.2 klein 9B": 9_078_581_248,
    "Flux.2 klein 4B": 3_875_544_576,
    "Qwen-Image": 20_430_401_088,
    "Z-Image": 6_154_908_736,
    "Lumina 2": 2_609_769_152,
    "Wan 1.3B": 1_418_996_800,
    "Wan 14B": 14_288_491_584,
    "Wan 2.2 5B": 4_999_787_712,
    "HunyuanVideo": 12_821_012_544,
    "HunyuanVideo 1.5": 8_326_608_160,
    "HunyuanImage 2.1": 17_425_795_520,
    "Wan 14B I2V": 16_394_878_784,
    "LTX-Video 2B": 1_923_385_472,
    "HiDream": 17_105_733_184,
    "LTX-Video 13B": 13_042_569_344,
    "LTX-2": 19_585_115_392,
    "Cosmos-Predict2 2B": 1_956_405_248,
    "Anima": 2_091_068_928,
    "Krea 2": 12_820_073_036,
    "SD3.5 large": 8_056_627_520,
    "SD3.5 medium": 2_243_171_520,
}
STUDENTS = {
    ("Flux.1 dev", "flux-1-lite"): 8_163_264_064,
    ("Flux.1 dev", "flux-mini"): 3_179_199_552,
    ("Qwen-Image", "qwen-image-12b"): 11_934_618_688,
    ("Qwen-Image", "qwen-image-13b"): 13_633_775_168,
}


@pytest.fixture(scope="module")
def told(found):
    return found("cutting.of_true_shape")


def test_every_family_is_recognised_with_its_published_size(told):
    assert not [(name, facts["error"]) for name, facts in told.items() if "error" in facts]
    assert {name: told[name]["parameters"] for name in PARAMETERS} == PARAMETERS


def test_every_student_opens_with_nothing_missing_and_nothing_unexpected(told):
    number = 0
    for name, facts in told.items():
        for text, (_, kind, missing, unexpected, different) in facts["students"].items():
            assert (kind, missing, unexpected, different) == (facts["class"], [], [], []), (name, text)
            number += 1
    assert number >= 100


def test_every_preset_for_transformers_was_tried_on_its_teacher(told):
    assert {text for facts in told.values() for text in facts["students"] if not text.startswith(("keep ", "fold "))} == {
        name for name in all_preset_names() if preset(name).depths
    }


def test_published_students_have_their_published_size(told):
    assert {key: told[key[0]]["students"][key[1]][0] for key in STUDENTS} == STUDENTS


# --- small ones that compute


def test_a_student_computes_as_its_teacher_with_the_blocks_skipped(found):
    told = found("cutting.of_small_networks")
    assert len(told) >= 10
    for family, students in told.items():
        assert {text: far for text, (far, _) in students.items() if far} == {} and len(students) >= 4, family
        assert min(moved for _, moved in students.values()) > 0.1, family  # the blocks that are left out matter


@pytest.fixture(scope="module")
def models(in_comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    in_comfyui("cutting.of_models", folder)
    return json.loads((folder / "told.json").read_text())


def test_a_model_is_cut_saved_and_opened_by_every_loader_with_the_same_answers(models):
    forms = ("float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise")
    of_flux = {f"flux1 in {form}" for form in forms}
    assert {*models} == {"flux1", "flux2", "hunyuan", "wan", "wan in float8_e4m3fn", "ltxv", "sd3", "hidream"} | of_flux
    for name, told in models.items():
        stock = {} if name in ("sd3", "hidream") else {"stock": 0, "stock, command": 0}
        assert told["far"] == {"student": 0, "ours": 0, "command": 0, **stock} and told["moved"] > 0.1, name
        assert told["parameters"][0] == told["parameters"][1], name  # two numbers of four bits in a byte are two
        assert ("Load Distilled Model" in told["note"]) == (name in ("sd3", "hidream")), name
        assert told["file unchanged"] and told["teacher as before"], name


@pytest.mark.slow
def test_families_known_by_their_width_are_cut_saved_and_opened_by_the_stock_loader(in_comfyui, tmp_path):
    in_comfyui("cutting.of_true_width", tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    assert {*told} == {"Lumina 2", "Qwen-Image"}
    for name, far in told.items():
        assert far["student"] == far["stock"] == 0 and far["moved"] > 0.01, name


def test_a_student_answers_alike_in_comfyui_and_diffusers(in_comfyui, tmp_path):
    in_comfyui("cutting.across_programs", tmp_path)
    far = json.loads((tmp_path / "told.json").read_text())
    assert far["student / cut in ComfyUI"] == 0 and far["student / teacher"] > 0.01
    assert far["teacher / teacher in diffusers"] < 1e-5 and far["student / student in diffusers"] < 1e-5


def test_a_students_file_keeps_its_plan_and_can_be_cut_again(models):
    for name, told in models.items():
        family, _, form = name.partition(" in ")
        assert told["facts"]["family"] == family and told["facts"]["prediction"] == "flow" and told["plan back"], name
        assert told["facts"]["quantised"] == bool(form) and told["facts"]["pruned_by"].startswith("keep "), name
        assert {*told["cut again"].values()} == {1} and told["reloaded"], name


# --- LoRAs


def test_a_teachers_lora_in_any_spelling_does_the_same_on_the_student(found):
    told = found("cutting.of_loras")
    assert len(told) >= 20 and {name.split(" ")[0] for name in told} == {
        "flux1",
        "flux2",
        "hunyuan",
        "wan",
        "ltxv",
        "sd3",
        "hidream",
    }
    for name, facts in told.items():
        assert facts["far"] == 0 and facts["moved"] > 0.1 and facts["stock far"] > 0.1, name
        assert facts["kept"] and facts["dropped"] and facts["kept"] + facts["dropped"] == facts["layers"], name


def test_no_key_of_a_lora_reaches_another_block(found):
    told = found("cutting.of_lora_keys")
    assert len(told) >= 10
    for family, counts in told.items():
        ours, as_it_is = counts["remapped"], counts["as it is"]
        assert ours["wrong"] == ours["lost"] == 0 and ours["right"] >= 50 and ours["dropped"] >= 50, family
        assert as_it_is["wrong"] >= 50, family  # as stock ComfyUI would read it


# --- compared, routed, and in a graph


def test_models_of_images_are_compared_and_routed_whatever_their_latents(found):
    told = found("cutting.compared")
    assert {*told} == {"flux1", "qwen-image"}
    for family, facts in told.items():
        teacher, student, both = facts["parameters"]
        assert teacher == facts["of network"] and student < teacher and both == teacher + student, family
        assert facts["macs"][1] < facts["macs"][2] < facts["macs"][0] and facts["distances"][1] > 0.1, family
        assert facts["distances"][2] == 0 and facts["routed is"] == [False, False], family  # the teacher where it is in charge
        assert facts["shape"] == [2, 3, 8, 8], family


@pytest.fixture(scope="module")
def small_files(server, in_comfyui):
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    in_comfyui("cutting.write_small", folder)
    yield {"small_flux": "keep double 0,3 single 0,2,4", "small_z_image": "keep layer 0,2"}
    for path in (*folder.glob("small_*"), *(server.output / "diffusion_models").glob("small_*")):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_flux", "small_z_image"])
def test_a_graph_cuts_samples_saves_and_a_stock_loader_draws_the_same(name, small_files, server):
    def opened(file):
        return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}

    cut = {"class_type": "DistillPruneTransformerBlocks",
           "inputs": {"model": ["whole", 0], "preset": "flux-1-lite", "plan": small_files[name]}}  # fmt: skip
    text = {key: PROMPT[key] for key in ("teacher", "prompt", "empty")}
    noise = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    drawing = dict(steps=2, cfg=1.0, scheduler="simple")
    prompt = {
        **text, "noise": noise, "whole": opened(f"{name}.safetensors"), "prune": cut,
        **sampled(["whole", 0], f"{name}_whole", **drawing), **sampled(["prune", 0], f"{name}_cut", **drawing),
        "save": save(["prune", 0], f"diffusion_models/{name}_student", dtype="as it is"),
        "tell": {"class_type": "PreviewAny", "inputs": {"source": ["prune", 1]}},
    }  # fmt: skip
    result = server.run(prompt)
    assert result.succeeded, result.error
    assert "fewer" in result.outputs["tell"]["text"][0]
    student = newest(server, f"diffusion_models/{name}_student*.safetensors")
    again = server.run(
        {**text, "noise": noise, "student": opened(student.name), **sampled(["student", 0], f"{name}_stock", **drawing)}
    )
    assert again.succeeded, again.error
    whole, cut_now, stock = (
        load_file(newest(server, f"{name}_{how}*.latent"))["latent_tensor"] for how in ("whole", "cut", "stock")
    )
    assert torch.equal(cut_now, stock) and not torch.equal(cut_now, whole) and cut_now.isfinite().all()
    assert plan_in(open_network(student).metadata).name == small_files[name]


def test_what_does_nothing_is_found_in_transformers_of_every_family(found):
    told = found("cutting.analysed")
    assert len(told) >= 11
    for family, facts in told.items():
        assert facts["unchanged"] and facts["hooks"] == 0, family
        for criterion, by in facts.items():
            if criterion in ("unchanged", "hooks"):
                continue
            assert by["parts"][0][0] == 0 and by["parts"][1] == [by["parts"][2] - 1] * 2, family
            assert by["report"].startswith(f"Chosen by {criterion}: ") and all(score >= 0 for score in by["scores"].values()), (
                family
            )
            if family not in ("flux1", "qwen-image", "z-image", "sd3"):
                assert min(by["scores"].values()) > 1e-3 and min(by["errors"].values()) > 1e-3, (family, criterion)
                continue
            idle = [score for run, score in by["scores"].items() if run.endswith(" 2-3")]
            busy = [score for run, score in by["scores"].items() if not run.endswith((" 1-2", " 2-3"))]
            assert max(idle) < 1e-6 and min(busy) > 1e-2 and by["errors"][criterion] < 1e-6, (family, criterion)
            assert by["errors"]["their places alone"] > 1e-2, family


def test_a_graph_analyses_cuts_and_saves(server, small_files):
    whole = {"class_type": "UNETLoader", "inputs": {"unet_name": "small_flux.safetensors", "weight_dtype": "default"}}
    noise = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}}
    analysis = {"model": ["whole", 0], "latents": ["sample own", 0], "captions": ["prompt", 0], "saving": 0.2, "longest_run": 3,
                "criterion": "output error", "first_stay": 1, "last_stay": 1, "num_timesteps": 2, "num_examples": 2, "num_tokens": 64,
                "seed": 0}  # fmt: skip
    cut = {"model": ["whole", 0], "preset": "flux-1-lite", "plan": ["analyse", 0]}
    prompt = {
        **{key: PROMPT[key] for key in ("teacher", "prompt", "empty")}, "noise": noise, "whole": whole,
        **sampled(["whole", 0], "own", steps=2, cfg=1.0, scheduler="simple"),
        "analyse": {"class_type": "DistillAnalyseTransformerBlocks", "inputs": analysis},
        "prune": {"class_type": "DistillPruneTransformerBlocks", "inputs": cut},
        "save": save(["prune", 0], "diffusion_models/small_analysed", dtype="as it is"),
    }  # fmt: skip
    result = server.run(prompt)
    assert result.succeeded, result.error
    text = result.outputs["analyse"]["text"][0]
    assert text.startswith("Chosen by output error: ") and "For comparison by linear replaceability" in text
    plan = plan_in(open_network(newest(server, "diffusion_models/small_analysed*.safetensors")).metadata)
    assert plan.fold and plan.name == text.splitlines()[1].strip()
    images = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    for changes, message in (
        ({"latents": ["noise", 0]}, "the latents are empty; connect images that the model should make well"),
        ({"saving": 0.9}, "of the parameters at most, not 90%; ask for less"),
        ({"first_stay": 50, "last_stay": 50}, "has no two blocks in a row that may be folded"),
        ({"captions": ["two", 0]}, "there are 1 latents but 2 captions"),
        ({"model": ["teacher", 0]}, "this MODEL is a UNet (SD1.x-shaped"),
    ):
        wrong = prompt | {"analyse": {**prompt["analyse"], "inputs": analysis | changes}}
        if "captions" in changes:
            wrong |= {"noise": images, "two": {"class_type": "ConditioningCombine",
                      "inputs": {"conditioning_1": ["prompt", 0], "conditioning_2": ["empty", 0]}}}  # fmt: skip
        error = server.run(wrong).error
        assert message in error, (message, error)


def test_each_door_names_the_other(server, small_files):
    whole = {"class_type": "UNETLoader", "inputs": {"unet_name": "small_flux.safetensors", "weight_dtype": "default"}}
    wrong = {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["whole", 0], "preset": "bk-sdm-base"}}
    error = server.run({"whole": whole, "prune": wrong, **_save("prune")}).error
    assert "this MODEL is a transformer (Flux.1)" in error and "Prune Transformer Blocks" in error
    wrong = {"class_type": "DistillPruneTransformerBlocks", "inputs": {"model": ["teacher", 0], "preset": "flux-mini"}}
    error = server.run({"teacher": PROMPT["teacher"], "prune": wrong, **_save("prune")}).error
    assert "this MODEL is a UNet (SD1.x-shaped (context width 64))" in error and "Prune UNet Blocks" in error
    deep = {"class_type": "DistillPruneTransformerBlocks", "inputs": {"model": ["whole", 0], "preset": "flux-mini"}}
    error = server.run({"whole": whole, "prune": deep, **_save("prune")}).error
    assert "flux-mini is a plan for Flux.1 with 19 doubles and 38 singles, but this one has 4 doubles and 5 singles" in error


def _save(node):
    return {"save": save([node, 0], "refused")}
