"""The router against stock nodes, in ComfyUI's own samplers."""

import psutil
import pytest
import torch
from safetensors.torch import load_file

from distill_core.demo.teacher import teacher_file
from distill_core.diffusion.ranges import TimestepRanges
from distill_core.networks.files import save_unet
from distill_core.routing.experts import write_experts

from .graphs import PROMPT, newest, sampled, save


def test_routed_sampling_equals_two_samplers_that_hand_over_at_the_boundary(found):
    """Exactly: whatever is done with the models, before the router or behind it."""
    differences = found("routing.equalities")
    assert len(differences) > 20
    assert {name: difference for name, difference in differences.items() if difference != 0} == {}


def test_the_model_is_chosen_by_noise_level_not_by_step(found):
    for sampler, evaluations, boundaries in found("routing.choices"):
        for sigma, number in evaluations:
            assert number == sum(sigma <= boundary for boundary in boundaries), (sampler, sigma)
        assert {number for _, number in evaluations} == {0, 1}, sampler
        assert len(evaluations) > 4 or sampler in ("euler", "dpmpp_2m"), sampler


def test_every_sampler_and_scheduler_runs_that_runs_without_the_router(found):
    told = found("routing.every_sampler")
    assert told["tried"] > 300
    assert told["routed"].keys() - told["plain"].keys() == set()


def test_high_and_low_noise_experts_of_a_flow_family_hand_over(found):
    told = found("routing.experts")
    assert told["kinds"] == ["WAN21"] and told["not one alone"] > 0.1
    # Between two samplers a flow's latent is scaled and back, which rounds; the router does not.
    assert told["half"] < 1e-4 and told["shift behind the router"] < 1e-4
    assert "sigma 1 to 0.8889, timesteps 1000 to 888.9" in told["ranges"]


WORDS = {
    "routed": "model_2 is routed itself",
    "flow": "a flow model and a diffusion model",
    "zsnr": "noise levels differ, 0.02917 to 4519",
    "wider": "context_dim 1024 versus context_dim 64",
    "guidance": "sampler_cfg_function",
    "whole sampling": "outer_sample",
    "order": "from noisy to clean",
    "count": "2 models need one fewer boundary (1)",
    "LoRA behind the router": "different shapes",
    "prune": "holds several models",
}


def test_models_that_do_not_go_together_are_refused_with_the_reason(found):
    said = found("routing.refusals")
    assert said.keys() == WORDS.keys()
    for name, (kind, message) in said.items():
        assert kind == "ValueError" and WORDS[name] in message, (name, message)


def test_the_models_stay_as_they_are_whatever_happens(found):
    told = found("routing.untouched")
    assert told["stopped"] and told["finite"]
    assert told["before"] == told["after"]
    assert told["same"], "something is drawn differently after routed samplings"


MODELS = {"models.model_1": ["teacher", 0], "models.model_2": ["prune", 0]}
SHARE = {"split": "share", "split.share": 0.5}


def routed(**changes):
    return {"class_type": "DistillTimestepRouter", "inputs": MODELS | SHARE | changes}


