"""Transformers that are taught again after the cut: gradients that are right, and the node that does it."""

import pytest
import torch
from safetensors.torch import load_file

from distill_core.networks.network import open_network
from distill_core.networks.transformers.architecture import FAMILIES
from distill_core.pruning.plan import plan_in

from .graphs import PROMPT, newest, sampled, save

pytestmark = pytest.mark.comfy

WRITE_OVER = {"flux1", "flux2", "hunyuan"}
"""Families whose blocks add to the tensor that they are given."""


def test_images_as_videos_of_one_frame_are_data_like_others(found):
    told = found("healing.frames")
    assert told["framed"] and told["flat"] and told["back"] < 1e-5
    assert "or of one frame each, got (1, 16, 4, 8, 8)" in told["video"]
    assert told["decoded"] == [2, 16, 1, 8, 8] and told["images"] == [2, 3, 64, 64]


def test_gradients_of_families_that_learn_are_those_of_differences(found):
    told = found("healing.gradients")
    learn = {name for name, family in FAMILIES.items() if family.learns}
    assert learn <= {*told} and WRITE_OVER <= learn
    for family in learn:
        right, checkpointed, as_it_is = (told[family][how] for how in ("right", "checkpointed", "as it is"))
        assert right < 1e-3 and checkpointed < 1e-3, (family, right, checkpointed)
        assert (isinstance(as_it_is, str) or as_it_is > 1e-3) == (family in WRITE_OVER), (family, as_it_is)
    refused = {family: told[family]["right"] for family in told.keys() - learn}
    assert all(isinstance(slope, str) or slope > 1e-3 for slope in refused.values()), refused


def test_a_folded_block_is_compared_with_its_run_as_a_plain_computation_has_it(found):
    told = found("healing.local")
    assert told.keys() == {name for name, family in FAMILIES.items() if family.learns}
    for family, off in told.items():
        assert off["value"] < 1e-5 and off["slope"] < 1e-2, (family, off)
    assert {family for family, off in told.items() if off["streams"] == 2} == {"qwen-image", "sd3"}


def test_what_fits_is_forecast_at_true_shape(found):
    told = found("forecasting.of_true_shape")
    for model, (whole, local) in {"Flux.1 dev": (24e9, 16e9), "Z-Image": (12e9, 12e9)}.items():
        for way, most in (("output", whole), ("local", local)):
            moment, parts, counted = told[model]["fp8"][way]
            assert parts["student weights"] == counted["student weights"], (model, way)
            assert counted["student weights"] < sum(parts.values()) < most, (model, way, parts)
            assert moment == ("a local step" if way == "local" else "the student's forward and backward pass")


def test_captions_of_several_lengths_are_learnt_apart(found):
    told = found("healing.data")
    assert told["buckets"] == [[2, 5], [3, 7]] and told["kept apart"] == [True, True]
    assert told["one, null of one length"] == 1
    for case in ("both, null of one length", "one, null of another", "both, null of another"):
        assert "encoded to different lengths" in told[case] and "leave null_caption unconnected" in told[case], case


@pytest.fixture
def small_flux(server, in_comfyui):
    path = server.base / "models" / "diffusion_models" / "healed_flux.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    in_comfyui("cutting.write_small_flux", path)
    yield path.name
    path.unlink()


def healed(name, run_name, **changes):
    """Cut a small Flux.1, and teach it on pictures that it makes."""
    text = {key: PROMPT[key] for key in ("teacher", "prompt", "empty")}
    inputs = {"teacher": ["whole", 0], "student": ["prune", 0], "latents": ["sample made", 0], "captions": ["prompt", 0],
              "null_caption": ["empty", 0], "total_steps": 12, "steps_per_queue": 6, "batch_size": 2, "learning_rate": 3e-3,
              "lr_schedule": "constant", "objective": "output", "seed": 0, "caption_dropout": 0.1, "warmup_steps": 0, "save_every_steps": 4,
              "lora_rank": 8, "run_name": run_name}  # fmt: skip
    return {
        **text,
        "noise": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "whole": {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}},
        **sampled(["whole", 0], "made", steps=2, cfg=1.0, scheduler="simple"),
        "prune": {
            "class_type": "DistillPruneTransformerBlocks",
            "inputs": {"model": ["whole", 0], "preset": "flux-mini", "plan": "keep double 0,3 fold single 1-3"},
        },
        "heal": {"class_type": "DistillTrainStep", "inputs": inputs | changes},
        "save": save(["heal", 0], f"diffusion_models/{run_name}", dtype="as it is"),
    }  # fmt: skip


