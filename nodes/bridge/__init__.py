"""The one package that knows both ComfyUI (MODEL, CLIP, VAE, LATENT, CONDITIONING) and distill_core."""

from .asking import examples_of
from .bench import run_bench
from .build import demo_teacher, load_student, make_student, precision_note, prune_model, save_model
from .compare import SampleSettings, compare_models, image_features, text_features
from .data import blank_latents, calibration, dataset, encoded_captions, make_data, num_captions, previews
from .demo import DemoVAE, demo_clip, demo_data, demo_transformer
from .experts import load_experts, route_experts, with_lora_file
from .folders import data_folder, experts_folder, experts_folders, file_in, output_path, run_folder
from .images import pixels_of, thumbnail, to_image
from .interface import about_graph, show_text
from .model import Model, with_lora
from .presets import serve_presets
from .progress import Progress
from .router import boundary_sigmas, describe_route, route_models, sample_routed, share_boundaries, sorted_boundaries
from .runs import SEEN_RUNS, losses_of, losses_written, serve_runs, tell_chart
from .shared_base import (
    check_healing,
    check_shares_weights,
    describe_memory,
    draw_latents,
    drawn_fingerprint,
    forecast_base,
    forecast_shared_base,
    opened_base,
    shared_base,
    with_gradients,
)
from .training import (
    check_trainable,
    denoiser,
    forecast_memory,
    free_bytes,
    memory_in_use,
    predict_alike,
    release_memory,
    trainable,
)

__all__ = [
    "SEEN_RUNS",
    "DemoVAE",
    "SampleSettings",
    "Model",
    "Progress",
    "predict_alike",
    "about_graph",
    "blank_latents",
    "boundary_sigmas",
    "calibration",
    "check_healing",
    "check_shares_weights",
    "check_trainable",
    "compare_models",
    "data_folder",
    "dataset",
    "demo_clip",
    "demo_data",
    "demo_teacher",
    "demo_transformer",
    "denoiser",
    "describe_memory",
    "forecast_base",
    "describe_route",
    "draw_latents",
    "drawn_fingerprint",
    "examples_of",
    "file_in",
    "forecast_memory",
    "forecast_shared_base",
    "free_bytes",
    "load_student",
    "load_experts",
    "losses_of",
    "losses_written",
    "make_data",
    "make_student",
    "memory_in_use",
    "num_captions",
    "opened_base",
    "output_path",
    "image_features",
    "pixels_of",
    "precision_note",
    "previews",
    "prune_model",
    "release_memory",
    "route_models",
    "route_experts",
    "run_bench",
    "run_folder",
    "sample_routed",
    "save_model",
    "serve_presets",
    "serve_runs",
    "share_boundaries",
    "shared_base",
    "show_text",
    "sorted_boundaries",
    "experts_folder",
    "experts_folders",
    "tell_chart",
    "text_features",
    "thumbnail",
    "to_image",
    "encoded_captions",
    "trainable",
    "with_gradients",
    "with_lora",
    "with_lora_file",
]
