"""A routed UNet in a pipeline is a loop that calls, at each timestep, the network in charge of it."""

import copy

import pytest
import torch

pytest.importorskip("peft")
import diffusers  # noqa: E402
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402

from distill_core.diffusion.denoiser import DiffusersDenoiser  # noqa: E402
from distill_core.diffusion.ranges import TimestepRanges  # noqa: E402
from distill_core.lora.layers import Lora  # noqa: E402
from distill_core.networks.files import save_unet  # noqa: E402
from distill_core.pruning.plan import preset  # noqa: E402
from distill_core.pruning.prune import prune, pruning_metadata  # noqa: E402
from distill_core.routing.expert_unet import ExpertUNet  # noqa: E402
from distill_core.routing.experts import write_experts  # noqa: E402

from ...conftest import SMALL, SMALL_XL  # noqa: E402
from ...students import student_of  # noqa: E402
from ..data.test_encoders import sd, text_encoder, vae  # noqa: E402, F401

pytestmark = pytest.mark.slow

GUIDANCE, NUM_STEPS = 3.0, 6
SCHEDULERS = {
    "DDIM": {"clip_sample": False},
    "EulerDiscrete": {"timestep_spacing": "linspace"},  # timesteps that are not whole
    "DPMSolverMultistep": {},
    "HeunDiscrete": {},
}


def unet(seed, **config):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(config or SMALL)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def two():
    return unet(1), unet(2)


def scheduler(name):
    return getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear", steps_offset=1, **SCHEDULERS[name])


def pipeline(network, name="DDIM"):
    parts = dict(vae=vae(), text_encoder=text_encoder("CLIPTextModel", 2), tokenizer=None, unet=network)
    return StableDiffusionPipeline(
        **parts, scheduler=scheduler(name), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def embeddings(width=16):
    random = torch.Generator().manual_seed(3)
    return torch.randn(2, 5, width, generator=random)[:, None]


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))


def sampled(pipe, **options):
    positive, negative = embeddings()
    given = dict(prompt_embeds=positive, negative_prompt_embeds=negative, latents=noise(), guidance_scale=GUIDANCE)
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=NUM_STEPS, output_type="latent", **given | options).images


def by_hand(choose, name, **options):
    """The pipeline's loop, with the network of each step given by ``choose(number of evaluation, timestep)``."""
    positive, negative = embeddings()
    steps = scheduler(name)
    steps.set_timesteps(NUM_STEPS)
    x, context, called = noise() * steps.init_noise_sigma, torch.cat([negative, positive]), []
    for i, t in enumerate(steps.timesteps):
        network = choose(i, t.item())
        called.append(network)
        shown = steps.scale_model_input(torch.cat([x] * 2), t)
        unconditional, conditional = network(shown, t, encoder_hidden_states=context, return_dict=False, **options)[0].chunk(2)
        x = steps.step(unconditional + GUIDANCE * (conditional - unconditional), t, x, return_dict=False)[0]
    return x, called


