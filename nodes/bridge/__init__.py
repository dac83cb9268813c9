"""The one package that knows both ComfyUI (MODEL, CLIP, VAE, LATENT, CONDITIONING) and distill_core."""

from .asking import examples_of
from .bench import run_bench
from .build import demo_teacher, load_student, make_student, precision_note, prune_model, save_model
from .compare import SampleSettings, compare_models, image_features, text_features
from .data import blank_latents, calibration, check_samples, dataset, encoded_captions, make_data, num_captions, previews
from .demo import DemoVAE, demo_clip, demo_data, demo_transformer
from .experts import load_experts, route_experts, with_lora_file
from .fingerprints import experts_written, file_written, fingerprint_of
from .folders import data_folder, experts_folder, experts_folders, file_in, output_path, run_folder
from .images import pixels_of, thumbnail, to_image
from .interface import about_graph, show_text
from .lessons import lesson_of, sampled, train_on_base
from .model import Model, with_lora
from .presets import serve_presets
from .progress import Progress
from .router import boundary_sigmas, describe_route, route_models, sample_routed, share_boundaries, sorted_boundaries
from .runs import SEEN_RUNS, losses_of, losses_written, serve_runs
from .shared_base import draw_latents, drawn_fingerprint, opened_base, shared_base, with_gradients
from .training import check_trainable, denoiser, forecast_memory, free_bytes, predict_alike, release_memory, trainable
from .watch import Watch, refit_progress, show_run, tell_needs

__all__ = [
    "DemoVAE",
    "Model",
    "Progress",
    "SEEN_RUNS",
    "SampleSettings",
    "Watch",
    "about_graph",
    "blank_latents",
    "boundary_sigmas",
    "calibration",
    "check_samples",
    "check_trainable",
    "compare_models",
    "data_folder",
    "dataset",
    "demo_clip",
    "demo_data",
    "demo_teacher",
    "demo_transformer",
    "denoiser",
    "describe_route",
    "draw_latents",
    "drawn_fingerprint",
    "encoded_captions",
    "examples_of",
    "experts_folder",
    "experts_folders",
    "experts_written",
    "file_in",
    "file_written",
    "fingerprint_of",
    "forecast_memory",
    "free_bytes",
    "image_features",
    "lesson_of",
    "load_experts",
    "load_student",
    "losses_of",
    "losses_written",
    "make_data",
    "make_student",
    "num_captions",
    "opened_base",
    "output_path",
    "pixels_of",
    "precision_note",
    "predict_alike",
    "previews",
    "prune_model",
    "refit_progress",
    "release_memory",
    "route_experts",
    "route_models",
    "run_bench",
    "run_folder",
    "sample_routed",
    "sampled",
    "save_model",
    "serve_presets",
    "serve_runs",
    "share_boundaries",
    "shared_base",
    "show_run",
    "show_text",
    "sorted_boundaries",
    "tell_needs",
    "text_features",
    "thumbnail",
    "to_image",
    "train_on_base",
    "trainable",
    "with_gradients",
    "with_lora",
    "with_lora_file",
]
