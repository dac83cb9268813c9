"""Parameter names of a UNet in three layouts: canonical, LDM and diffusers.

Canonical names follow the structure of the network, as in ``down.0.resnet.1.conv1.weight``,
``down.2.attn.0.block.3.attn1.to_q.weight``, ``mid.resnet.0.norm1.bias``, ``up.1.upsample.conv.weight``. ``up.0`` is the
innermost stage; the attention ``attn.j`` follows the resnet ``resnet.j`` of its stage. The LDM layout (CompVis,
ComfyUI, single-file checkpoints) numbers blocks in one running sequence, so its indices depend on what the network
contains; the diffusers layout only replaces words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..base.settings import check_choice

_LDM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embed.0": "time_embed.0",
    "time_embed.1": "time_embed.2",
    "label_embed.0": "label_emb.0.0",
    "label_embed.1": "label_emb.0.2",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_LDM_INNER = {
    "resnet": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsample": {"conv": "op"},
    "upsample": {"conv": "conv"},
}
_DIFFUSERS_ENDS = {
    "conv_in": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.1": "time_embedding.linear_2",
    "label_embed.0": "add_embedding.linear_1",
    "label_embed.1": "add_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_DIFFUSERS_WORDS = [
    ("down", "down_blocks"),
    ("up", "up_blocks"),
    ("mid", "mid_block"),
    ("resnet", "resnets"),
    ("attn", "attentions"),
    ("block", "transformer_blocks"),
    ("downsample", "downsamplers.0"),
    ("upsample", "upsamplers.0"),
]

_MODULE = re.compile(
    r"((?:down|up)\.\d+\.(?:resnet|attn)\.\d+|(?:down|up)\.\d+\.(?:downsample|upsample)|mid\.(?:resnet|attn)\.\d+"
    r"|(?:time|label)_embed\.\d|conv_in|norm_out|conv_out)(?:\.(.+))?$"
)


_MAX_PARTS = 24


class UnknownParameter(ValueError):
    """A parameter name that no UNet of the Stable Diffusion family has."""


_OTHER_NETWORKS = {
    "cond_proj.": "an LCM, which reads the guidance scale; use the model it was made from with an LCM-LoRA",
    "motion_modules.": "a video model (AnimateDiff)",
    "time_stack.": "a video model",
    "temporal_transformer_blocks.": "a video model",
    "temporal_res_block.": "a video model",
    "encoder_hid_proj.": "a UNet that reads images besides text",
    "add_embedding.image_": "a UNet that reads images (Kandinsky)",
    "class_embedding.": "a UNet that reads class labels, such as an upscaler",
    "label_emb.weight": "a UNet that reads class labels, such as an upscaler",
}
"""Part of a parameter's name that Stable Diffusion does not have -> the network that has it."""


def what_else(names: Iterable[str]) -> str | None:
    """Kind of network, from parameters that no UNet of the Stable Diffusion family has; None if it is not known."""
    return next((words for part, words in _OTHER_NETWORKS.items() if any(part in name for name in names)), None)


def split(name: str) -> tuple[str, str]:
    """Split a canonical name into its module and the rest: ``mid.attn.0``, ``block.0.norm1.weight``."""
    match = _MODULE.match(name)
    if not match:
        raise UnknownParameter(f"{name!r} is not the canonical name of a UNet parameter")
    return match[1], match[2] or ""


def kind(module: str) -> str:
    """``block`` (of a transformer), ``resnet``, ``attn``, ``downsample``, ``upsample`` or, for the ends of the network, its own name."""
    return next((word for word in ("block", "resnet", "attn", "downsample", "upsample") if f".{word}" in module), module)


