"""Train Timestep Experts and Load Timestep Experts in a running ComfyUI, on the demo."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from distill_core.base.storage import read_header
from distill_core.demo.teacher import teacher_file
from distill_core.networks.files import open_unet
from distill_core.routing.experts import Experts

from .graphs import PROMPT, TRAIN, newest, recipe, rows, same, sampled, until

SETTINGS = {"count": 3, "split": "timesteps", "boundaries": "", "overlap": 0, "joint_steps": 0, "lora_rank": 0, "total_steps": 2,
            "steps_per_queue": 100, "save_every_steps": 1, "lr_schedule": "constant"}  # fmt: skip


def experts(run_name, **changes):
    return {"class_type": "DistillTrainExperts", "inputs": TRAIN | SETTINGS | {"run_name": run_name} | changes}


def shown(what, prefix):
    return {"class_type": "PreviewAny", "inputs": {"source": what}, "_meta": {"title": prefix}}


def trained(server, run_name, nodes=(), **changes):
    """Queue a training, draw with what comes out; returns its folder and what the node told: folder, ranges, step."""
    texts = {name: shown(["train", place], name) for name, place in (("folder", 1), ("ranges", 2), ("step", 4))}
    prompt = {
        **PROMPT,
        **dict(nodes),
        "train": experts(run_name, **changes),
        **texts,
        **sampled(["train", 0], run_name, steps=6),
    }
    result = server.run(prompt)
    assert result.succeeded, result.error
    return server.output / "distill_runs" / run_name, {name: result.outputs[name]["text"][0] for name in texts}


def drawn(server, prefix):
    return load_file(newest(server, f"{prefix}_*.latent"))["latent_tensor"]


def drawn_by(server, nodes, model, prefix):
    result = server.run({**PROMPT, **nodes, **sampled(model, prefix, steps=6)})
    assert result.succeeded, result.error
    return drawn(server, prefix)


@pytest.fixture(scope="module")
def in_one(server):
    """Three experts trained in one go: folder, what the node told."""
    return trained(server, "experts in one")


def test_each_range_has_a_student_of_its_own(in_one):
    folder, told = in_one
    found = Experts.read(folder / "experts")
    assert told["folder"] == str(folder / "experts") and told["step"] == "6"
    assert found.ranges.boundaries == (665.0, 332.0) and len(found.files) == 3
    first, *others = [open_unet(path).state_dict for path in found.files]
    assert not any(same(first, other) for other in others)
    assert all({"distill.plan", "distill.skips"} <= open_unet(path).origin.keys() for path in found.files)  # for ControlNets
    for number in range(3):
        measured = {name for row in rows(folder / f"range_{number}") for name in row if name.startswith("timesteps/")}
        held = found.ranges.timesteps(number)
        assert measured and all(int(n.split("/")[1].split("-")[0]) in range(held[0] // 100 * 100, held[-1] + 1) for n in measured)
    lines = told["ranges"].splitlines()
    assert lines[0].startswith("0: timesteps 999 to 666, 0% to 33% of the sampling, sigma") and lines[2].startswith(
        "2: timesteps 332 to 0"
    )


def test_the_model_is_the_students_through_the_router(in_one, server):
    folder, _ = in_one
    place = server.base / "models" / "diffusion_models"
    place.mkdir(parents=True, exist_ok=True)
    nodes = {}
    for number, file in enumerate(Experts.read(folder / "experts").files):
        shutil.copy(file, place / f"of_range_{number}.safetensors")
        nodes[f"student {number}"] = {
            "class_type": "DistillLoadDistilledModel",
            "inputs": {"name": f"of_range_{number}.safetensors"},
        }
    nodes["route"] = {
        "class_type": "DistillTimestepRouter",
        "inputs": {f"models.model_{number + 1}": [f"student {number}", 0] for number in range(3)}
        | {"split": "boundaries", "split.boundaries": "665, 332"},
    }
    by_hand = drawn_by(server, nodes, ["route", 0], "by hand")
    alone = drawn_by(server, nodes, ["student 2", 0], "alone")
    assert torch.equal(drawn(server, "experts in one"), by_hand) and not torch.equal(by_hand, alone)


def test_trained_folders_are_loaded_by_their_run(in_one, server):
    nodes = {"load": {"class_type": "DistillLoadExperts", "inputs": {"name": "experts in one"}}}
    assert torch.equal(drawn_by(server, nodes, ["load", 0], "loaded"), drawn(server, "experts in one"))


def test_with_keep_best_the_model_is_of_the_best_steps_as_the_folder_is(server):
    kept = {"recipe": recipe(validate_every_steps=1, keep_best=1, validation_share=0.05)}
    wild = {"learning_rate": 0.02, "count": 2, "joint_steps": 3, "total_steps": 3}  # it only gets worse
    folder, _ = trained(server, "the best experts", kept, recipe=["recipe", 0], **wild)
    losses = [row["validation"] for row in rows(folder / "joint")]
    assert min(losses) < losses[-1]
    nodes = {"load": {"class_type": "DistillLoadExperts", "inputs": {"name": "the best experts"}}}
    assert torch.equal(drawn_by(server, nodes, ["load", 0], "the best loaded"), drawn(server, "the best experts"))


@pytest.mark.parametrize("run_exists,name", [(False, "demo/three"), (True, "diffusion_models/experts in one")])
def test_a_folder_that_was_moved_among_the_models_is_loaded(run_exists, name, in_one, server):
    """Also one that has the name of a run, which is another's."""
    place = server.base / "models" / "diffusion_models" / ("experts in one" if run_exists else "demo/three")
    shutil.copytree(in_one[0] / "experts", place)
    nodes = {"load": {"class_type": "DistillLoadExperts", "inputs": {"name": name}}}
    prefix = f"moved to {place.name}"
    assert torch.equal(drawn_by(server, nodes, ["load", 0], prefix), drawn(server, "experts in one"))


