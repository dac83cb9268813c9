"""How a network samples travels with it: read from whatever says it, written so that others read the same."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.cli import main
from distill_core.data.cache import CacheWriter, Entry
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.schedule import of_sampling, scaled_linear, zero_terminal_snr
from distill_core.networks.architecture import Architecture
from distill_core.networks.files import open_unet, save_unet
from distill_core.networks.layouts import LAYOUTS
from distill_core.networks.model_sampling import DISCRETE, EDM, FLOW, OTHER, ZERO_SNR, ModelSampling, read_sampling
from distill_core.pruning.plan import preset
from distill_core.pruning.prune import prune_file

from ...conftest import SMALL, SMALL_XL

EMPTY = torch.zeros(0)
V, EPS, ZTSNR = ModelSampling(prediction="v"), ModelSampling(), ModelSampling(prediction="v", noise=ZERO_SNR)
COSXL = ModelSampling(prediction="v", noise=EDM, sigmas=(0.0020000000949949026, 120.0))
PLAYGROUND = ModelSampling(prediction="edm", noise=EDM, sigmas=(0.002, 80.0), latent_mean=(-1.5, 1.75), latent_std=(8.5, 5.0))
SAMPLINGS = [EPS, V, ModelSampling(prediction="x0"), ZTSNR, ModelSampling(noise=ZERO_SNR), COSXL, PLAYGROUND,
             ModelSampling(prediction="flow", noise=FLOW)]  # fmt: skip
SD2 = SMALL | dict(block_out_channels=(64, 64, 128, 128), attention_head_dim=[1, 1, 2, 2], use_linear_projection=True)
SDXL = SMALL_XL | dict(projection_class_embeddings_input_dim=2816, transformer_layers_per_block=[1, 2, 10])


def network(config):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**config)


@pytest.fixture(scope="module")
def sdxl():
    """Architecture and weights of a narrow SDXL."""
    weights = network(SDXL).state_dict()
    names = LAYOUTS["diffusers"].to_canonical(weights)
    return Architecture.from_state_dict(weights, 32), {names[name]: weight for name, weight in weights.items()}


@pytest.fixture
def plain(sdxl, tmp_path):
    """Tensors of the SDXL in the LDM layout, without metadata; what is to be beside them is for a test to say."""
    architecture, weights = sdxl
    names = LAYOUTS["ldm"].from_canonical(architecture.shapes)

    def write(markers=(), metadata=None, name="file.safetensors"):
        save_file({names[n]: w for n, w in weights.items()} | dict(markers), tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=ModelSampling.describe)
@pytest.mark.parametrize("form", ["ldm", "diffusers"])
def test_it_comes_back_from_a_file_in_every_form_and_through_pruning(sampling, form, sdxl, tmp_path):
    architecture, weights = sdxl
    save_unet(tmp_path / "teacher.safetensors", weights, architecture, layout=form, sampling=sampling)
    teacher = open_unet(tmp_path / "teacher.safetensors")
    assert teacher.sampling == sampling
    prune_file(teacher, tmp_path / "student.safetensors", preset("ssd-1b"))
    student = open_unet(tmp_path / "student.safetensors")
    assert student.sampling == sampling and student.markers.keys() == teacher.markers.keys()


@pytest.mark.parametrize("sampling", [EPS, V, ZTSNR, COSXL, PLAYGROUND], ids=ModelSampling.describe)
def test_what_comfyui_knows_of_an_sdxl_is_told_by_markers_alone(sampling, plain):
    assert open_unet(plain(sampling.markers("sdxl"))).sampling == sampling
    assert not sampling.loading_note("sdxl")


def test_markers_win_over_left_over_metadata_and_the_scheduler_over_both_of_none(plain, tmp_path):
    epsilon = {"modelspec.prediction_type": "epsilon"}
    assert open_unet(plain({"v_pred": EMPTY, "ztsnr": EMPTY}, epsilon)).sampling == ZTSNR
    assert open_unet(plain({}, {"modelspec.predict_key": "v"})).sampling == V  # as ComfyUI's own savers write it
    assert open_unet(plain({"ztsnr": EMPTY})).sampling == EPS  # which ComfyUI reads beside v_pred alone
    net = network(SDXL)
    net.save_pretrained(tmp_path / "pipe" / "unet")
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, epsilon)
    (tmp_path / "pipe" / "scheduler").mkdir()
    scheduler = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    for config, expected in {
        '{"prediction_type": "v_prediction", "rescale_betas_zero_snr": true}': ZTSNR,
        '{"_class_name": "EDMEulerScheduler", "sigma_max": 120.0, "sigma_min": 0.002, "prediction_type": "v_prediction"}': replace(
            COSXL, sigmas=(0.002, 120.0)
        ),
        '{"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}': ModelSampling(
            prediction="edm", noise=EDM, sigmas=(0.002, 80.0)
        ),
        '{"_class_name": "FlowMatchEulerDiscreteScheduler"}': ModelSampling(prediction="flow", noise=FLOW),
        '{"prediction_type": "epsilon", "beta_schedule": "linear"}': ModelSampling(noise=OTHER),
        '{"prediction_type": "sample"}': ModelSampling(prediction="x0"),
        '{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}': EPS,
    }.items():
        scheduler.write_text(config)
        for given in (tmp_path / "pipe", tmp_path / "pipe" / "unet", file):
            assert open_unet(given).sampling == expected, config


def test_an_sd2_that_predicts_v_is_known_by_its_weights_in_either_layout(tmp_path):
    net = network(SD2)
    sign = net.get_parameter("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")
    for spread, prediction in ((1.0, "v"), (0.05, "eps")):
        with torch.no_grad():
            sign.copy_(torch.linspace(-spread, spread, 64))
        net.save_pretrained(tmp_path / "unet")
        save_file(net.state_dict(), tmp_path / "one.safetensors")
        weights, names = net.state_dict(), LAYOUTS["diffusers"].to_canonical(net.state_dict())
        ldm = LAYOUTS["ldm"].from_canonical(names.values())
        save_file({ldm[names[n]]: w for n, w in weights.items()}, tmp_path / "ldm.safetensors")
        for file in ("unet", "one.safetensors", "ldm.safetensors"):
            teacher = open_unet(tmp_path / file)
            assert teacher.prediction == prediction, file
            prune_file(teacher, tmp_path / "student.safetensors", preset("bk-sdm-v2-small"), overwrite=True)
            save_file(load_file(tmp_path / "student.safetensors"), tmp_path / "student.safetensors")  # without our metadata
            assert open_unet(tmp_path / "student.safetensors").prediction == prediction, file


def test_zero_terminal_snr_is_that_of_diffusers_and_ends_in_noise():
    from diffusers import EulerDiscreteScheduler

    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    theirs, ours = EulerDiscreteScheduler(**betas).alphas_cumprod, zero_terminal_snr(scaled_linear())
    torch.testing.assert_close((ours.alphas**2)[:-1].float(), theirs[:-1], rtol=1e-4, atol=1e-8)
    assert ours.noise_ratio[-1] > 4000 and torch.equal(ours.alphas[0], scaled_linear().alphas[0])
    assert of_sampling(ModelSampling(noise=ZERO_SNR)) == ours and of_sampling(ModelSampling(noise=DISCRETE)) == scaled_linear()


@pytest.mark.parametrize(
    "text",
    ["[" * 100000, "5", "null", '{"x": 1}', '{"sigmas": 3}', '{"sigmas": [2, 1]}', '{"latent_mean": [1]}', '{"prediction": ["v"]}',
     '{"noise": "edm"}', '{"prediction": "w"}', '{"sigmas": ["a", "b"], "noise": "edm"}', '{"latent_mean": ["a"], "latent_std": ["b"]}'],
)  # fmt: skip
def test_damaged_metadata_are_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match="damaged"):
        read_sampling({}, {}, {"distill.sampling": text}, None)


@pytest.mark.parametrize(
    "markers",
    [{"edm_vpred.sigma_max": torch.tensor(float("nan"))}, {"edm_vpred.sigma_max": EMPTY}, {"edm_vpred.sigma_max": torch.tensor(-1.0)},
     {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.full((1, 4, 1, 1), float("inf"))},
     {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(3)}, {"edm_mean": torch.zeros(2048), "edm_std": torch.ones(2048)}],
)  # fmt: skip
def test_damaged_markers_are_refused_in_one_sentence(markers, plain):
    with pytest.raises(ValueError, match="damaged"):
        open_unet(plain(markers))


def test_what_no_file_can_tell_is_not_written(sdxl, tmp_path):
    architecture, weights = sdxl
    for form, sampling in {"ldm": ModelSampling(noise=OTHER), "diffusers": ModelSampling(prediction=OTHER)}.items():
        with pytest.raises(ValueError, match="a file cannot store"):
            save_unet(tmp_path / form, weights, architecture, layout=form, sampling=sampling)
    save_unet(tmp_path / "kept", weights, architecture, layout="diffusers", sampling=ModelSampling(noise=OTHER))
    assert open_unet(tmp_path / "kept").sampling == ModelSampling(noise=OTHER)


def test_a_person_is_told_where_stock_loaders_would_sample_the_file_otherwise():
    assert "Load Distilled Model" in V.loading_note("sd1") and "Load Distilled Model" in ZTSNR.loading_note("sd2")
    assert not EPS.loading_note("sd1") and not V.loading_note("sd2")
    assert "Load Distilled Model" in V.loading_note("sd2", in_channels=9) and not EPS.loading_note("sd2", in_channels=9)


# --- training


def recipe(folder, name, data, preset_name, objective):
    (folder / f"{name}.toml").write_text(
        f'run = "run {name}"\n[teacher]\nfile = "{name}.safetensors"\n[student]\npreset = "{preset_name}"\n'
        f'[data]\ncache = "{data}"\n[training]\ntotal_steps = 2\nbatch_size = 2\nobjective = "{objective}"\n'
    )
    return main(["train", str(folder / f"{name}.toml"), "--json"])


def cached(folder, pooled_width):
    writer, random = CacheWriter(folder), torch.Generator().manual_seed(0)
    for text in ("null", "text"):
        pooled = torch.randn(pooled_width, generator=random) if pooled_width else None
        writer.add_text(text, Caption(torch.randn(4, 16, generator=random), pooled))
    for n in range(4):
        writer.add_latent(f"latent {n}", torch.randn(4, 8, 8, generator=random))
    sizes = [64, 64, 0, 0, 64, 64] if pooled_width else None
    writer.finish([Entry(f"latent {n}", "text", sizes) for n in range(4)], "null")


def test_a_zero_snr_teacher_is_trained_as_one_and_its_student_says_so(plain, tmp_path, capsys):
    cached(tmp_path / "data", 1280)
    teacher = open_unet(plain(ZTSNR.markers("sdxl"), name="ztsnr.safetensors"))
    assert DiffusersDenoiser.of_file(teacher, torch.nn.Identity()).schedule == zero_terminal_snr(scaled_linear())
    assert recipe(tmp_path, "ztsnr", "data", "ssd-1b", "ssd-1b") == 0, capsys.readouterr().err
    (out,) = (tmp_path / "run ztsnr" / "checkpoints").glob("*2/student.safetensors")
    assert open_unet(out).sampling == ZTSNR and {"v_pred", "ztsnr"} <= load_file(out).keys()


@pytest.mark.parametrize(
    "sampling", [COSXL, PLAYGROUND, ModelSampling(prediction="flow", noise=FLOW)], ids=ModelSampling.describe
)
def test_what_cannot_be_trained_is_refused_before_data_are_read(sampling, plain, tmp_path, capsys):
    plain(sampling.markers("sdxl"), sampling.metadata(), name="other.safetensors")
    assert recipe(tmp_path, "other", "no such data", "ssd-1b", "ssd-1b") == 2
    error = capsys.readouterr().err
    assert "cannot be trained" in error and sampling.describe() in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("channels", [8, 9])
def test_models_that_read_more_than_a_latent_are_refused_before_data_are_read(channels, tmp_path, capsys):
    network(SMALL | {"in_channels": channels}).save_pretrained(tmp_path / "more.safetensors")
    assert recipe(tmp_path, "more", "no such data", "bk-sdm-small", "bk-sdm") == 2
    assert f"reads {channels} channels" in capsys.readouterr().err
