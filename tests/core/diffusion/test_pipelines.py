"""Transformers of diffusers as denoisers: asked as their own pipelines ask them, and with gradients that are right."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from distill_core.data.encoders import DiffusersEncoders
from distill_core.diffusion.conditioning import Caption, Label, conditions, num_tokens, pad
from distill_core.diffusion.denoiser import checkpointing
from distill_core.diffusion.pipelines import denoiser_of, flow_of
from distill_core.diffusion.sampling import sample
from distill_core.diffusion.schedule import flow
from distill_core.networks.folders import open_module
from distill_core.networks.transformers.files import find_transformer, open_transformer
from distill_core.pruning.plan import name_map, pruned
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.prune import prune_file

from ..pipelines import DEPTH, FAMILIES, write_pipeline

pytestmark = pytest.mark.slow

CAPTIONS = ["a cat", "two red apples left of a dog"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request, tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / request.param, request.param)


def opened(folder, shift=3.0):
    import diffusers

    file = find_transformer(folder)
    network = open_module(getattr(diffusers, file.config["_class_name"]), file.path.parent)
    return denoiser_of(network, file.architecture, flow(shift=shift))


def asked(denoiser, folder, captions=CAPTIONS):
    """Noisy latents, timesteps, and captions in one batch."""
    encoders = DiffusersEncoders.from_folder(folder, family=denoiser.transformer.family)
    *encoded, null = encoders.captions([*captions, ""])
    context, label, _ = conditions(encoded, null, (64, 64))
    random = torch.Generator().manual_seed(3)
    x_t = torch.randn(len(captions), denoiser.latent_channels, 8, 8, generator=random)
    return x_t, torch.tensor([200, 700])[: len(captions)], context.float(), label


def test_images_are_those_of_the_familys_pipeline(pipeline):
    """Four steps without guidance, at the pipeline's own noise levels and from the same noise."""
    import diffusers

    denoiser = opened(pipeline)
    encoders = DiffusersEncoders.from_folder(pipeline, family=denoiser.transformer.family)
    for text_encoder in encoders.reader.text_encoders:
        text_encoder.float()  # the pipelines compute in its precision
    caption, null = encoders.captions([CAPTIONS[1], ""])
    context, label, null = conditions([caption], null, (64, 64))
    noise = torch.randn(1, denoiser.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = sample(denoiser, context, null, noise=noise, label=label, num_steps=4, guidance=1.0)

    kind, guidance = {
        "flux1": ("FluxPipeline", {"guidance_scale": 1.0}),
        "z-image": ("ZImagePipeline", {"guidance_scale": 0.0}),
        "qwen-image": ("QwenImagePipeline", {"true_cfg_scale": 1.0}),
    }[denoiser.transformer.family]
    parts = {"text_encoder": encoders.reader.text_encoders[0], "tokenizer": encoders.reader._pipeline.tokenizer}
    if kind == "FluxPipeline":
        parts |= {"text_encoder_2": encoders.reader.text_encoders[1], "tokenizer_2": encoders.reader._pipeline.tokenizer_2}
    # Where the sampler of `sample` is: `flow` keeps a trace of signal at its end, so its first level is not quite 1.
    even = [(number + 1) / 4 for number in reversed(range(4))]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = getattr(diffusers, kind)(scheduler=scheduler, vae=encoders.autoencoder.vae, transformer=denoiser.network, **parts)
    theirs.set_progress_bar_config(disable=True)
    given = noise if kind == "ZImagePipeline" else theirs._pack_latents(noise, 1, 16, 8, 8)
    length = {"max_sequence_length": encoders.max_tokens}
    made = theirs(
        CAPTIONS[1],
        height=64,
        width=64,
        num_inference_steps=4,
        sigmas=even,
        latents=given,
        output_type="latent",
        **guidance,
        **length,
    ).images
    if kind != "ZImagePipeline":
        made = theirs._unpack_latents(made, 64, 64, 8).reshape(1, 16, 8, 8)
    torch.testing.assert_close(latents, made.float(), atol=2e-3, rtol=2e-3)


def test_a_padded_caption_is_asked_as_if_alone(pipeline):
    denoiser = opened(pipeline)
    x_t, t, context, label = asked(denoiser, pipeline)
    together = denoiser(x_t, t, context, label)
    for number, length in enumerate(num_tokens(context)):
        own = None if label is None else Label(label.pooled[number : number + 1], label.sizes[number : number + 1])
        one = slice(number, number + 1)
        alone = denoiser(x_t[one], t[one], context[one, :length], own)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-4)