# --- in a pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_is_two_phases(name, two):
    noisy, clean = two
    routed = pipeline(ExpertUNet(two, TimestepRanges((500.0,))), name)
    latents, called = by_hand(lambda i, t: clean if t <= 500 else noisy, name)
    assert {*called} == {*two}
    assert torch.equal(sampled(routed), latents)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_at_the_boundary_belongs_to_the_less_noisy(name, two):
    noisy, clean = two
    steps = scheduler(name)
    steps.set_timesteps(NUM_STEPS)
    boundary = steps.timesteps[NUM_STEPS // 2].item()
    first = steps.timesteps.tolist().index(boundary)
    latents, _ = by_hand(lambda i, t: noisy if i < first else clean, name)
    assert torch.equal(sampled(pipeline(ExpertUNet(two, TimestepRanges((boundary,))), name)), latents)
    times = steps.timesteps.tolist().count(boundary)  # Heun's method evaluates there twice
    earlier, _ = by_hand(lambda i, t: noisy if i < first + times else clean, name)
    assert torch.equal(sampled(pipeline(ExpertUNet(two, TimestepRanges((boundary - 1e-3,))), name)), earlier)


@pytest.mark.parametrize("boundary,number", [(998.5, 1), (0.0, 0)])
def test_at_the_ends_it_is_one_network_alone(boundary, number, two):
    """No step of this sampler is beyond either boundary."""
    routed = sampled(pipeline(ExpertUNet(two, TimestepRanges((boundary,)))))
    assert torch.equal(routed, sampled(pipeline(two[number]))) and not torch.equal(routed, sampled(pipeline(two[1 - number])))


def test_the_pipeline_of_sdxl():
    config = SMALL_XL | {"projection_class_embeddings_input_dim": 8 + 6 * 256}
    two = unet(1, **config), unet(2, **config)

    def draw(network):
        pipe = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=None,
            text_encoder_2=text_encoder("CLIPTextModelWithProjection", 3, projection_dim=8),
            tokenizer=None,
            tokenizer_2=None,
            unet=network,
            scheduler=scheduler("DDIM"),
            add_watermarker=False,
        )
        pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(5))
        return sampled(pipe, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled * 0, height=16, width=16)

    alone = [draw(network) for network in two]
    routed = draw(ExpertUNet(two, TimestepRanges((500.0,))))
    assert not any(torch.equal(routed, latents) for latents in alone)
    assert torch.equal(draw(ExpertUNet(two, TimestepRanges((998.5,)))), alone[1])
    assert torch.equal(draw(ExpertUNet(two, TimestepRanges((0.0,)))), alone[0])


def test_a_pipeline_on_disk_takes_it(two, tmp_path):
    pipeline(two[0]).save_pretrained(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, unet=ExpertUNet(two, TimestepRanges((500.0,))), tokenizer=None)
    assert torch.equal(sampled(pipe), by_hand(lambda i, t: two[t <= 500], "DDIM")[0])
    with pytest.raises(ValueError, match="keep the folder of experts"):
        pipe.save_pretrained(tmp_path / "again")


def test_moving_to_a_device_and_a_precision_reaches_every_network(two):
    routed = ExpertUNet([copy.deepcopy(network) for network in two], TimestepRanges((500.0,)))
    pipe = pipeline(routed).to(torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.unet.device.type == "cpu"
    assert {parameter.dtype for parameter in routed.parameters()} == {torch.bfloat16}
    assert torch.isfinite(sampled(pipe, latents=noise().bfloat16())).all()


def test_it_is_offloaded_as_any_network(two):
    pytest.importorskip("accelerate")
    pipe = pipeline(ExpertUNet([copy.deepcopy(network) for network in two], TimestepRanges((500.0,))))
    expected = sampled(pipe)
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks are the same, whatever the device
    assert hasattr(pipe.unet, "_hf_hook") and torch.equal(sampled(pipe), expected)


# --- as a network


@pytest.mark.parametrize(
    "timestep",
    [700, 700.0, 500.5, torch.tensor(700), torch.tensor([700.0]), torch.tensor([700, 700])],
    ids=["int", "float", "not whole", "no dimensions", "of one", "of each"],
)
def test_any_form_of_a_timestep(timestep, two, batch):
    routed, (x, _, context) = ExpertUNet(two, TimestepRanges((500.0,))), batch
    assert torch.equal(routed(x, timestep, context).sample, two[0](x, timestep, context).sample)
    assert torch.equal(routed(x, timestep, context, return_dict=False)[0], two[0](x, timestep, context).sample)


def test_each_example_goes_to_its_own_network(two):
    """With all that may come per example: captions, masks, residuals."""
    random = torch.Generator().manual_seed(0)
    x, context = torch.randn(4, 4, 8, 8, generator=random), torch.randn(4, 5, 16, generator=random)
    residuals = [h * 0 + 1 for h in down_residuals(two[0], x, context)]
    every = dict(
        encoder_hidden_states=context,
        encoder_attention_mask=torch.rand(4, 5, generator=random) > 0.3,
        down_block_additional_residuals=[torch.randn(h.shape, generator=random) for h in residuals],
        mid_block_additional_residual=torch.randn(4, 64, 1, 1, generator=random),
        cross_attention_kwargs={},
    )
    timesteps = torch.tensor([900, 500, 501, 3])
    together = ExpertUNet(two, TimestepRanges((500.0,)))(x, timesteps, **every).sample

    def only(value, i):
        if isinstance(value, list):
            return [entry[i : i + 1] for entry in value]
        return value[i : i + 1] if isinstance(value, torch.Tensor) else value

    for i, number in enumerate([0, 1, 0, 1]):
        own = {name: only(value, i) for name, value in every.items()}
        alone = two[number](x[i : i + 1], timesteps[i : i + 1], **own).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def down_residuals(network, x, context):
    """What the skip connections of a network carry."""
    seen = []
    handles = [network.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output))]
    handles += [
        block.register_forward_hook(lambda module, inputs, output: seen.extend(output[1])) for block in network.down_blocks
    ]
    network(x, 1, context)
    for handle in handles:
        handle.remove()
    return seen


