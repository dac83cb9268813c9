"""Plans made for a user's own model: they score every removable unit, without training, and meet a budget.

The published score of a unit is the error of the network's output when that unit alone is skipped. LAPTOP-Diff found that
these errors nearly add up, so the choice of a plan becomes a knapsack problem (Zhang et al. 2024, arXiv 2404.11098, Sec. 3.2).
But what a unit moves says little about what training can bring back (Fang et al. 2024, TinyFusion, arXiv 2412.01199). So the
score here takes that error, adds the error of what the prompt does to the output, which is small beside the whole but is what
guidance amplifies, and measures both with the best affine map in the unit's place (`recover`). Units that stand in for each
other, as attentions to the prompt do, cost little each and much together, which no sum of scores shows; so several plans are
made, and that which does best as a whole is chosen (`decide`). For comparison, we also measure how much a unit changes its
input; pruning by that is known to be weak (Table 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.settings import SEEDS, check_choice, check_settings, setting
from ..diffusion.conditioning import Label
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser, tap
from ..diffusion.distance import finite, squared_error
from ..diffusion.macs import macs_by_module
from ..networks.architecture import Architecture
from ..networks.build import build_unet
from ..networks.layouts import split
from ..networks.name_map import NameMap
from ..networks.stock import SDXL_DEPTHS, encoder_depths, opens_in_comfyui
from .plan import PruningPlan, name_map
from .plan_text import write_plan
from .recover import AffineMap, affine_maps
from .skip import detour, skipping

CRITERIA = {
    "recoverability": "error of the output, and of what the prompt does to it, with the best linear layer in the unit's place",
    "output error": "error of the output when the unit is skipped",
    "similarity": "how much the unit changes its input",
}
MEASURES = ("macs", "parameters")
MOST_BYTES, _BYTES_OF_FIT = 1 << 30, 32  # two halves, two matrices of each in float64
"""Memory that maps are fitted in at once; more units take more passes through the network."""
PROMPT_FACTORS = (1, 3, 10)
"""By which the prompt counts for more in some of the plans to choose from."""
_RESOLUTION = 2000
"""Steps in which a saving is counted; each rounds down, so a plan never saves less than requested."""


# --- units ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A part that can be removed on its own and leaves a working UNet."""

    name: str
    """``up.1.attn.2``, ``down.2.attn.0.block.7``, ``layer down.1.1 + up.2.1``, ``mid``, ``stage down.3``, ..."""
    blocks: frozenset[str]
    """The teacher's blocks that are removed."""
    spans: tuple[tuple[str, str], ...]
    """First and last module of each skipped stretch of the network."""
    stage: str
    """The stage it belongs to, by the name of the down stage; ``mid``."""

    @property
    def is_structural(self) -> bool:
        """Whether it removes layers, not just attention within layers that stay."""
        return any(".resnet." in block for block in self.blocks)


def removable_units(teacher: Architecture) -> list[Unit]:
    """Every unit of a UNet that can be skipped: attentions, transformer blocks, layers in pairs, mid block, inner stage.

    A layer of a down stage is removed together with one of an up stage, because of the skip connection between them;
    their channels decide which ones fit together.
    """
    units = [unit for unit in _candidates(teacher) if _can_go(unit, teacher)]
    if not units:
        raise ValueError("this UNet has nothing left that can be removed; give a larger model")
    return units


def _can_go(unit: Unit, teacher: Architecture) -> bool:
    try:
        detour(teacher, unit_map(unit, teacher))
    except ValueError:  # the plan leaves no working UNet, or changes the number of channels
        return False
    return True


def unit_map(unit: Unit, teacher: Architecture) -> NameMap:
    return name_map(teacher, PruningPlan.removing(unit.blocks, teacher, unit.name))