def test_queued_in_parts_it_comes_to_the_same(in_one, server):
    told = [trained(server, "experts in parts", steps_per_queue=3)[1] for _ in range(2)]
    assert [entry["step"] for entry in told] == ["3", "6"] and told[0]["folder"] == ""
    folders = [server.output / "distill_runs" / name / "experts" for name in ("experts in one", "experts in parts")]
    for one, parts in zip(*(Experts.read(folder).files for folder in folders), strict=True):
        assert same(load_file(one), load_file(parts))
    before = {path: path.stat().st_mtime_ns for path in folders[1].parent.rglob("*")}
    prompt = {
        **PROMPT,
        "train": experts("experts in parts", steps_per_queue=3),
        **sampled(["train", 0], "experts in parts", steps=6),
    }
    assert "train" in server.run(prompt).cached
    assert before == {path: path.stat().st_mtime_ns for path in folders[1].parent.rglob("*")}


def test_cancelled_in_the_second_range_it_goes_on_there(server):
    long = {"count": 2, "total_steps": 40, "save_every_steps": 1000}
    folder = server.output / "distill_runs" / "experts stopped"
    prompt_id = server.queue({**PROMPT, "train": experts("experts stopped", **long), **sampled(["train", 0], "experts stopped")})
    metrics = folder / "range_1" / "metrics.csv"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, "the second range was not begun")
    server.post("interrupt", {})
    assert server.wait(prompt_id).interrupted
    done = len(rows(folder / "range_1"))
    assert 5 <= done < 40 and not (folder / "experts").exists()
    written = {path: path.stat().st_mtime_ns for path in (folder / "range_0" / "checkpoints").rglob("*")}
    trained(server, "experts stopped", **long)
    assert len(rows(folder / "range_1")) == 40 and len(Experts.read(folder / "experts").files) == 2
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "range_0" / "checkpoints").rglob("*")}


def test_before_the_students_part_the_model_is_the_one_they_begin_as(server):
    folder, told = trained(server, "experts measured", joint_steps=4, split="error", steps_per_queue=3)
    assert told["ranges"] == "measured after joint_steps" and told["step"] == "3"
    file = folder / "joint" / "checkpoints" / "00000003" / "student.safetensors"
    shutil.copy(file, server.base / "models" / "diffusion_models" / "joint.safetensors")
    nodes = {"load": {"class_type": "DistillLoadDistilledModel", "inputs": {"name": "joint.safetensors"}}}
    assert torch.equal(drawn_by(server, nodes, ["load", 0], "joint"), drawn(server, "experts measured"))
    # Of those that have parted, one that was not begun is still that one.
    folder, told = trained(server, "experts parted", joint_steps=2, count=2, steps_per_queue=3)
    assert told["step"] == "3" and (folder / "range_0").exists() and not (folder / "range_1").exists()
    files = {"joint": folder / "joint" / "checkpoints" / "00000002", "first": folder / "range_0" / "checkpoints" / "00000001"}
    nodes = {}
    for name, checkpoint in files.items():
        shutil.copy(
            checkpoint / "student.safetensors", server.base / "models" / "diffusion_models" / f"parted_{name}.safetensors"
        )
        nodes[name] = {"class_type": "DistillLoadDistilledModel", "inputs": {"name": f"parted_{name}.safetensors"}}
    models = {"models.model_1": ["first", 0], "models.model_2": ["joint", 0]}
    nodes["route"] = {
        "class_type": "DistillTimestepRouter",
        "inputs": models | {"split": "boundaries", "split.boundaries": "499"},
    }
    assert torch.equal(drawn_by(server, nodes, ["route", 0], "parted by hand"), drawn(server, "experts parted"))


