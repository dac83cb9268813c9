"""Distill: make a diffusion checkpoint smaller and faster, and understand what came out.

Modules, in the order a job passes through them: `files` and `architecture` read a checkpoint, `plan` says which blocks
go, `unet` and `denoiser` make networks of it, `dataset`, `objective` and `run` train the student, `sampling` and
`evaluate` show what it can do.
"""

__version__ = "0.3.0"
