"""Plans made for a user's own transformer: which runs of its blocks become one, without training.

Contiguous runs beat scattered blocks in large text-to-image transformers, and a run that a linear map nearly replaces costs
least to fold (PPCL: OPPO 2025, https://github.com/OPPO-Mente-Lab/Qwen-Image-Pruning). So the score of a run is what the best
affine map from its input to its output leaves over, by ridge regression on the model's own activations, each token's vector
divided by its length as in that paper's loss. That takes one pass through the network for all runs together, and forward
passes alone, so quantised models are scored as they run. For comparison there are the error of the output when the blocks that a
run loses are skipped (a pass for each run), and how much a run turns its input, which is known to be weak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.settings import SEEDS, check_settings, setting
from ..diffusion.distance import finite, mean_square, squared_error
from ..diffusion.transformers import skipping_blocks
from ..networks.transformers.architecture import Transformer, ranges
from .folding import HEAD, TAIL, between, middle
from .folding import runs as runs_by_place
from .plan import PruningPlan, name_map, pruned
from .plan_text import write_plan
from .recover import RIDGES

CRITERIA = {
    "linear replaceability": "what the best linear map in a run's place misses of the run's output",
    "output error": "error of the output when the blocks that the run loses are skipped; a pass through the model for each run",
    "similarity": "how much the run changes its input",
}
BY_PLACE = "their places alone"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How runs are scored, and how much to save."""

    saving: float = setting(0.3, "Share of the parameters to save, at least: 0.3 is 30 % less.", within=(0.01, 0.9))
    criterion: str = setting(
        "linear replaceability", " ".join(f"{name}: {what}." for name, what in CRITERIA.items()), choices=CRITERIA
    )
    longest_run: int = setting(3, "Most blocks in a row that become one.", within=(2, 12))
    first_stay: int = setting(
        HEAD, "Blocks at the beginning of the first list that stay as they are: losing early blocks hurts most.", within=(0, 100)
    )
    last_stay: int = setting(TAIL, "Blocks at the end of each list that stay as they are.", within=(0, 100))
    num_timesteps: int = setting(4, "Number of evenly spaced noise levels to measure at.", within=(1, 1000))
    num_examples: int = setting(2, "Number of images to measure on. More take more time.", within=(1, 4096))
    num_tokens: int = setting(
        1024, "Tokens of these images that linear maps are fitted to, and tested on. More are more exact.", within=(16, 65_536)
    )
    seed: int = setting(0, "Decides which images and tokens are used, and the noise.", within=SEEDS)

    def __post_init__(self):
        check_settings(self)


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Blocks in a row, of which the middle one would stay."""

    path: str
    """List that they are in."""
    numbers: tuple[int, ...]

    @property
    def lost(self) -> frozenset[str]:
        """Blocks that would go."""
        return frozenset(f"{self.path}.{number}" for number in self.numbers if number != middle(self.numbers))

    def name(self, teacher: Transformer) -> str:
        return f"{teacher.lists[self.path].word} {ranges(self.numbers)}"


def candidates(teacher: Transformer, settings: Settings) -> list[Run]:
    """Runs that may be folded; ``ValueError`` if there is none."""
    found = []
    for path in teacher.lists:
        numbers = teacher.numbers(path)
        free = between(numbers, *_ends_of(path, teacher, settings))
        for length in range(2, settings.longest_run + 1):
            found += [Run(path, tuple(free[start : start + length])) for start in range(len(free) - length + 1)]
    if not found:
        lists = ", ".join(f"{word} {numbers}" for word, numbers in teacher.describe_lists().items())
        raise ValueError(
            f"this {teacher.title} ({lists}) has no two blocks in a row that may be folded; let fewer stay at the ends"
        )
    return found


def _ends_of(path: str, teacher: Transformer, settings: Settings) -> tuple[int, int]:
    """How many blocks stay at the beginning and at the end of a list."""
    is_first = path == next(iter(teacher.lists))
    return settings.first_stay if is_first else 0, max(settings.last_stay, int(teacher.lists[path].last_stays))


@dataclass(frozen=True)
class Score:
    """What folding one run does, and saves."""

    run: Run
    left_over: float
    """Square of what the best linear map misses of a token's output vector of length 1, averaged over tokens it was not fitted to."""
    change: float
    """1 - cosine similarity of a token's vector before and after the run."""
    output_error: float | None
    """Mean squared error of the output over its mean square; None if it was not measured."""
    parameters: int
    """That its lost blocks hold."""

    def by(self, criterion: str) -> float:
        value = {
            "linear replaceability": self.left_over,
            "output error": self.output_error,
            "similarity": self.change,
        }[criterion]
        if value is None:
            raise ValueError(f"the {criterion} was not measured")
        return value