ADDED_BY = {"resnet": ("conv2",), "attn": ("proj_out",), "block": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")}
"""By kind of block, the layers whose outputs it adds to its input, in order: zeros make it the identity."""


def heads(name: str) -> list[str]:
    """Heads of a dotted name, longest first: ``a.b.c``, ``a.b``, ``a``; at most as deep as any network's names."""
    parts = name.split(".", _MAX_PARTS)[:_MAX_PARTS]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _replace_head(name: str, table: dict[str, str]) -> str | None:
    """Replace the longest head of a dotted name found in the table; None if there is none."""
    head = next((head for head in heads(name) if head in table), None)
    return None if head is None else table[head] + name[len(head) :]


# --- LDM ------------------------------------------------------------------------------------------------------------


def _ldm_modules(modules: Iterable[str]) -> dict[str, str]:
    """Canonical module -> LDM module, for all modules of one network, whatever their order."""
    present = set(modules)
    stages = {side: sorted({int(m.split(".")[1]) for m in present if m.startswith(f"{side}.")}) for side in ("down", "up")}
    table = {module: path for module, path in _LDM_ENDS.items() if module in present}

    resnets: dict[str, list[int]] = defaultdict(list)
    for module in present:
        stage, is_one, number = module.partition(".resnet.")
        if is_one:
            resnets[stage].append(int(number))

    index = 0
    for n in stages["down"]:
        for j in sorted(resnets[stage := f"down.{n}"]):
            index += 1
            table[f"{stage}.resnet.{j}"] = f"input_blocks.{index}.0"
            if f"{stage}.attn.{j}" in present:
                table[f"{stage}.attn.{j}"] = f"input_blocks.{index}.1"
        if f"{stage}.downsample" in present:
            index += 1
            table[f"{stage}.downsample"] = f"input_blocks.{index}.0"
    middle = [m for m in ("mid.resnet.0", "mid.attn.0", "mid.resnet.1") if m in present]
    table |= {module: f"middle_block.{i}" for i, module in enumerate(middle)}
    index = -1
    for n in stages["up"]:
        for j in sorted(resnets[stage := f"up.{n}"]):
            index += 1
            table[f"{stage}.resnet.{j}"] = f"output_blocks.{index}.0"
            if has_attention := f"{stage}.attn.{j}" in present:
                table[f"{stage}.attn.{j}"] = f"output_blocks.{index}.1"
        if f"{stage}.upsample" in present:
            table[f"{stage}.upsample"] = f"output_blocks.{index}.{2 if has_attention else 1}"
    return table


def to_ldm(names: Iterable[str]) -> dict[str, str]:
    """Canonical -> LDM names, for all parameters of one network."""
    names = list(names)
    modules = _ldm_modules(dict.fromkeys(split(name)[0] for name in names))
    table = {}
    for name in names:
        module, rest = split(name)
        if (of_kind := kind(module)) == "attn":
            rest = re.sub(r"^block\.", "transformer_blocks.", rest)
        elif of_kind in _LDM_INNER:
            rest = _replace_head(rest, _LDM_INNER[of_kind]) or rest
        table[name] = f"{modules[module]}.{rest}".rstrip(".")
    return table


def from_ldm(names: Iterable[str]) -> dict[str, str]:
    """LDM -> canonical names, for all parameters of one network."""
    names = list(names)
    table = {}
    children: dict[tuple[str, int], dict[int, set[str]]] = {}
    for name in names:
        if match := re.match(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(\w+)", name):
            children.setdefault((match[1], int(match[2])), {}).setdefault(int(match[3]), set()).add(match[4])
    modules = {path: module for module, path in _LDM_ENDS.items()}
    middle = sorted({int(n.split(".")[1]) for n in names if n.startswith("middle_block.")})
    modules |= dict(zip((f"middle_block.{i}" for i in middle), ("mid.resnet.0", "mid.attn.0", "mid.resnet.1"), strict=False))
    for side, sequence in (("down", "input_blocks"), ("up", "output_blocks")):
        stage = resnet = 0
        for index in sorted(i for s, i in children if s == sequence and (s, i) != ("input_blocks", 0)):
            resampled = False
            for child, parts in sorted(children[sequence, index].items()):
                place = f"{sequence}.{index}.{child}"
                if "in_layers" in parts:
                    modules[place] = f"{side}.{stage}.resnet.{resnet}"
                elif "transformer_blocks" in parts or "proj_in" in parts:
                    modules[place] = f"{side}.{stage}.attn.{resnet}"
                else:
                    modules[place] = f"{side}.{stage}.{side}sample"
                    resampled = True
            stage, resnet = (stage + 1, 0) if resampled else (stage, resnet + 1)
    inner = {of_kind: {v: k for k, v in words.items()} for of_kind, words in _LDM_INNER.items()}
    for name in names:
        path = next((head for head in heads(name) if head in modules), None)
        if path is None:
            raise UnknownParameter(f"{name!r} is not the name of a UNet parameter in the LDM layout")
        module, rest = modules[path], name[len(path) + 1 :]
        if (of_kind := kind(module)) == "attn":
            rest = re.sub(r"^transformer_blocks\.", "block.", rest)
        elif of_kind in inner:
            rest = _replace_head(rest, inner[of_kind]) or rest
        table[name] = f"{module}.{rest}".rstrip(".")
    return table


# --- diffusers ------------------------------------------------------------------------------------------------------


def to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Canonical -> diffusers names."""
    table = {}
    for name in names:
        ends = _replace_head(name, _DIFFUSERS_ENDS)
        words = dict(_DIFFUSERS_WORDS)
        table[name] = ends or ".".join(words.get(part, part) for part in name.split("."))
    return table


def from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """diffusers -> canonical names."""
    ends = {path: module for module, path in _DIFFUSERS_ENDS.items()}
    table = {}
    for name in names:
        canonical = _replace_head(name, ends)
        if canonical is None:
            canonical = name
            for word, theirs in reversed(_DIFFUSERS_WORDS):
                canonical = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{word}", canonical)
            try:
                split(canonical)
            except UnknownParameter:
                raise UnknownParameter(f"{name!r} is not the name of a UNet parameter in the diffusers layout") from None
        table[name] = canonical
    return table


# --- the table of layouts -------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """One way to name parameters: two functions that map all names of a network to their translations."""

    to_canonical: Callable[[Iterable[str]], dict[str, str]]
    from_canonical: Callable[[Iterable[str]], dict[str, str]]
    first_weight: str
    """A parameter that every network in this layout has; it identifies the layout and the prefix of a file."""


LAYOUTS = {
    "ldm": Layout(from_ldm, to_ldm, "input_blocks.0.0.weight"),
    "diffusers": Layout(from_diffusers, to_diffusers, "down_blocks.0.resnets.0.norm1.weight"),
}


def layout_named(name: str) -> Layout:
    """Look a layout up by name; ``ValueError`` lists the choices."""
    check_choice(name, LAYOUTS, "unknown layout")
    return LAYOUTS[name]


def find_unet(names: Iterable[str]) -> tuple[str, str]:
    """Layout and prefix of the UNet among a file's parameter names; ``ValueError`` if there is none.

    The prefix is ``""`` for a bare UNet, ``"model.diffusion_model."`` for a full checkpoint.
    """
    names = set(names)
    for name, layout in LAYOUTS.items():
        for prefix in ("", "model.diffusion_model.", "diffusion_model.", "unet."):
            if prefix + layout.first_weight in names:
                return name, prefix
    raise ValueError(
        "it contains no Stable Diffusion UNet (neither input_blocks.* nor down_blocks.*), and no transformer of a known family in "
        "ComfyUI's names"
    )