def test_networks_that_cannot_stand_in_for_each_other_are_refused(two):
    with pytest.raises(ValueError, match="network 1 has in_channels 9, but network 0 has 4"):
        ExpertUNet([two[0], unet(3, **SMALL | {"in_channels": 9})], TimestepRanges((500.0,)))
    with pytest.raises(ValueError, match="there are 3 ranges but 2 networks"):
        ExpertUNet(two, TimestepRanges((500.0, 250.0)))


# --- a folder of experts


@pytest.fixture(scope="module")
def experts(small_teacher, tmp_path_factory):
    """Folder of two experts of different plans, and their networks."""
    folder, networks = tmp_path_factory.mktemp("experts"), []
    teacher = {name: weight.detach() for name, weight in small_teacher.named_parameters().items()}
    for number, name in enumerate(["bk-sdm-base", "bk-sdm-tiny"]):
        pruning = prune(small_teacher.architecture, preset(name))
        metadata = pruning_metadata(pruning, teacher, small_teacher.architecture)
        networks.append(student_of(small_teacher, preset(name)).network)
        path = folder / f"student_{number}.safetensors"
        save_unet(path, pruning.weights(teacher), pruning.student, metadata=metadata)
    files = [folder / f"student_{number}.safetensors" for number in range(2)]
    write_experts(folder / "experts", TimestepRanges((600.0,)), files, teacher="0" * 16)
    return folder / "experts", networks


def test_a_folder_is_one_from_pretrained_away(experts, batch):
    folder, networks = experts
    pipe = pipeline(ExpertUNet.from_pretrained(folder))
    assert torch.equal(sampled(pipe), by_hand(lambda i, t: networks[t <= 600], "DDIM")[0])
    assert ExpertUNet.from_pretrained(folder, torch_dtype=torch.float16).dtype == torch.float16


def test_residuals_of_the_teachers_controlnet_reach_the_blocks_that_stayed(experts, small_teacher, batch):
    from distill_core.pruning.plan import name_map

    folder, networks = experts
    routed, (x, _, context) = ExpertUNet.from_pretrained(folder), batch
    random = torch.Generator().manual_seed(1)
    residuals = [torch.randn(h.shape, generator=random) for h in down_residuals(small_teacher.network, x, context)]
    mid = torch.randn(2, 64, 1, 1, generator=random)
    for t, network, name in ((700, networks[0], "bk-sdm-base"), (5, networks[1], "bk-sdm-tiny")):
        skips = small_teacher.architecture.kept_residuals(name_map(small_teacher.architecture, preset(name)).rename)
        assert skips.mid == (name == "bk-sdm-base")
        own = {"down_block_additional_residuals": skips.select(residuals)}
        own["mid_block_additional_residual"] = mid if skips.mid else mid[:1, :1] * 0
        given = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": mid}
        expected = network(x, t, context, **own).sample
        assert torch.equal(routed(x, t, context, **given).sample, expected)
        assert torch.equal(routed(x, t, context, **own).sample, expected)
        assert not torch.equal(routed(x, t, context).sample, expected)


