"""The bundled demo: a small Stable-Diffusion-shaped teacher of handwritten digits, its data and a classifier."""