@dataclass(frozen=True)
class Analysis:
    """A transformer's runs with their scores."""

    teacher: Transformer
    scores: tuple[Score, ...]
    settings: Settings

    @property
    def measured(self) -> list[str]:
        """Criteria that were measured, the one that decides first."""
        others = [name for name in CRITERIA if name != self.settings.criterion]
        return [self.settings.criterion, *(name for name in others if name != "output error")]


# --- measuring ------------------------------------------------------------------------------------------------------

Predict = Callable[[], Tensor]
"""Asks the network for one example at one noise level, as often as it is called."""


@dataclass(frozen=True)
class Examples:
    """What a network is asked: some images, one after another, each at some noise levels."""

    num_images: int
    num_levels: int
    visit: Callable[[Callable[[Predict], None]], None]
    """Calls a function with a `Predict` for every image at every noise level, always in the same order."""

    @property
    def count(self) -> int:
        return self.num_images * self.num_levels


def analyse(
    network: nn.Module,
    teacher: Transformer,
    examples: Examples,
    settings: Settings,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Scores of every run that may be folded; the network is only read.

    network: the transformer, its lists of blocks under ComfyUI's names or those of diffusers. ``on_part(done, total)`` is called before the
    first part and after each; an error it raises ends the measuring.
    """
    found = candidates(teacher, settings)
    of_run = settings.criterion == "output error"
    rows, errors, done = _Rows(teacher, settings, examples), [0.0] * len(found), 0
    total = examples.count * (1 + of_run * len(found)) + len(found)
    on_part(0, total)

    def measure(predict: Predict) -> None:
        nonlocal done
        with rows.watching(network):
            answer = finite(predict())
        on_part(done := done + 1, total)
        for place, run in enumerate(found if of_run else ()):
            errors[place] += _error(network, teacher, predict, answer, run.lost) / examples.count
            on_part(done := done + 1, total)

    examples.visit(measure)
    sizes, scores = _sizes(teacher), []
    for run, error in zip(found, errors, strict=True):
        left_over, change = rows.score(run)
        saved = sum(sizes[block] for block in run.lost)
        scores.append(Score(run, left_over, change, error if of_run else None, saved))
        on_part(done := done + 1, total)
    return Analysis(teacher, tuple(scores), settings)


def _error(network: nn.Module, teacher: Transformer, predict: Predict, answer: Tensor, removed: Iterable[str]) -> float:
    with skipping_blocks(network, teacher, removed):
        other = finite(predict())
    return (squared_error(other, answer).mean() / mean_square(answer).mean()).item()


def _sizes(teacher: Transformer) -> dict[str, int]:
    """Parameters in each block."""
    held: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in teacher.shapes.items():
        held.setdefault(".".join(name.split(".")[:2]), {})[name] = shape
    return {block: replace(teacher, shapes=shapes).num_parameters for block, shapes in held.items()}


class _Rows:
    """Vectors of a few tokens as they enter every block, on the CPU."""

    def __init__(self, teacher: Transformer, settings: Settings, examples: Examples):
        self.teacher, self.examples = teacher, examples
        self._each = max(1, settings.num_tokens // examples.count)
        self._random = torch.Generator().manual_seed(settings.seed)
        self._found: dict[tuple[str, int], list[list[Tensor]]] = {}
        """By list and place in it: for each call, the vectors of each stream. The place after a list's last block is its end."""
        self._halves: list[int] = []

    @contextlib.contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """While open, collect from one pass through the network."""
        image, level = divmod(len(self._halves), self.examples.num_levels)
        self._halves.append((image + level) % 2)
        picked: dict[tuple[str, int], Tensor] = {}
        with contextlib.ExitStack() as stack:
            for path, blocks in self.teacher.lists.items():
                numbers = self.teacher.numbers(path)
                for number in numbers:
                    module = network.get_submodule(f"{path}.{number}")

                    def entering(_, args, named, path=path, number=number, blocks=blocks):
                        self._keep(path, number, blocks.given(args, named), picked)

                    stack.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)

                    def leaving(_, args, output, path=path, number=number + 1):
                        self._keep(path, number, output, picked)

                    if number == numbers[-1]:
                        stack.callback(module.register_forward_hook(leaving).remove)
            yield

    def _keep(
        self, path: str, number: int, given: Tensor | Sequence[Tensor | None], picked: dict[tuple[str, int], Tensor]
    ) -> None:
        """Copies: some blocks write over their input."""
        streams = []
        for place, stream in enumerate([given] if isinstance(given, Tensor) else given):
            if stream is None:  # the last block of some needs no text
                continue
            vectors = stream.flatten(0, -2)
            if (path, place) not in picked:
                picked[path, place] = torch.randperm(len(vectors), generator=self._random)[: self._each]
            streams.append(vectors[picked[path, place].to(vectors.device)].to("cpu", torch.float32))
        self._found.setdefault((path, number), []).append(streams)

    def score(self, run: Run) -> tuple[float, float]:
        """What the best linear map leaves over of a run, and how much the run changes its input, averaged over streams."""
        calls = list(zip(self._found[run.path, run.numbers[0]], self._found[run.path, run.numbers[-1] + 1], strict=True))
        left_over, changes = [], []
        for place in range(min(len(streams) for call in calls for streams in call)):
            x, y = (torch.cat([call[side][place] for call in calls]) for side in range(2))
            half = torch.cat([
                torch.full((len(call[0][place]),), half) for call, half in zip(calls, self._halves, strict=True)
            ])  # fmt: skip
            left_over.append(left_over_by_linear_map(x, y, half))
            changes.append(1 - torch.nn.functional.cosine_similarity(x, y).mean().item())
        return sum(left_over) / len(left_over), sum(changes) / len(changes)