def _candidates(teacher: Architecture) -> Iterator[Unit]:
    def inside(*heads: str) -> frozenset[str]:
        return frozenset(b for b in teacher.blocks if any(b == h or b.startswith(f"{h}.") for h in heads))

    for attention in sorted(module for module in teacher.modules if ".attn." in module):
        stage = _down_name(attention, teacher)
        if not attention.startswith("mid"):
            yield Unit(attention, inside(attention), ((attention, attention),), stage)
        for n in teacher.numbers(f"{attention}.block") if teacher.depth(attention) > 1 else ():
            block = f"{attention}.block.{n}"
            yield Unit(block, inside(block), ((block, block),), stage)
    if "mid.resnet.0" in teacher.modules:
        last = max(m for m in teacher.modules if m.startswith("mid.resnet."))
        yield Unit("mid", inside("mid"), (("mid.resnet.0", last),), "mid")
        if "mid.attn.0" in teacher.modules:
            yield Unit("mid to one resnet", inside("mid.attn.0", "mid.resnet.1"), (("mid.attn.0", last),), "mid")
    for down in teacher.stages("down"):
        up = teacher.mirror(down)
        for j in teacher.numbers(f"{down}.resnet"):
            for k in teacher.numbers(f"{up}.resnet"):
                layers = [f"{side}.{part}.{n}" for side, n in ((down, j), (up, k)) for part in ("resnet", "attn")]
                spans = tuple((f"{s}.resnet.{n}", _end(s, n, teacher)) for s, n in ((down, j), (up, k)))
                yield Unit(f"layer {down}.{j} + {up}.{k}", inside(*layers), spans, down)
    inner, innermost = teacher.stages("down")[-1], teacher.stages("up")[0]
    layer = teacher.numbers(f"{innermost}.resnet")[-1]
    spans = ((f"{inner}.resnet.{teacher.numbers(f'{inner}.resnet')[0]}", _end(innermost, layer, teacher)),)
    # The mid block is removed too: otherwise it would run at four times the pixels.
    yield Unit(f"stage {inner}", inside(inner, innermost, "mid"), spans, inner)


def _end(stage: str, layer: int, teacher: Architecture) -> str:
    attention = f"{stage}.attn.{layer}"
    return attention if attention in teacher.modules else f"{stage}.resnet.{layer}"


