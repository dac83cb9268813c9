"""The nodes in a running ComfyUI, on the demo."""

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from distill_core.demo.teacher import teacher_file
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import name_map, plan_in, preset

from .graphs import PROMPT, newest, sampled, save, train


def test_stock_nodes_draw_scenes_with_the_demo_teacher(server):
    from distill_core.demo.autoencoder import ScenesAutoencoder
    from distill_core.demo.grammar import Group, Scene
    from distill_core.demo.judge import ScenesJudge

    prompt = {
        **PROMPT,
        "many": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 20}},
        **sampled(["teacher", 0], "demo", latent_image=["many", 0], steps=12, cfg=3.0),
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample demo", 0], "vae": ["teacher", 2]}},
        "show": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "demo"}},
    }
    result = server.run(prompt)
    assert result.succeeded and len(result.outputs["show"]["images"]) == 20
    latents = load_file(newest(server, "demo_*.latent"))["latent_tensor"]
    decoded = ScenesAutoencoder.bundled().decode(latents).clamp(-1, 1)
    assert ScenesJudge.bundled().agrees(decoded, 20 * [Scene(Group("cat"), style="flat")]).float().mean() >= 0.9
    # The picture is the latent, decoded.
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(server.output / result.outputs["show"]["images"][0]["filename"]).convert("RGB"))
    expected = decoded[0].permute(1, 2, 0).add(1).mul(127.5)
    assert pixels.shape == (64, 64, 3) and np.abs(pixels - expected.numpy()).max() <= 2


def test_pruned_model_is_the_teachers_weights_and_the_teacher_stays(server):
    result = server.run({**PROMPT, "save": save(["prune", 0], "pruned"), "keep": save(["teacher", 0], "teacher", dtype="fp16")})
    assert result.succeeded
    teacher = teacher_file()
    mapping = name_map(teacher.architecture, preset("bk-sdm-base"))
    expected = mapping.apply(teacher.state_dict)
    student = open_unet(newest(server, "pruned_*.safetensors"))
    assert plan_in(student.metadata).remove == preset("bk-sdm-base").remove
    assert all(torch.equal(student.state_dict[n], w.float()) for n, w in expected.items())
    kept = open_unet(newest(server, "teacher_*.safetensors"))
    assert all(torch.equal(kept.state_dict[n], w) for n, w in teacher.state_dict.items())


def test_the_graph_trains_saves_and_goes_on(server):
    """Three of six steps a queue, as the CLI's engine would: the same folder, bit-equal weights, instant when complete."""
    prompt = {**PROMPT, "train": train("goes on"), "save": save(["train", 0], "on/student"), **sampled(["train", 0], "student")}
    folder = server.output / "distill_runs" / "goes on"
    steps = []
    for _ in range(2):
        assert server.run(prompt).succeeded
        steps.append(sorted(int(p.name) for p in (folder / "checkpoints").iterdir())[-1])
    assert steps == [3, 6]
    in_graph = load_file(newest(server, "on/student_*.safetensors"))
    on_disk = load_file(folder / "checkpoints" / "00000006" / "student.safetensors")
    assert in_graph.keys() == on_disk.keys() and all(torch.equal(in_graph[n], on_disk[n]) for n in on_disk)
    origin = open_unet(folder / "checkpoints" / "00000006" / "student.safetensors").origin
    assert origin == open_unet(newest(server, "on/student_*.safetensors")).origin
    assert origin.keys() == {"distill.plan", "distill.teacher", "distill.skips"}
    metrics = (folder / "metrics.csv").read_bytes()
    third = server.run(prompt)
    assert third.succeeded and {"train", "save", "sample student"} <= third.cached
    assert (folder / "metrics.csv").read_bytes() == metrics
    # In one go it comes to the same.
    assert server.run(
        {**PROMPT, "train": train("goes on at once", steps_per_queue=6), "s": save(["train", 0], "one/student")}
    ).succeeded
    in_one = load_file(newest(server, "one/student_*.safetensors"))
    assert all(torch.equal(in_one[n], on_disk[n]) for n in on_disk)