def test_a_student_skips_what_its_plan_removes(pipeline, tmp_path):
    teacher = opened(pipeline)
    plan = read_plan(DEPTH[teacher.transformer.family], teacher.transformer)
    student = replace(teacher, mapping=name_map(teacher.transformer, plan))
    prune_file(open_transformer(pipeline), tmp_path / "student", plan, layout="diffusers")
    alone = opened(tmp_path / "student")
    inputs = asked(teacher, pipeline)
    assert torch.equal(student(*inputs), alone(*inputs)) and not torch.equal(student(*inputs), teacher(*inputs))
    assert alone.transformer.num_parameters == pruned(teacher.transformer, student.mapping).num_parameters


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_those_of_finite_differences(pipeline, checkpointed):
    import contextlib

    denoiser = opened(pipeline)
    denoiser.network.double()  # but for its norms
    inputs = asked(denoiser, pipeline)
    x_t, t, context, label = inputs
    x_t, context = x_t.double(), context.double()
    label = label and label.to(context)
    wanted = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss():
        return (denoiser(x_t, t, context, label) * wanted).sum()

    blocks = [denoiser.transformer.in_order[0], denoiser.transformer.in_order[-1], *denoiser.transformer.refiners[:1]]
    weights = [next(w for w in denoiser.module(block).parameters() if w.ndim == 2) for block in blocks]
    for weight in weights:
        weight.requires_grad_(True)
    denoiser.network.train()
    with checkpointing(denoiser) if checkpointed else contextlib.nullcontext():
        loss().backward()
    for weight in weights:
        step = 1e-3 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            weight += step
            above = loss()
            weight -= 2 * step
            below = loss()
            weight += step
        assert ((above - below) / 2).item() == pytest.approx((weight.grad * step).sum().item(), rel=2e-3)


def test_captions_of_lengths_with_no_common_one_are_refused():
    captions = [Caption(torch.zeros(length, 1)) for length in (71, 77)]
    with pytest.raises(ValueError, match=r"captions of \[71, 77\] tokens need a common length of 5,467"):
        conditions(captions, captions[0], (64, 64))


def test_rows_of_zeros_are_no_tokens():
    context = torch.randn(3, 4)
    assert num_tokens(torch.stack([pad(context, 5), pad(context[:2], 5)])) == [3, 2]
    assert torch.equal(pad(context, 5)[:3], context) and not pad(context, 5)[3:].any()


@pytest.mark.parametrize("config,shift", [
    ({}, 1.0),
    ({"shift": 3.0}, 3.0),
    ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 2.718281828 ** 1.15),
    ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}, 2.718281828 ** (0.5 + 0.4 * 3840 / 7936)),
])  # fmt: skip
def test_noise_levels_are_those_of_the_pipelines_scheduler(config, shift):
    assert torch.allclose(flow_of(config, (64, 64)).sigmas, flow(shift=shift).sigmas, atol=1e-6)


@pytest.mark.parametrize("config,said", [
    ({"shift": "much"}, "shift of its scheduler must be numbers"),
    ({"shift": 0}, "shift of its scheduler must be between 0"),
    ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "max_image_seq_len of its scheduler must be more than 4096"),
])  # fmt: skip
def test_a_damaged_scheduler_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        flow_of(config, (64, 64))


def test_in_half_precision_the_time_is_still_exact(tmp_path):
    """Z-Image scales it by a thousand before it rounds; 0.2675 in bf16 would be another timestep."""
    denoiser = opened(write_pipeline(tmp_path / "z-image", "z-image"))
    denoiser.network.to(torch.bfloat16)
    given = []
    denoiser.network.t_embedder.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    x_t, t, context, label = asked(denoiser, tmp_path / "z-image")
    denoiser(x_t.bfloat16(), t, context.bfloat16(), label)
    assert torch.allclose(given[0], 1000 * denoiser.schedule.alphas[t].float(), rtol=1e-6)