def _down_name(block: str, teacher: Architecture) -> str:
    stage = ".".join(split(block)[0].split(".")[:2])
    return "mid" if stage.startswith("mid") else teacher.mirror(stage) if stage.startswith("up") else stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How units are scored, and how much to save."""

    saving: float = setting(0.4, "Share of the model to save, at least: 0.4 is 40 % less.", within=(0.01, 0.95))
    measure: str = setting("macs", "What to save. macs: arithmetic, so time. parameters: file size and memory.", choices=MEASURES)
    criterion: str = setting(
        "recoverability",
        " ".join(f"{name}: {what}." for name, what in CRITERIA.items()) + " The report shows all.",
        choices=CRITERIA,
    )
    num_timesteps: int = setting(4, "Number of evenly spaced timesteps to average the error over.", within=(1, 1000))
    num_examples: int = setting(
        4, "Number of images to average the error over. More images need more time and memory.", within=(1, 4096)
    )
    seed: int = setting(0, "Decides which images are used, and the noise.", within=SEEDS)
    prompt_weight: float = setting(
        1.0, "How much the error of the prompt's effect counts beside that of the output, for recoverability.", within=(0, 1000)
    )

    def __post_init__(self):
        check_settings(self)


# --- scores ---------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """Inputs of a network: noisy latents, timesteps and conditioning."""

    x_t: Tensor
    t: Tensor
    context: Tensor
    label: Label | None = None

    @property
    def of_others(self) -> Example:
        """The same noisy latents, each with the caption of the next example."""
        label = self.label and self.label._replace(pooled=self.label.pooled.roll(1, 0))
        return self._replace(context=self.context.roll(1, 0), label=label)

    @property
    def all_alike(self) -> bool:
        """Whether every example has the same caption."""
        alike = torch.equal(self.context, self.of_others.context)
        return alike and (self.label is None or torch.equal(self.label.pooled, self.label.pooled.roll(1, 0)))

    def part(self, picked: Tensor) -> Example:
        """Some of the examples."""
        label = self.label and Label(*(part[picked] for part in self.label))
        return Example(self.x_t[picked], self.t[picked], self.context[picked], label)


def examples(
    denoiser: Denoiser,
    latents: Tensor,
    context: Tensor,
    *,
    label: Label | None = None,
    num_timesteps: int = 4,
    generator: torch.Generator,
) -> list[Example]:
    """One batch for each of ``num_timesteps`` timesteps, spread evenly over the schedule.

    latents: clean latents as the network sees them (B, C, H, W). context: (B, L, D). Every unit gets the same noise.
    """
    schedule, device, dtype = denoiser.schedule, denoiser.device, denoiser.dtype
    batches = []
    for i in range(num_timesteps):
        step = int((i + 0.5) * schedule.num_timesteps / num_timesteps)
        t = torch.full((len(latents),), step)
        noise = torch.randn(latents.shape, generator=generator)
        x_t = schedule.add_noise(latents.float().cpu(), noise, t)
        placed = context.to(device, dtype)
        batches.append(Example(x_t.to(device, dtype), t.to(device), placed, label and label.to(placed)))
    return batches


class Errors(NamedTuple):
    """What goes wrong without some units."""

    output: float
    """Mean squared error of the output, divided by the mean square of the output itself, averaged over timesteps."""
    recovered: float
    """The same with the best affine map in the place of each unit."""
    prompt: float
    """With those maps: mean squared error of the prompt's effect, how the output differs from that for another example's
    caption, divided by the mean square of the effect itself."""

    def recoverability(self, prompt_weight: float) -> float:
        return self.recovered + prompt_weight * self.prompt


@dataclass(frozen=True)
class Score:
    """Effect of skipping one unit."""

    unit: Unit
    errors: Errors
    change: float
    """1 - cosine similarity of the unit's input and output."""
    macs: int
    """Multiply-accumulates that removing it saves."""
    parameters: int
    prompt_weight: float = Settings.prompt_weight

    def by(self, criterion: str) -> float:
        check_choice(criterion, CRITERIA, "unknown criterion")
        return {
            "recoverability": self.errors.recoverability(self.prompt_weight),
            "output error": self.errors.output,
            "similarity": self.change,
        }[criterion]


@dataclass(frozen=True)
class Analysis:
    """A model's removable units with their scores."""

    teacher: Architecture
    scores: tuple[Score, ...]
    macs: int
    """Multiply-accumulates of the whole network, at the size of the examples."""

    @property
    def parameters(self) -> int:
        return self.teacher.num_parameters

    def total(self, measure: str) -> int:
        """Total of which a saving is a share; ``ValueError`` lists the measures."""
        check_choice(measure, MEASURES, "unknown measure")
        return getattr(self, measure)


@torch.no_grad()
def score(
    denoiser: Denoiser,
    batches: list[Example],
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    prompt_weight: float = Settings.prompt_weight,
) -> Analysis:
    """Scores of every removable unit, averaged over the batches; the network is only read.

    ``on_unit(done, total)`` is called before the first unit and after each; an error it raises ends the scoring. Where all
    captions of a batch are the same, the prompt's effect is not seen, and its error is 0.
    """
    teacher = denoiser.architecture
    units = removable_units(teacher)
    macs = _macs(teacher, batches[0])
    on_unit(0, len(units))
    changes, references = dict.fromkeys(units, 0.0), []
    ends = {end for unit in units for span in unit.spans for end in span}
    with tap(denoiser, ends) as outputs, tap(denoiser, ends, of_input=True) as inputs:
        for batch in batches:
            own = finite(denoiser(*batch))
            for unit in units:
                changed = [_change(inputs[first], outputs[last]) for first, last in unit.spans]
                changes[unit] += sum(changed) / len(changed) / len(batches)
            references.append(_reference(denoiser, batch, own))
    scores = []
    for group in _groups(units, teacher):
        maps = affine_maps(denoiser, batches, (span for unit in group for span in unit.spans))
        for unit in group:
            errors = _errors(denoiser, batches, references, unit, maps)
            scores.append(Score(unit, errors, changes[unit], *_savings(unit.blocks, teacher, macs), prompt_weight))
            on_unit(len(scores), len(units))
    return Analysis(teacher, tuple(scores), sum(count for block, count in macs.items() if ".block." not in block))