def test_a_finished_run_that_was_deleted_is_trained_again(server):
    prompt = {**PROMPT, "train": train("deleted", steps_per_queue=6), "s": save(["train", 0], "deleted")}
    folder = server.output / "distill_runs" / "deleted"
    assert server.run(prompt).succeeded and "train" in server.run(prompt).cached
    before = load_file(folder / "checkpoints" / "00000006" / "student.safetensors")
    shutil.rmtree(folder)
    again = server.run(prompt)
    assert again.succeeded and not {"train", "s"} & again.cached
    after = load_file(folder / "checkpoints" / "00000006" / "student.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert "train" in server.run(prompt).cached


def test_cancel_keeps_every_finished_step(server):
    long = {"total_steps": 400, "steps_per_queue": 400, "save_every_steps": 500, "lr_schedule": "constant"}
    prompt = {**PROMPT, "train": train("cancelled", **long), "save": save(["train", 0], "cancelled")}
    metrics = server.output / "distill_runs" / "cancelled" / "metrics.csv"
    prompt_id = server.queue(prompt)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    server.post("interrupt", {})
    assert server.wait(prompt_id).interrupted
    done = len(metrics.read_text().splitlines()) - 1
    (checkpoint,) = (metrics.parent / "checkpoints").iterdir()
    assert 5 <= done < 400 and int(checkpoint.name) == done
    assert not list(server.output.glob("cancelled_*"))
    # Queued again it goes on from there, and the server is well.
    shorter = train("cancelled", **long | {"steps_per_queue": 2})
    assert server.run({**PROMPT, "train": shorter, "save": save(["train", 0], "cancelled")}).succeeded
    assert len(metrics.read_text().splitlines()) - 1 == done + 2


def test_training_leaves_teacher_and_pruned_student_as_they_were(server):
    before = {**PROMPT, **sampled(["teacher", 0], "t before"), **sampled(["prune", 0], "p before")}
    training = {**PROMPT, "train": train("beside", seed=5), "x": save(["train", 0], "x")}
    # The same noise from a node the cache has not seen, or it would answer without asking the models.
    same = {"class_type": "LatentMultiply", "inputs": {"samples": ["noise", 0], "multiplier": 1.0}}
    after = {**PROMPT, "same": same}
    for who, model in (("t", "teacher"), ("p", "prune")):
        after |= sampled([model, 0], f"{who} after", latent_image=["same", 0])
    assert server.run(before).succeeded and server.run(training).succeeded
    result = server.run(after)
    assert result.succeeded and {"teacher", "prune"} <= result.cached and not {"sample t after", "sample p after"} & result.cached
    for who in "tp":
        first, second = (load_file(newest(server, f"{who} {when}_*.latent"))["latent_tensor"] for when in ("before", "after"))
        assert torch.equal(first, second)


def test_core_nodes_train_and_load_a_lora_on_a_student(server):
    """ComfyUI reloads a MODEL to train on it; what it reloads must be the student, not the teacher."""
    prompt = {
        **PROMPT,
        "pick": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "train": train("lora base"),
        "lora": {"class_type": "TrainLoraNode", "inputs": {
            "model": ["train", 0], "latents": ["pick", 0], "positive": ["prompt", 0], "batch_size": 1, "grad_accumulation_steps": 1,
            "steps": 2, "learning_rate": 1e-3, "rank": 4, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0,
            "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA",
            "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]",
            "bucket_mode": False, "bypass_mode": False}},
        "load": {"class_type": "LoraModelLoader",
                 "inputs": {"model": ["train", 0], "lora": ["lora", 0], "strength_model": 1.0, "bypass": False}},
        **sampled(["load", 0], "with lora"),
        **sampled(["train", 0], "no lora"),
        "keep lora": {"class_type": "SaveLoRA", "inputs": {"lora": ["lora", 0], "prefix": "loras/on student"}},
        "loss": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 1], "filename_prefix": "loss"}},
    }  # fmt: skip
    result = server.run(prompt)
    assert result.succeeded, result.error
    with_lora, without = (load_file(newest(server, f"{w} lora_*.latent"))["latent_tensor"] for w in ("with", "no"))
    assert with_lora.isfinite().all() and not torch.equal(with_lora, without)
    # It was trained on the student: every weight it changes is one of the student's, in its shape.
    student = load_file(max((server.output / "distill_runs" / "lora base" / "checkpoints").iterdir()) / "student.safetensors")
    trained = load_file(newest(server, "loras/on student*.safetensors"))
    ups = {n.removesuffix(".lora_up.weight").removeprefix("diffusion_model."): w for n, w in trained.items() if "lora_up" in n}
    targets = {n.removesuffix(".weight") for n, w in student.items() if n.endswith(".weight") and w.ndim > 1}
    assert ups.keys() == targets
    assert all(w.shape[0] == student[f"{n}.weight"].shape[0] for n, w in ups.items())


