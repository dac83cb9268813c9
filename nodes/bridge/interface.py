"""What a person sees of an execution: text on a node, the cancel button, the graph in a saved file."""

from __future__ import annotations

import json

import comfy.model_management
from comfy.cli_args import args


def show_text(text: str, node_id: str) -> None:
    """Show a line of text on the node; the next one replaces it."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, node_id)


def throw_if_cancelled() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def about_graph(prompt: dict | None, extra: dict | None) -> dict[str, str]:
    """The graph as entries of a file's header, by which dropping the file onto the canvas opens it; none with --disable-metadata."""
    if args.disable_metadata:
        return {}
    parts = {name: value for name, value in {"prompt": prompt, **(extra or {})}.items() if value is not None}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in parts.items()}
