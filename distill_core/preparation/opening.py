"""Which models a recipe names: UNets, or a transformer."""

from __future__ import annotations

from ..networks.network import open_network
from ..networks.transformers.files import TransformerFile
from ..recipe import DEMO, Recipe, TeacherSettings
from ..training.processes import Processes
from .models import Models
from .transformers import TransformerModels
from .unets import UNetModels


def open_models(recipe: Recipe, processes: Processes) -> Models:
    """The models of a recipe. ``ValueError`` if they cannot be trained together."""
    teachers = recipe.teachers
    named = teachers[0].file if teachers else recipe.student.file
    first = None if named is None or named == DEMO else open_network(recipe.path(named))
    if isinstance(first, TransformerFile):
        return TransformerModels(recipe, processes, first)
    if not teachers:  # fine-tuning: sample images are compared with those of the untrained student
        assert recipe.student.file is not None  # `Recipe.read` asks for it
        teachers = (TeacherSettings(file=recipe.student.file),)
    return UNetModels(recipe, processes, teachers)