def test_datasets_of_stock_nodes_are_taken_in_every_layout(server):
    """One LATENT of many with one caption for all, as a batch gives; and lists from Make Training Dataset."""
    pictures = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 8421504}}
    encoded = {"class_type": "VAEEncode", "inputs": {"pixels": ["pictures", 0], "vae": ["teacher", 2]}}
    made = {"class_type": "MakeTrainingDataset",
            "inputs": {"images": ["pictures", 0], "vae": ["teacher", 2], "clip": ["teacher", 1], "texts": "a cat, flat"}}  # fmt: skip
    for name, data in {"batch": (["encoded", 0], ["prompt", 0]), "made": (["made", 0], ["made", 1])}.items():
        step = train(f"layout {name}", latents=data[0], captions=data[1], total_steps=1)
        result = server.run(
            {**PROMPT, "pictures": pictures, "encoded": encoded, "made": made, "train": step, "s": save(["train", 0], name)}
        )
        assert result.succeeded, result.error


def test_diffusers_layout_is_written_as_a_folder(server):
    from diffusers import UNet2DConditionModel

    assert server.run({**PROMPT, "save": save(["prune", 0], "folder/student", layout="diffusers")}).succeeded
    network = UNet2DConditionModel.from_pretrained(newest(server, "folder/student_*"))
    assert (
        sum(p.numel() for p in network.parameters()) == open_unet(newest(server, "folder/student_*")).architecture.num_parameters
    )


# --- bad input: one clear sentence, and nothing half-written