class Reference(NamedTuple):
    """What the whole network predicts for an example, and how that differs from the prediction for another caption."""

    prediction: Tensor
    effect: Tensor


def _reference(denoiser: Denoiser, batch: Example, own: Tensor) -> Reference:
    """Captions that are all the same have no effect to see: nothing, and not what two passes differ by in rounding."""
    return Reference(own, torch.zeros_like(own) if batch.all_alike else own - finite(denoiser(*batch.of_others)))


def _groups(units: list[Unit], teacher: Architecture) -> Iterator[list[Unit]]:
    """Units in order, together as far as what their maps are fitted from fits into `MOST_BYTES`."""
    group: list[Unit] = []
    used = 0
    for unit in units:
        needed = sum(_BYTES_OF_FIT * teacher.channels(split(last)[0])[1] ** 2 for _, last in unit.spans)
        if group and used + needed > MOST_BYTES:
            yield group
            group, used = [], 0
        group.append(unit)
        used += needed
    yield group


def _errors(
    denoiser: Denoiser,
    batches: list[Example],
    references: list[Reference],
    unit: Unit,
    maps: Mapping[tuple[str, str], list[AffineMap]],
) -> Errors:
    mapping, recovered, of_others = unit_map(unit, denoiser.architecture), [], []
    with skipping(denoiser, mapping):
        plain = [finite(denoiser(*batch)) for batch in batches]
    number = 0
    for batch in batches:
        # Each half of the examples goes through the map that was fitted to the other half.
        own, other = torch.empty_like(batch.x_t), torch.empty_like(batch.x_t)
        for half in range(2):
            picked = torch.arange((half + number) % 2, len(own), 2)
            stand_ins = {span[1]: maps[span][half] for span in unit.spans if span in maps}
            if len(picked):
                with skipping(denoiser, mapping, stand_ins):
                    own[picked], other[picked] = (
                        finite(denoiser(*batch.part(picked))),
                        finite(denoiser(*batch.of_others.part(picked))),
                    )
        recovered.append(own)
        of_others.append(own - other)
        number += len(own)
    predictions, effects = [reference.prediction for reference in references], [reference.effect for reference in references]
    return Errors(_error(plain, predictions), _error(recovered, predictions), _error(of_others, effects))


@torch.no_grad()
def references_of(denoiser: Denoiser, batches: list[Example]) -> list[Reference]:
    return [_reference(denoiser, batch, finite(denoiser(*batch))) for batch in batches]


