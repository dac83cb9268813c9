"""Losses, the training loop, runs on disk, and the memory they need."""