def test_adapters_of_ranges_learn_the_guidance_of_the_model_they_are_on(server):
    changes = {
        "student": ["teacher", 0],
        "lora_rank": 2,
        "count": 2,
        "objective": "guidance",
        "learning_rate": 0.02,
        "caption_dropout": 0.0,
    }
    guided = {"recipe": recipe(guidance=3.0)}
    prompt = {**PROMPT, **guided, "train": experts("guided ranges", recipe=["recipe", 0], **changes),
              **sampled(["train", 0], "guided ranges", steps=6, cfg=1.0), **sampled(["teacher", 0], "unguided", steps=6, cfg=1.0)}  # fmt: skip
    result = server.run(prompt)
    assert result.succeeded, result.error
    folder = server.output / "distill_runs" / "guided ranges"
    assert [path.name for path in Experts.read(folder / "experts").files] == [
        "range_0.lora.safetensors",
        "range_1.lora.safetensors",
    ]
    base = open_unet(folder / "experts" / Experts.read(folder / "experts").base).state_dict
    assert same(base, teacher_file().state_dict)
    assert not torch.allclose(drawn(server, "guided ranges"), drawn(server, "unguided"), atol=1e-3)


def test_loras_on_one_base(server):
    changes = {"lora_rank": 2, "joint_steps": 2, "count": 2, "learning_rate": 0.02}
    folder, told = trained(server, "experts shared", **changes)
    found = Experts.read(folder / "experts")
    assert found.base is not None and all("lora" in name for path in found.files for name in read_header(path).tensors)
    nodes = {"load": {"class_type": "DistillLoadExperts", "inputs": {"name": "experts shared"}}}
    assert torch.equal(drawn_by(server, nodes, ["load", 0], "loaded shared"), drawn(server, "experts shared"))
    # Each part of the sampling is by its own LoRA, put on the base by stock nodes.
    place = server.base / "models"
    (place / "loras").mkdir(exist_ok=True)
    shutil.copy(found.base, place / "diffusion_models" / "students_base.safetensors")
    nodes = {"base": {"class_type": "DistillLoadDistilledModel", "inputs": {"name": "students_base.safetensors"}}}
    for number, file in enumerate(found.files):
        shutil.copy(file, place / "loras" / f"range_{number}.safetensors")
        inputs = {"model": ["base", 0], "lora_name": f"range_{number}.safetensors", "strength_model": 1.0}
        nodes[f"range {number}"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    models = {"models.model_1": ["range 0", 0], "models.model_2": ["range 1", 0]}
    nodes["route"] = {
        "class_type": "DistillTimestepRouter",
        "inputs": models | {"split": "boundaries", "split.boundaries": "499"},
    }
    by_hand = drawn_by(server, nodes, ["route", 0], "shared by hand")
    assert torch.equal(drawn(server, "experts shared"), by_hand)
    assert not torch.equal(by_hand, drawn_by(server, nodes, ["range 1", 0], "one lora"))


def test_a_network_loaded_for_one_base_is_handed_back(found):
    assert found("sharing.handed_back") == [[1, 0, True], [2, 0, True]]


def test_boundaries_and_overlap_reach_the_students(server):
    """And a recipe that asks for sample pictures, which none of them could draw, is no obstacle."""
    nodes = {"recipe": recipe(sample_every_steps=1)}
    settings = {"boundaries": "70%", "overlap": 50, "total_steps": 1, "recipe": ["recipe", 0]}
    folder, _ = trained(server, "experts by hand", nodes, **settings)
    assert Experts.read(folder / "experts").ranges.boundaries == pytest.approx((299.7,))
    ranges = [(folder / f"range_{number}" / "recipe.toml").read_text() for number in range(2)]
    assert "timestep_range = [\n    250,\n    1000,\n]" in ranges[0] and "timestep_range = [\n    0,\n    350,\n]" in ranges[1]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"split": "error"}, "set joint_steps above 0"),
        ({"boundaries": "half"}, "boundaries must be numbers such as '500, 250'"),
        ({"boundaries": "1200"}, "leave a range without a timestep"),
        ({"run_name": "../evil"}, "run_name '../evil' must be a plain name"),
        ({"recipe": ["recipe", 0]}, "cannot be split into 3 equal parts"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_sentence(changes, message, server):
    few = {"latents": ["noise", 0], "captions": ["prompt", 0], "run_name": "refused experts"}
    node = experts(**few | changes)
    result = server.run({**PROMPT, "recipe": recipe(accumulation_steps=3), "train": node, **sampled(["train", 0], "x")})
    assert message in result.error and "\n" not in result.error


def test_another_folder_of_the_same_name_is_not_mixed_up(in_one, server):
    folder = server.base / "models" / "diffusion_models" / "damaged"
    shutil.copytree(in_one[0] / "experts", folder)
    shutil.copy(folder / "range_0.safetensors", folder / "range_1.safetensors")
    load = {"class_type": "DistillLoadExperts", "inputs": {"name": "damaged"}}
    result = server.run({**PROMPT, "load": load, **sampled(["load", 0], "x")})
    assert "range_1.safetensors is not the file listed in experts.json" in result.error
