"""Shipped workflows with other values in some widgets, so that two CPU cores do."""

from __future__ import annotations


def shortened(graph: dict, known: dict, *changes: dict[str, dict]) -> dict:
    """The graph, changed in place. known: what the server tells of its nodes. changes: values by type of node and name."""
    for node in graph["nodes"]:
        for changed in changes:
            for name, value in changed.get(node["type"], {}).items():
                node["widgets_values"][widgets(known[node["type"]]).index(name)] = value
    return graph


def widgets(told: dict) -> list[str]:
    """Names of the values that a graph keeps for a node, in order."""
    names = []
    for name, (kind, *options) in inputs(told).items():
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            names += [name] + ["after"] * bool(options and options[0].get("control_after_generate"))
    return names


def inputs(told: dict) -> dict:
    """Inputs of a node by name: its kind or list of choices, and its options."""
    return told["input"].get("required", {}) | told["input"].get("optional", {})


def misfits(graph: dict, known: dict) -> list[str]:
    """Values of widgets that the server would refuse.

    Not those of lists of files, which are another person's, nor of nodes whose widgets depend on what is chosen in one.
    """
    found = []
    for node in graph["nodes"]:
        if (told := known.get(node["type"])) and isinstance(node.get("widgets_values"), list):
            asked = inputs(told)
            if any(str(kind).startswith("COMFY_DYNAMICCOMBO") for kind, *_ in asked.values()):
                continue
            for name, value in zip(widgets(told), node["widgets_values"], strict=False):
                if name != "after" and not _fits(value, *asked[name]):
                    found.append(f"{node['type']} {node['id']}: {name} {value!r}")
    return found


def _fits(value: object, kind: str | list, options: dict | None = None) -> bool:
    choices = kind if isinstance(kind, list) else (options or {}).get("options")
    if choices is not None:
        return value in choices or str(value).endswith((".safetensors", ".png"))
    low, high = ((options or {}).get(name) for name in ("min", "max"))
    if kind in ("INT", "FLOAT"):
        is_number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
        return is_number and (low is None or low <= value) and (high is None or value <= high)
    return isinstance(value, bool if kind == "BOOLEAN" else str)