def left_over_by_linear_map(x: Tensor, y: Tensor, half: Tensor) -> float:
    """What the best affine map from x to y, both (N, D), leaves over of y, each of whose rows counts as a vector of length 1.

    half: (N,), 0 or 1. Each half is predicted by the map that ridge regression fits to the other, at the strength of
    `recover.RIDGES` that does best. 1 if there is only one half.
    """
    if len(half.unique()) < 2:
        return 1.0
    weight = 1 / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    added, x = (y - x) * weight, x * weight
    sums = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fitted_to in range(2):
        own, other = half == fitted_to, half != fitted_to
        mean_x, mean_added = ((weight[own] * rows[own]).sum(0) / weight[own].square().sum() for rows in (x, added))
        rows, adds = x - weight * mean_x, added - weight * mean_added
        # In as many dimensions as there are rows, which are fewer than channels; `shrunk` is what each of them counts for.
        gram, across = (rows[side].double() @ rows[own].double().T for side in (own, other))
        strengths, directions = torch.linalg.eigh(gram)
        across, targets, wanted = across @ directions, directions.T @ adds[own].double(), adds[other].double()
        agreeing, squares = ((across.T @ wanted) * targets).sum(1), (targets @ targets.T) * (across.T @ across)
        for place, ridge in enumerate(RIDGES):
            shrunk = 1 / (strengths.clamp_min(0) + ridge * gram.diagonal().mean() + 1e-12)
            sums[place] += wanted.square().sum() - 2 * shrunk @ agreeing + shrunk @ squares @ shrunk
    return sums.min().item() / len(y)


# --- plans ----------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Runs to fold together, the sum of their scores, and the parameters they save."""

    cost: float = 0.0
    saving: int = 0
    runs: tuple[Run, ...] = ()

    def __or__(self, other: Choice) -> Choice:
        return Choice(self.cost + other.cost, self.saving + other.saving, self.runs + other.runs)


@dataclass(frozen=True)
class Planner:
    """Chooses runs that do not overlap, by their scores."""

    analysis: Analysis
    criterion: str
    """Key of `CRITERIA`."""

    def plan(self) -> PruningPlan:
        """The plan of least summed score that saves enough; ``ValueError`` if none does."""
        return plan_of(self.choose().runs, self.analysis.teacher)

    def choose(self) -> Choice:
        """The runs that `plan` folds."""
        analysis, best = self.analysis, [Choice()]
        for path in analysis.teacher.lists:
            best = _undominated(a | b for a in best for b in self._of_list(path))
        wanted = analysis.settings.saving * analysis.teacher.num_parameters
        enough = [choice for choice in best if choice.saving >= wanted]
        if not enough:
            most = max(choice.saving for choice in best) / analysis.teacher.num_parameters
            raise ValueError(
                f"folding at most {analysis.settings.longest_run} blocks into one saves {most:.0%} of the parameters at most, not "
                f"{analysis.settings.saving:.0%}; ask for less, or allow longer runs (longest_run) or fewer blocks that stay"
            )
        return min(enough)

    def _of_list(self, path: str) -> list[Choice]:
        """The best choices in one list for every saving."""
        ending: dict[int, list[Score]] = {}
        for score in self.analysis.scores:
            if score.run.path == path:
                ending.setdefault(score.run.numbers[-1], []).append(score)
        up_to = {-1: [Choice()]}
        for number in range(max(ending, default=-1) + 1):
            longer = (
                before | Choice(score.by(self.criterion), score.parameters, (score.run,))
                for score in ending.get(number, ())
                for before in up_to[score.run.numbers[0] - 1]
            )
            up_to[number] = _undominated([*up_to[number - 1], *longer])
        return up_to[max(up_to)]


