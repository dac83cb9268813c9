"""What Distill Train Step tells of memory before it trains."""

import json

from .graphs import PROMPT, save, train


def test_a_run_logs_the_parts_before_its_first_step(server):
    prompt = {**PROMPT, "train": train("memory", total_steps=1), "s": save(["train", 0], "memory")}
    before = len(server.log.read_text())
    result = server.run(prompt)
    assert result.succeeded, result.error
    log = server.log.read_text()[before:]
    assert log.index("The most memory is needed in") < log.index("teacher weights") < log.index("total  ")


def test_the_node_shows_the_total_or_what_to_change(in_comfyui, tmp_path):
    in_comfyui("tell_memory", tmp_path / "told.json")
    (free, enough, _), (_, short, log) = json.loads((tmp_path / "told.json").read_text())
    assert free > 1 << 28 and enough.startswith("a step needs about 0.0") and "\n" not in enough
    first, *advice = short.splitlines()
    assert "0.03 GiB is free" in first and advice and not any("teacher" in line for line in advice)
    assert "teacher weights" in log and short in log
