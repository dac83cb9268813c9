"""From a recipe to a training: files open, data encoded or drawn, the run's folder checked."""

from .data import Data
from .prepared import Prepared, prepare

__all__ = ["Data", "Prepared", "prepare"]
