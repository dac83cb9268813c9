"""Foundations that do not depend on diffusion: files, locks, settings, precisions, seeds."""
