"""Experts: several students of one teacher, each for a range of timesteps."""