@torch.no_grad()
def errors_together(denoiser: Denoiser, batches: list[Example], references: list[Reference], units: Sequence[Unit]) -> Errors:
    """Errors without all of some units that do not overlap; the network is only read."""
    maps: dict[tuple[str, str], list[AffineMap]] = {}
    for group in _groups(list(units), denoiser.architecture):
        maps |= affine_maps(denoiser, batches, (span for unit in group for span in unit.spans))
    whole = Unit(
        " + ".join(unit.name for unit in units),
        frozenset().union(*(unit.blocks for unit in units)),
        tuple(span for unit in units for span in unit.spans),
        units[0].stage,
    )
    return _errors(denoiser, batches, references, whole, maps)


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Mean squared error over the mean square of what was expected, averaged over batches; 0 where that is nothing.

    Each batch counts the same: at high noise the prompt's effect is small, and decides what the image shows.
    """
    ratios = []
    for one, other in zip(found, expected, strict=True):
        whole = other.float().square().mean().item()
        ratios.append(squared_error(one, other).mean().item() / whole if whole else 0.0)
    return sum(ratios) / len(ratios)


def _change(entering: Tensor, leaving: Tensor) -> float:
    """Mean of 1 - cosine similarity; of an input joined with a skip connection, only the part before the joint counts."""
    if entering.ndim == 4:
        entering = entering[:, : leaving.shape[1]]
    if entering.shape != leaving.shape:
        return 1.0
    cosine = torch.nn.functional.cosine_similarity(entering.float().flatten(1), leaving.float().flatten(1))
    return 1 - cosine.mean().item()


def _macs(teacher: Architecture, example: Example) -> dict[str, int]:
    with torch.device("meta"):
        network = build_unet(teacher)
    _, channels, height, width = example.x_t.shape
    denoiser = DiffusersDenoiser(network=network, architecture=teacher)
    return macs_by_module(denoiser, (channels, height, width), example.context.shape[1])


def _savings(removed: frozenset[str], teacher: Architecture, macs: Mapping[str, int]) -> tuple[int, int]:
    """MACs and parameters saved by removing blocks, and the resampling that then has no purpose."""
    mapping = name_map(teacher, PruningPlan.removing(removed, teacher, "savings"))
    modules = mapping.removed - {b for b in mapping.removed if ".block." in b and split(b)[0] in mapping.removed}
    sizes = Architecture({name: teacher.shapes[name] for name in _gone(mapping, teacher)}).num_parameters
    return sum(macs[module] for module in modules), sizes


# --- plans ----------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Some units to remove together, the sum of their scores, and what they save."""

    cost: float
    saving: float
    units: tuple[Unit, ...] = ()

    def __or__(self, other: Choice) -> Choice:
        return Choice(self.cost + other.cost, self.saving + other.saving, self.units + other.units)


_NOTHING = Choice(0.0, 0.0)