TWICE = {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["prune", 0], "preset": "bk-sdm-base"}}
BILLION = {"class_type": "PrimitiveInt", "inputs": {"value": 10**9}}
SMALL = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 3}}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": save(["again", 0], "x"), "again": TWICE}, "is already pruned"),
        ({"x": save(["teacher", 0], "../../evil")}, "leads out of the output folder"),
        ({"x": save(["t", 0], "x"), "t": train("../evil")}, "must be a plain name"),
        ({"x": save(["t", 0], "x"), "t": train("名" * 80)}, "is too long for the name of a folder"),
        *[({"x": save(["prune", 0], prefix)}, "leads into a folder reserved for runs or data") for prefix in
          ("distill_runs/a/checkpoints/00000004/extra", "x/../Distill_Data/y", "./distill_runs/y", "distill_runs\\y")],
        *[({"x": save(["prune", 0], prefix)}, "has no file name") for prefix in ("", " ", ".", "folder/", "folder/..")],
        ({"x": save(["prune", 0], "folder/.hidden")}, "would make a hidden file"),
        ({"x": save(["t", 0], "x"), "t": train("a", teacher=["prune", 0], student=["teacher", 0])}, "do not match: they are swapped"),
        ({"x": save(["t", 0], "x"), "t": train("a", student=["teacher", 0])}, "student and teacher are the same model"),
        ({"x": save(["t", 0], "x"), "t": train("a", batch_size=["billion", 0]), "billion": BILLION}, "batch_size must be between 1 and 65,536"),
        ({"x": save(["t", 0], "x"), "t": train("b", latents=["small", 0], captions=["teacher", 4]), "small": SMALL}, "3 latents but 4096 captions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_sentence(change, message, server):
    before = sorted(server.output.rglob("*"))
    result = server.run({**PROMPT, **change})
    assert message in result.error and "\n" not in result.error
    assert [p for p in sorted(server.output.rglob("*")) if p not in before and p.is_file()] == []
    numbers = str(result.messages["execution_error"]["current_inputs"]).count("tensor(")
    assert numbers < 20  # of the prompts alone: those of 4,096 examples would take a minute


@pytest.mark.parametrize("prefix", ["checkpoints/spelt", "checkpoints\\spelt", "./checkpoints//spelt"])
def test_a_layout_is_saved_where_its_loader_looks(prefix, server):
    before = {*server.output.rglob("spelt_*")}
    result = server.run({**PROMPT, "x": save(["prune", 0], prefix)})
    assert result.succeeded, result.error
    (saved,) = {*server.output.rglob("spelt_*")} - before
    assert saved.parent == server.output / "diffusion_models"


def test_links_among_the_models_are_followed_and_those_that_lead_nowhere_do_no_harm(server, tmp_path):
    place = server.base / "models" / "diffusion_models"
    (place / "apart").mkdir(parents=True, exist_ok=True)
    (place / "apart" / "gone.safetensors").symlink_to(tmp_path / "gone.safetensors")
    assert server.run({**PROMPT, "save": save(["prune", 0], "to be linked")}).succeeded
    shutil.copy(newest(server, "to be linked_*.safetensors"), tmp_path / "elsewhere.safetensors")
    (place / "linked.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    try:
        assert {"DistillLoadExperts", "DistillTimestepRouterSampler"} <= server.get("object_info").keys()
        load = {"class_type": "DistillLoadDistilledModel", "inputs": {"name": "linked.safetensors"}}
        result = server.run({**PROMPT, "load": load, "save": save(["load", 0], "was linked")})
        assert result.succeeded, result.error
    finally:
        (place / "linked.safetensors").unlink()
        (place / "apart" / "gone.safetensors").unlink()


def test_a_link_does_not_lead_what_is_saved_into_a_run(server):
    (server.output / "distill_runs").mkdir(exist_ok=True)
    (server.output / "shortcut").symlink_to(server.output / "distill_runs")
    result = server.run({**PROMPT, "x": save(["prune", 0], "shortcut/student")})
    assert "leads into a folder reserved for runs or data" in result.error


def test_a_run_with_other_settings_is_refused(server):
    first = {**PROMPT, "train": train("settled", total_steps=1), "s": save(["train", 0], "settled")}
    assert server.run(first).succeeded
    first["train"]["inputs"]["learning_rate"] = 5e-4
    assert "'settled' was started with learning_rate = 0.001, but is now 0.0005" in server.run(first).error


def test_the_name_of_a_run_may_be_linked(server):
    """In, from a text; and out, to where it is asked for again. What is linked is not known before it is executed."""
    name = {"class_type": "PrimitiveString", "inputs": {"value": "linked"}}
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["train", 4]}}
    for step in (3, 6):
        result = server.run({**PROMPT, "name": name, "train": train(["name", 0]), "shown": shown})
        assert result.succeeded, result.error
        assert result.outputs["shown"]["text"] == ["linked"]
        checkpoints = server.output / "distill_runs" / "linked" / "checkpoints"
        assert max(int(path.name) for path in checkpoints.iterdir()) == step
    assert "TypeError" not in server.log.read_text() and "unsupported operand" not in server.log.read_text()


def test_a_node_of_a_linked_name_is_executed_each_time(found):
    told = found("fingerprints")
    assert told == dict.fromkeys(told, [True, False])


def test_an_output_folder_that_cannot_be_written_is_named(server):
    (server.output / "blocked").write_text("a file where a folder should be")
    result = server.run({**PROMPT, "save": save(["prune", 0], "blocked/student")})
    assert "cannot write" in result.error and (server.output / "blocked").read_text().startswith("a file")
