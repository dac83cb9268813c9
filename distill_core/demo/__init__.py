"""The bundled demo: small color scenes of emoji, a Stable-Diffusion-shaped teacher that draws them, and their judge."""