@dataclass(frozen=True)
class Planner:
    """Chooses units by their scores."""

    analysis: Analysis
    criterion: str = "recoverability"
    """Key of `CRITERIA`."""
    measure: str = "macs"
    """What a budget counts: ``macs`` or ``parameters``."""

    def __post_init__(self):
        self.analysis.total(self.measure)

    @property
    def teacher(self) -> Architecture:
        return self.analysis.teacher

    @property
    def scores(self) -> tuple[Score, ...]:
        return self.analysis.scores

    def plan(self, saving: int, name: str = "") -> PruningPlan:
        """The plan of least summed score that saves at least ``saving`` MACs or parameters.

        Raises ``ValueError`` if no plan that ComfyUI opens saves that much.
        """
        return self.plan_of(self.choose(saving), name)

    def plan_of(self, choice: Choice, name: str = "") -> PruningPlan:
        removed = frozenset().union(*(unit.blocks for unit in choice.units))
        return PruningPlan.removing(removed, self.teacher, name or f"least {self.criterion}")

    def candidates(self, saving: int) -> list[Choice]:
        """What `choose` finds, and by recoverability also what it finds if the prompt or single attentions count for more."""
        if self.criterion != "recoverability":
            return [self.choose(saving)]
        found: dict[frozenset[Unit], Choice] = {}
        for factor in PROMPT_FACTORS:
            for whole_layers in (False, True):
                scores = (
                    replace(score, prompt_weight=factor * score.prompt_weight)
                    for score in self.scores
                    if score.unit.is_structural or not whole_layers
                )
                planner = replace(self, analysis=replace(self.analysis, scores=tuple(scores)))
                try:
                    choice = planner.choose(saving)
                except ValueError:  # whole layers alone do not save as much
                    if whole_layers:
                        continue
                    raise
                found.setdefault(frozenset(choice.units), choice)
        return list(found.values())

    def choose(self, saving: int) -> Choice:
        """The units that `plan` removes."""
        tables = [self._table(depths) for depths in self._allowed_encoders()]
        choices = [choice for table in tables for choice in table if choice.saving * (1 + 1e-9) >= saving]
        if not choices:
            most = max((choice.saving for table in tables for choice in table), default=0)
            whole = self.analysis.total(self.measure)
            raise ValueError(
                f"no plan that ComfyUI opens saves {saving / whole:.0%} of the {self.measure}; the maximum is "
                f"{most / whole:.0%}; ask for less"
            )
        return min(choices, key=lambda choice: (choice.cost, choice.saving))

    def _allowed_encoders(self) -> list[dict[str, int] | None]:
        """Transformer depths that the attentions of the down stages may end up with; None if any depth is allowed."""
        if self.teacher.family != "sdxl" or not opens_in_comfyui(self.teacher):
            return [None]
        now = encoder_depths(self.teacher)
        layers = sorted({attention.rsplit(".", 2)[0] for attention in now})
        allowed = []
        for depths in SDXL_DEPTHS.values():
            if len(depths) == len(now):
                allowed.append(dict(zip(now, depths, strict=True)))
            elif len(depths) == len(layers):  # one layer in every stage, whichever stays
                by_stage = dict(zip(layers, depths, strict=True))
                allowed.append({attention: by_stage[attention.rsplit(".", 2)[0]] for attention in now} | {"layers": len(layers)})
        return [d for d in allowed if all(d[a] <= depth for a, depth in now.items())]

    def _table(self, depths: Mapping[str, int] | None) -> list[Choice]:
        """The best choices for every saving: no other choice saves as much at a lower score."""
        one_layer = depths is not None and "layers" in depths
        table = [_NOTHING]
        for stage in self.teacher.stages("down"):
            table = self._best(a | b for a in table for b in self._stage(stage, depths, one_layer))
        return table

    def _stage(self, stage: str, depths: Mapping[str, int] | None, one_layer: bool) -> list[Choice]:
        """Choices within a stage and its mirror: remove or keep layers, and thin out the attentions that stay."""
        attentions = {s.unit.name: s for s in self.scores if s.unit.stage == stage and not s.unit.is_structural}
        structural = [s for s in self.scores if s.unit.stage == stage and s.unit.is_structural]
        pairs = [s for s in structural if s.unit.name.startswith("layer")]
        if depths is not None and stage != "mid":
            structural = pairs if one_layer else []
        starts: list[tuple[Choice, frozenset[str]]] = [] if one_layer and pairs else [(_NOTHING, frozenset())]
        starts += [(self._choice(s), s.unit.blocks) for s in structural]
        found = []
        for start, gone in starts:
            table = [start]
            for attention in sorted({split(name)[0] for name in attentions} - gone):
                wanted = None if depths is None else depths.get(attention)
                table = self._best(a | b for a in table for b in self._attention(attention, attentions, wanted))
            if stage == self.teacher.stages("down")[-1] and "mid.resnet.0" not in gone:
                table = self._best(a | b for a in table for b in self._stage("mid", depths, one_layer))
            found += table
        return self._best(found)

    def _attention(self, attention: str, scores: Mapping[str, Score], wanted: int | None) -> list[Choice]:
        """Choices for an attention: keep it, remove blocks by their scores, or remove it. wanted: only this depth."""
        depth = self.teacher.depth(attention)
        blocks = sorted((s for n, s in scores.items() if n.startswith(f"{attention}.block.")), key=lambda s: s.by(self.criterion))
        choices = {depth: _NOTHING}
        for n, block in enumerate(blocks[: depth - 1], start=1):
            choices[depth - n] = choices[depth - n + 1] | self._choice(block)
        if attention in scores and not self._is_last_of_encoder(attention):
            choices[0] = self._choice(scores[attention])
        if wanted is None:
            return list(choices.values())
        return [choices[wanted]] if wanted in choices else []

    def _is_last_of_encoder(self, attention: str) -> bool:
        """Whether it is the attention of the down stages that must stay, because ComfyUI identifies the model by it."""
        encoder = [s for s in self.scores if re.fullmatch(r"down\.\d+\.attn\.\d+", s.unit.name)]
        if not encoder:
            return False
        first_layers = [s for s in encoder if s.unit.name.endswith(".0")] or encoder
        return attention == max(first_layers, key=lambda s: s.by(self.criterion)).unit.name

    def _choice(self, score: Score) -> Choice:
        return Choice(score.by(self.criterion), getattr(score, self.measure), (score.unit,))

    @cached_property
    def _step(self) -> float:
        return (
            sum(getattr(s, self.measure) for s in self.scores if not s.unit.is_structural or s.unit.stage == "mid") / _RESOLUTION
        )

    def _best(self, choices: Iterable[Choice]) -> list[Choice]:
        """The cheapest choice of each saving, counted in steps, if no larger saving costs less."""
        by_step: dict[int, Choice] = {}
        for choice in choices:
            step = int(choice.saving / self._step)
            if step not in by_step or (choice.cost, -choice.saving) < (by_step[step].cost, -by_step[step].saving):
                by_step[step] = choice
        kept: list[Choice] = []
        for _, choice in sorted(by_step.items(), reverse=True):
            if not kept or choice.cost < kept[-1].cost:
                kept.append(choice)
        return kept


