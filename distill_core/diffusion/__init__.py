"""Noise schedules and ranges of timesteps, denoisers and their conditioning, sampling and guidance."""
