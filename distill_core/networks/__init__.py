"""Checkpoints of UNets: architecture, parameter names and sampling, and the networks built from them."""