class Decision(NamedTuple):
    """A plan, and what it does as a whole."""

    plan: PruningPlan
    choice: Choice
    errors: Errors


def decide(
    denoiser: Denoiser,
    batches: list[Example],
    planner: Planner,
    saving: int,
    name: str = "",
    on_candidate: Callable[[int, int], None] = lambda done, total: None,
) -> Decision:
    """The plan that saves at least ``saving`` and, of the planner's candidates, does best with everything gone at once.

    ``on_candidate(done, total)`` is called before the first candidate and after each; an error it raises ends the measuring.
    """
    candidates = planner.candidates(saving)
    on_candidate(0, len(candidates))
    weight, measured = planner.scores[0].prompt_weight, []
    references = references_of(denoiser, batches)
    for choice in candidates:
        errors = errors_together(denoiser, batches, references, choice.units)
        measured.append(Decision(planner.plan_of(choice, name), choice, errors))
        on_candidate(len(measured), len(candidates))
    return min(measured, key=lambda decision: decision.errors.recoverability(weight))


def report(planners: Mapping[str, Planner], criterion: str, saving: int, decision: Decision) -> str:
    """Text on what each criterion would remove for a saving, the deciding one first, and how far they agree."""
    lines, plans = [], {}
    for name in sorted(planners, key=lambda name: name != criterion):
        planner = planners[name]
        choice = decision.choice if name == criterion else planner.choose(saving)
        plans[name] = planner.plan_of(choice)
        share = choice.saving / planner.analysis.total(planner.measure)
        lines += [
            f"{'Chosen' if name == criterion else 'For comparison'} by {name}: saves {share:.1%} of the {planner.measure}",
            f"  {write_plan(plans[name], planner.teacher)}",
        ]
        alone = sum(score.errors.output for score in planner.scores if score.unit in choice.units)
        added = f"output errors of its {len(choice.units)} units add up to {alone:.4g} of the output's power"
        if name == criterion:
            errors = decision.errors
            lines += [
                f"  {added}; if all are skipped at once, the error is {errors.output:.4g}",
                f"  with the best linear layers in their place {errors.recovered:.4g}, and {errors.prompt:.4g} of what the prompt does",
            ]
        else:
            lines.append(f"  {added}")
    for name in (name for name in plans if name != criterion):
        both = agreement(plans[criterion], plans[name], planners[name].teacher)
        lines.append(f"The chosen plan and that by {name} have {both:.0%} of what either removes in common.")
    easiest = sorted(planners[criterion].scores, key=lambda score: score.by(criterion))[:5]
    lines.append("Least needed: " + ", ".join(f"{score.unit.name} ({score.by(criterion):.2g})" for score in easiest))
    return "\n".join(lines)


def agreement(a: PruningPlan, b: PruningPlan, teacher: Architecture) -> float:
    """Of the parameters that either plan removes, the share that both remove."""
    ours, theirs = (_gone(name_map(teacher, plan), teacher) for plan in (a, b))
    both, either = (
        Architecture({n: teacher.shapes[n] for n in names}).num_parameters for names in (ours & theirs, ours | theirs)
    )
    return both / either


def _gone(mapping: NameMap, teacher: Architecture) -> set[str]:
    """The teacher's parameters that are removed."""
    return {name for name in teacher.shapes if mapping.rename(name) is None}