def test_the_two_nodes_draw_the_same_and_tell_the_same(server):
    sampler = {"positive": ["prompt", 0], "negative": ["empty", 0], "latent_image": ["noise", 0], "seed": 5, "steps": 6, "cfg": 2.0,
               "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}  # fmt: skip
    prompt = {
        **PROMPT,
        "router": routed(),
        **sampled(["router", 0], "by_router", **sampler),
        "all": {"class_type": "DistillTimestepRouterSampler", "inputs": MODELS | SHARE | sampler},
        "keep": {"class_type": "SaveLatent", "inputs": {"samples": ["all", 0], "filename_prefix": "all_in_one"}},
        "tell": {"class_type": "PreviewAny", "inputs": {"source": ["router", 1]}},
    }
    result = server.run(prompt)
    assert result.succeeded, result.error
    latents = [load_file(newest(server, f"{name}*.latent"))["latent_tensor"] for name in ("by_router", "all_in_one")]
    assert torch.equal(*latents) and latents[0].std() > 0.1
    (ranges,) = result.outputs["tell"]["text"]
    first, second = ranges.splitlines()
    assert first.startswith("model_1: 0% to 50% of the sampling, sigma 14.61 to 1.6") and "timesteps 999 to 500" in first
    assert second.startswith("model_2: 50% to 100% of the sampling")
    assert len(result.outputs["all"]["images"]) == 1


def test_boundaries_are_read_in_every_unit_and_order(server):
    three = {"models.model_3": ["teacher", 0], "split": "boundaries"}
    told = []
    for boundaries in ("75%, 25%", "749.25, 249.75"):
        prompt = {**PROMPT, "router": routed(**three, **{"split.boundaries": boundaries}),
                  "tell": {"class_type": "PreviewAny", "inputs": {"source": ["router", 1]}}}  # fmt: skip
        result = server.run(prompt)
        assert result.succeeded, result.error
        told.append(result.outputs["tell"]["text"])
    assert told[0] == told[1]
    assert "model_2: 25% to 75%" in told[0][0]


def test_a_students_folder_samples_as_its_models_do(server, tmp_path):
    prompt = {**PROMPT, "save": save(["prune", 0], "diffusion_models/routed")}
    assert server.run(prompt).succeeded
    student = newest(server, "diffusion_models/routed*")
    save_unet(tmp_path / "teacher.safetensors", teacher_file().state_dict, teacher_file().architecture)
    folder = server.output / "distill_runs" / "two of them" / "experts"
    folder.mkdir(parents=True)
    write_experts(folder, TimestepRanges((400.0,)), [student, tmp_path / "teacher.safetensors"], teacher="")
    sampler = {"positive": ["prompt", 0], "negative": ["empty", 0], "latent_image": ["noise", 0], "seed": 5, "steps": 6, "cfg": 2.0,
               "sampler_name": "heun", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    boundary = {"split": "boundaries", "split.boundaries": "400"}
    chosen = {"split": "experts folder", "split.experts": "two of them"}
    prompt = {**PROMPT}
    for name, inputs in {
        "models": {"models.model_1": ["prune", 0], "models.model_2": ["teacher", 0], **boundary},
        "folder": chosen,
    }.items():
        prompt |= {
            name: {"class_type": "DistillTimestepRouterSampler", "inputs": inputs | sampler},
            f"keep {name}": {"class_type": "SaveLatent", "inputs": {"samples": [name, 0], "filename_prefix": f"of_{name}"}},
        }
    result = server.run(prompt)
    assert result.succeeded, result.error
    latents = [load_file(newest(server, f"of_{name}*.latent"))["latent_tensor"] for name in ("models", "folder")]
    assert torch.equal(*latents)
    prompt["folder"]["inputs"] |= MODELS
    assert "has its own models" in server.run(prompt).error


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [("", "need one fewer boundary (1)"), ("50%, 25%", "need one fewer boundary (1)"), ("half", "must be numbers")],
)
def test_boundaries_that_cannot_be_are_refused(boundaries, words, server):
    prompt = {**PROMPT, "router": routed(split="boundaries", **{"split.boundaries": boundaries}),
              "tell": {"class_type": "PreviewAny", "inputs": {"source": ["router", 1]}}}  # fmt: skip
    assert words in server.run(prompt).error


def test_fifty_routed_samplings_leave_memory_where_it_was(server):
    process, used = psutil.Process(server.process.pid), []
    for number in range(50):
        prompt = {
            **PROMPT,
            "router": routed(**{"split.share": 0.3 + number / 100}),
            **sampled(["router", 0], "again", seed=number),
        }
        result = server.run(prompt)
        assert result.succeeded, result.error
        used.append(process.memory_info().rss)
    grown = max(used[-10:]) - max(used[10:20])
    assert grown < 10 << 20, f"memory grew by {grown / 2**20:.1f} MiB over 30 samplings"
