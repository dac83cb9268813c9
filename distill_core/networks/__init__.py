"""Checkpoints of UNets and transformers: architecture, parameter names and sampling, and the networks built from them."""