def _undominated(choices: Iterable[Choice]) -> list[Choice]:
    """Choices that cost less than every other that saves as much."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (-choice.saving, choice.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def plan_of(runs: Sequence[Run], teacher: Transformer) -> PruningPlan:
    """The plan that folds some runs."""
    fold: dict[str, tuple[tuple[int, int], ...]] = {}
    for run in runs:
        word = teacher.lists[run.path].word
        fold[word] = (*fold.get(word, ()), (run.numbers[0], run.numbers[-1]))
    plan = PruningPlan(name="folded", fold=fold)
    return PruningPlan(name=write_plan(plan, teacher), fold=fold)


def plan_by_place(choice: Choice, analysis: Analysis) -> PruningPlan | None:
    """The plan that takes as many blocks from each list by their places alone; None if that rule cannot take so many."""
    settings, found = analysis.settings, []
    for path in analysis.teacher.lists:
        lost = sum(len(run.numbers) - 1 for run in choice.runs if run.path == path)
        head, tail = _ends_of(path, analysis.teacher, settings)
        try:
            runs = runs_by_place(analysis.teacher.numbers(path), lost, head=head, tail=tail)
        except ValueError:
            return None
        found += [Run(path, tuple(run)) for run in runs]
    return plan_of(found, analysis.teacher)


def decide(
    network: nn.Module,
    examples: Examples,
    analysis: Analysis,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Decision:
    """The plan of the criterion that was asked for, measured beside those of the others; ``ValueError`` if none saves enough.

    examples, on_part: as in `analyse`.
    """
    teacher, settings = analysis.teacher, analysis.settings
    choices = {name: Planner(analysis, name).choose() for name in analysis.measured}
    plans = {name: plan_of(choice.runs, teacher) for name, choice in choices.items()}
    if by_place := plan_by_place(choices[settings.criterion], analysis):
        plans[BY_PLACE] = by_place
    gone = {name: name_map(teacher, plan).removed for name, plan in plans.items()}
    sums, done, total = dict.fromkeys(plans, 0.0), 0, examples.count
    on_part(0, total)

    def measure(predict: Predict) -> None:
        nonlocal done
        answer = finite(predict())
        for name, removed in gone.items():
            sums[name] += _error(network, teacher, predict, answer, removed)
        on_part(done := done + 1, total)

    examples.visit(measure)
    return Decision(analysis, plans, {name: summed / done for name, summed in sums.items()})


@dataclass(frozen=True)
class Decision:
    """The plan that a criterion chooses, and others for comparison."""

    analysis: Analysis
    plans: Mapping[str, PruningPlan]
    """By criterion, the one that decides first; `BY_PLACE`, if that rule takes as many blocks."""
    errors: Mapping[str, float]
    """Error of the output when all that a plan removes is skipped at once, over the output's mean square."""

    @property
    def plan(self) -> PruningPlan:
        """The plan that was asked for."""
        return self.plans[self.analysis.settings.criterion]

    def report(self) -> str:
        """Text on what each criterion would fold, the deciding one first, and what that does before training."""
        teacher, criterion, lines = self.analysis.teacher, self.analysis.settings.criterion, []
        for name, plan in self.plans.items():
            student = pruned(teacher, name_map(teacher, plan))
            lost = {word: count - student.depths[word] for word, count in teacher.depths.items() if count != student.depths[word]}
            share = 1 - student.num_parameters / teacher.num_parameters
            blocks = " and ".join(f"{count} {word} block{'s' * (count != 1)}" for word, count in lost.items())
            lines += [
                f"{'Chosen' if name == criterion else 'For comparison'} by {name}: {blocks} fewer, {share:.1%} of the parameters",
                f"  {write_plan(plan, teacher)}",
                f"  if all of it is skipped at once, without training, the error is {self.errors[name]:.3g} of the output's power",
            ]
        easiest = sorted(self.analysis.scores, key=lambda score: score.by(criterion))[:5]
        lines.append("Least needed: " + ", ".join(f"{score.run.name(teacher)} ({score.by(criterion):.2g})" for score in easiest))
        return "\n".join(lines)
