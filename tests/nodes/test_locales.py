"""What the front end shows is said in every language: ``python -m tests.nodes.test_locales`` writes the English from the nodes.

The front end has no tooltip of its own for inputs that appear one by one (`models.model_1`), so English has a file too.
"""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from .. import comfyui

LOCALES = comfyui.ROOT / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir())
OTHERS = [language for language in LANGUAGES if language != "en"]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
TYPED_BY_USERS = re.compile(r"\w+(?:/\w+)+|\w+\.(?:csv|json)|[A-Z]+_[A-Z_]+")
"""Paths, files, variables."""


def english(nodes: dict) -> dict:
    """``nodeDefs.json`` of the nodes as the server describes them (``object_info``)."""
    return {name: _texts(info) for name, info in nodes.items() if info["category"] == "distill"}


def _texts(info: dict) -> dict:
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    inputs = dict(_inputs(info["input"]))
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        **({"inputs": inputs} if inputs else {}),
        "outputs": {str(number): {"name": name, "tooltip": tooltip} for number, (name, tooltip) in enumerate(outputs)},
    }


def _inputs(sections: dict, within: str = ""):
    """Key and texts of every input, the front end's way: those within another have its name in front."""
    for section in ("required", "optional"):
        for name, (_, *rest) in sections.get(section, {}).items():
            options = rest[0] if rest else {}
            yield within + name, {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}
            if template := options.get("template"):
                ((_, inner),) = template["input"]["required"].values()
                for one in template["names"]:
                    yield f"{within}{name}_{one}", {"name": one, "tooltip": inner["tooltip"]}
            for choice in options.get("options", ()):
                if isinstance(choice, dict):
                    yield from _inputs(choice["inputs"], f"{within}{name}_")


def texts(messages: dict, path: str = "") -> dict[str, str]:
    """Every text by the path of its keys."""
    found = {}
    for key, value in messages.items():
        found |= texts(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value}
    return found


def read(language: str) -> dict[str, dict[str, str]]:
    """File name -> texts."""
    return {file.name: texts(json.loads(file.read_text("utf-8"))) for file in sorted((LOCALES / language).glob("*.json"))}


@pytest.fixture(scope="module", params=OTHERS)
def pairs(request) -> dict[str, tuple[str, str]]:
    """Path of every text -> the English and the other."""
    ours, theirs = ({f"{file}/{path}": text for file, found in read(name).items() for path, text in found.items()}
                    for name in ("en", request.param))  # fmt: skip
    return {path: (ours[path], theirs[path]) for path in ours.keys() & theirs.keys()}


def test_there_is_another_language():
    assert OTHERS and "en" in LANGUAGES


def test_english_is_what_the_nodes_say(server):
    written = json.loads((LOCALES / "en" / "nodeDefs.json").read_text("utf-8"))
    assert written == english(server.get("object_info")), "run: python -m tests.nodes.test_locales"


def test_the_server_gives_out_every_language(server):
    given = server.get("i18n")
    for language in LANGUAGES:
        files = {f"{key}.json": texts(messages) for key, messages in given[language].items() if key == "nodeDefs"}
        assert files["nodeDefs.json"] == read(language)["nodeDefs.json"]
        assert given[language]["nodeCategories"]["distill"]


@pytest.mark.parametrize("language", OTHERS)
def test_keys_are_those_of_english(language):
    ours, theirs = read("en"), read(language)
    assert theirs.keys() == ours.keys()
    for file in ours:
        missing, needless = ours[file].keys() - theirs[file].keys(), theirs[file].keys() - ours[file].keys()
        assert not missing and not needless, f"{language}/{file} lacks {sorted(missing)} and has no use for {sorted(needless)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_can_be_shown(language):
    for file, found in read(language).items():
        for path, text in found.items():
            assert isinstance(text, str) and text.strip() == text and text, f"{file}: {path} is {text!r}"
            if not path.endswith("tooltip"):  # tooltips are shown as they are, the others are templates to the front end
                assert not set("{}|@") & set(text), f"{file}: {path} has a sign of vue-i18n's"


def test_descriptions_and_tooltips_are_translated(pairs):
    said = {path: other for path, (english_text, other) in pairs.items() if path.endswith(("tooltip", "description"))}
    same = [path for path, other in said.items() if other == pairs[path][0]]
    assert said and not same


def test_numbers_survive(pairs):
    for path, (ours, theirs) in pairs.items():
        assert Counter(NUMBER.findall(theirs)) == Counter(NUMBER.findall(ours)), f"{path}: {ours} / {theirs}"


def test_paths_survive(pairs):
    found = [(path, word) for path, (ours, _) in pairs.items() for word in TYPED_BY_USERS.findall(ours)]
    assert found
    assert not [(path, word) for path, word in found if word not in pairs[path][1]]


def test_choices_are_called_as_the_node_lists_them(pairs, server):
    """The front end does not translate what a combo offers, so an explanation of it must not either."""
    for node, info in server.get("object_info").items():
        if info["category"] != "distill":
            continue
        for name, (kind, options) in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            if kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
                ours, theirs = pairs[f"nodeDefs.json/{node}/inputs/{name}/tooltip"]
                choices = [choice["key"] if isinstance(choice, dict) else choice for choice in options["options"]]
                told = [choice for choice in choices if re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", ours)]
                assert not [choice for choice in told if choice not in theirs], f"{node}.{name}: {theirs}"


def test_names_are_the_same_in_every_text(pairs):
    """A text that names a node or an input of its own node says what the screen says there."""
    nodes = {ours: theirs for path, (ours, theirs) in pairs.items() if path.endswith("/display_name")}
    by_length = re.compile("|".join(sorted(map(re.escape, nodes), key=len, reverse=True)))
    for path, (ours, theirs) in pairs.items():
        if not path.startswith("nodeDefs.json"):
            continue
        for name in by_length.findall(ours):
            assert nodes[name] in theirs, f"{path}: {name} is {nodes[name]} there"
        node = path.split("/")[1]
        for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", ours) if path.endswith(("tooltip", "description")) else ():
            names = [pairs.get(f"nodeDefs.json/{where}/inputs/{key}/name")
                     for where in (node, "DistillTrainStep") for key in (word, f"models_{word}")]  # fmt: skip
            shown = next((found[1] for found in names if found), word)
            assert shown in theirs, f"{path}: {word} is {shown} there"


if __name__ == "__main__":
    place = comfyui.find()
    with tempfile.TemporaryDirectory() as base, comfyui.Server(place, comfyui.python(place), Path(base)) as running:
        messages = json.dumps(english(running.get("object_info")), ensure_ascii=False, indent=2)
    (LOCALES / "en" / "nodeDefs.json").write_text(messages + "\n", "utf-8")
    for language in OTHERS:
        lacking = read("en")["nodeDefs.json"].keys() - read(language).get("nodeDefs.json", {}).keys()
        print(f"{language} lacks {len(lacking)}", *sorted(lacking), sep="\n  ")
