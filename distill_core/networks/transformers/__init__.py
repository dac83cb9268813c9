"""Diffusion transformers: families, one module each, and what a checkpoint of one is made of."""
