"""Shipped workflows with other values in some widgets, so that two CPU cores do."""

from __future__ import annotations


def shortened(graph: dict, known: dict, *changes: dict[str, dict]) -> dict:
    """The graph, changed in place. known: what the server tells of its nodes. changes: values by type of node and name."""
    for node in graph["nodes"]:
        for changed in changes:
            for name, value in changed.get(node["type"], {}).items():
                node["widgets_values"][_names(known[node["type"]]).index(name)] = value
    return graph


def _names(told: dict) -> list[str]:
    """Of the values that a graph keeps for a node, in order."""
    names = []
    for name, (kind, *options) in (told["input"].get("required", {}) | told["input"].get("optional", {})).items():
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            names += [name] + ["after"] * bool(options and options[0].get("control_after_generate"))
    return names