@pytest.fixture(scope="module")
def shared(small_teacher, tmp_path_factory):
    """Folder of one base with a LoRA for each of two ranges, and the networks with each alone."""
    folder, files, networks = tmp_path_factory.mktemp("shared"), [], []
    base = {name: weight.detach() for name, weight in small_teacher.named_parameters().items()}
    save_unet(folder / "whole.safetensors", base, small_teacher.architecture)
    for number in range(2):
        denoiser = DiffusersDenoiser(network=copy.deepcopy(small_teacher.network), architecture=small_teacher.architecture)
        lora = Lora(denoiser, rank=2, alpha=3.0)
        random = torch.Generator().manual_seed(number)
        for parameter in lora.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=random) / 5
        files.append(folder / f"{number}.safetensors")
        lora.write(files[-1], {name: p.detach() for name, p in lora.parameters().items()}, {})
        networks.append(denoiser.network.requires_grad_(False))
    ranges = TimestepRanges((500.0,))
    write_experts(folder / "experts", ranges, files, base=folder / "whole.safetensors", teacher="0" * 16)
    return folder / "experts", networks


@pytest.mark.parametrize("timestep", [700, 5])
def test_a_shared_base_computes_in_half_precision(timestep, shared, batch):
    routed, (x, _, context) = ExpertUNet.from_pretrained(shared[0], torch_dtype=torch.bfloat16), batch
    exact = shared[1][timestep <= 500](x, timestep, context).sample
    half = routed(x.bfloat16(), timestep, context.bfloat16()).sample
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.05 * exact.norm()


def test_a_shared_base_with_loras_is_each_lora_alone(shared, small_teacher):
    folder, networks = shared
    pipe = pipeline(ExpertUNet.from_pretrained(folder))
    assert torch.equal(sampled(pipe), by_hand(lambda i, t: networks[t <= 500], "DDIM")[0])
    assert torch.equal(sampled(pipe), sampled(pipe))  # it ends on the other LoRA than it begins with
    num_of_loras = sum(p.numel() for n, p in pipe.unet.named_parameters() if ".lora_" in n)
    assert sum(p.numel() for p in pipe.unet.parameters()) == small_teacher.architecture.num_parameters + num_of_loras


# --- LoRAs of the pipeline


def lora_file(network, path, architecture):
    lora = Lora(DiffusersDenoiser(network=copy.deepcopy(network), architecture=architecture), rank=2)
    random = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(p.shape, generator=random) / 5 for name, p in lora.parameters().items()}
    lora.write(path, weights, {})
    return path


def test_a_lora_of_the_pipeline_is_put_on_each_network(two, small_teacher, tmp_path):
    file = lora_file(two[0], tmp_path / "lora.safetensors", small_teacher.architecture)
    plain = sampled(pipeline(ExpertUNet(two, TimestepRanges((500.0,)))))
    with_lora = []
    for network in two:
        pipe = pipeline(copy.deepcopy(network))
        pipe.load_lora_weights(str(file), adapter_name="style")
        pipe.set_adapters(["style"], [0.5])
        with_lora.append(pipe.unet)
    pipe = pipeline(ExpertUNet([copy.deepcopy(network) for network in two], TimestepRanges((500.0,))))
    pipe.load_lora_weights(str(file), adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    assert torch.equal(sampled(pipe), by_hand(lambda i, t: with_lora[t <= 500], "DDIM")[0])
    pipe.load_lora_weights(str(file), adapter_name="again")  # on networks that have one
    pipe.unload_lora_weights()
    assert torch.equal(sampled(pipe), plain)


def test_a_lora_that_does_not_fit_every_network_is_refused(experts, shared, small_teacher, tmp_path):
    file = lora_file(small_teacher.network, tmp_path / "lora.safetensors", small_teacher.architecture)
    pipe = pipeline(ExpertUNet.from_pretrained(experts[0]))
    with pytest.raises(ValueError, match="does not fit network 0: .* distill remap-lora"):
        pipe.load_lora_weights(str(file))
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    with pytest.raises(ValueError, match="LoRAs on one base"):
        pipeline(ExpertUNet.from_pretrained(shared[0])).load_lora_weights(str(file))
