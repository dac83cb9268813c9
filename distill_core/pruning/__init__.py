"""Pruning: plans of which blocks to remove, and the student that remains."""