def losses(server, run_name, term="output"):
    rows = (server.output / "distill_runs" / run_name / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index(term)
    return [float(value) for row in rows[1:] if (value := row.split(",")[place])]


def test_a_cut_transformer_is_taught_saved_and_opened_by_the_stock_loader(server, small_flux):
    teacher = (server.base / "models" / "diffusion_models" / small_flux).read_bytes()
    drawing = dict(steps=2, cfg=1.0, scheduler="simple")
    for _ in range(2):  # twelve steps, six at a time
        result = server.run({**healed(small_flux, "healed"), **sampled(["heal", 0], "healed now", **drawing),
                             **sampled(["prune", 0], "cut only", **drawing)})  # fmt: skip
        assert result.succeeded, result.error
    found = losses(server, "healed")
    assert len(found) == 12 and sum(found[-3:]) < 0.8 * sum(found[:3])
    assert "The most memory is needed in the student's forward and backward pass" in server.log.read_text()
    student = newest(server, "diffusion_models/healed_*.safetensors")
    plan = plan_in(open_network(student).metadata)
    assert plan.name == "keep double 0,3 fold single 1-3" and plan.fold == {"single": ((1, 3),)}
    opened = {"class_type": "UNETLoader", "inputs": {"unet_name": student.name, "weight_dtype": "default"}}
    text = {key: PROMPT[key] for key in ("teacher", "prompt", "empty")}
    noise = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}}
    again = server.run({**text, "noise": noise, "student": opened, **sampled(["student", 0], "healed stock", **drawing)})
    assert again.succeeded, again.error
    now, cut, stock = (
        load_file(newest(server, f"{name}_*.latent"))["latent_tensor"] for name in ("healed now", "cut only", "healed stock")
    )
    torch.testing.assert_close(stock, now, rtol=0, atol=1e-4)
    assert not torch.allclose(now, cut, atol=1e-3)
    assert (server.base / "models" / "diffusion_models" / small_flux).read_bytes() == teacher


def test_a_run_in_two_parts_is_the_run_in_one(server, small_flux):
    for run_name, changes, times in (("in one", {"steps_per_queue": 12}, 1), ("in two", {}, 2)):
        for _ in range(times):
            result = server.run(healed(small_flux, run_name, objective="blocks", local_steps=8, **changes))
            assert result.succeeded, result.error
    one, two = (server.output / "distill_runs" / name for name in ("in one", "in two"))
    ours, theirs = (load_file(folder / "checkpoints" / "00000012" / "lora.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()


def test_folded_blocks_learn_locally_before_the_student_learns_as_a_whole(server, small_flux):
    for run_name, how in (("local", {"objective": "local"}), ("local then whole", {"local_steps": 6})):
        graph = healed(small_flux, run_name, steps_per_queue=12, **how)
        result = server.run(graph)
        assert result.succeeded, result.error
    local = losses(server, "local", "local")
    assert len(local) == 12 and sum(local[-3:]) < 0.9 * sum(local[:3])
    assert losses(server, "local then whole", "local")[:6] == local[:6]
    assert len(losses(server, "local then whole", "output")) == 6
    of_blocks, of_all = (
        load_file(server.output / "distill_runs" / name / "checkpoints" / "00000012" / "lora.safetensors")
        for name in ("local", "local then whole")
    )
    assert {key.split(".")[2] for key in of_blocks} == {"1"} and {key.split(".")[1] for key in of_blocks} == {"single_blocks"}
    assert of_blocks.keys() < of_all.keys()


def test_a_transformer_makes_its_own_data(server, small_flux):
    made = {"teacher": ["whole", 0], "clip": ["teacher", 1], "prompts": "a cat, flat\ntwo red apples left of a cat, flat", "name": "of a flux",
            "width": 64, "height": 64, "images_per_prompt": 2, "steps": 2, "guidance": 1.0, "seed": 0, "trajectory_states": 0,
            "batch_size": 3}  # fmt: skip
    graph = healed(
        small_flux, "own data", latents=["data", 0], captions=["data", 1], null_caption=["data", 2], steps_per_queue=12
    )
    graph["data"] = {"class_type": "DistillTeacherDataset", "inputs": made}
    result = server.run(graph)
    assert result.succeeded, result.error
    found = losses(server, "own data")
    assert len(found) == 12 and sum(found[-3:]) < 0.8 * sum(found[:3])
    graph["data"] = {"class_type": "DistillTeacherDataset", "inputs": made | {"guidance": 3.0, "prompts": "a dog, flat"}}
    graph["heal"]["inputs"]["run_name"] = "own data guided"
    assert server.run(graph).succeeded


def test_what_cannot_be_taught_says_why(server, small_flux):
    for changes, message in (
        ({"objective": "bk-sdm"}, "objective bk-sdm compares layers of UNets; for a transformer choose blocks, output or local"),
        ({"teacher_2": ["whole", 0]}, "a transformer learns from one teacher, with which it shares its weights"),
        ({"student": ["whole", 0]}, "the student has all blocks of its teacher, so there is nothing to learn"),
        ({"student": ["heal again", 0]}, "the student holds other weights than its teacher"),
        ({"teacher": ["prune", 0]}, "the student has all blocks of its teacher"),
        ({"student": ["removed", 0], "objective": "local"}, "the student's plan folds no run of blocks"),
        ({"student": ["removed", 0], "local_steps": 3}, "the student's plan folds no run of blocks"),
    ):
        graph = healed(small_flux, "refused", **changes)
        if "heal again" in str(changes):
            graph["heal again"] = {
                "class_type": "ModelMergeSimple",
                "inputs": {"model1": ["prune", 0], "model2": ["prune two", 0], "ratio": 0.5},
            }
            graph["prune two"] = {
                "class_type": "DistillPruneTransformerBlocks",
                "inputs": {"model": ["whole", 0], "preset": "flux-mini", "plan": "keep double 1,2 single 1,2,4"},
            }
        if "removed" in str(changes):
            graph["removed"] = {
                "class_type": "DistillPruneTransformerBlocks",
                "inputs": {"model": ["whole", 0], "preset": "flux-mini", "plan": "keep double 1,2 single 1,2,4"},
            }
        error = server.run(graph).error
        assert message in error, (message, error)
