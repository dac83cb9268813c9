from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from distill_core.diffusion.conditioning import Label
from distill_core.diffusion.denoiser import DiffusersDenoiser, instead
from distill_core.diffusion.macs import count_macs
from distill_core.evaluation import plots
from distill_core.networks.build import build_unet
from distill_core.networks.stock import opens_in_comfyui
from distill_core.pruning import analyse
from distill_core.pruning.analyse import (
    CRITERIA,
    Analysis,
    Errors,
    Planner,
    Score,
    agreement,
    decide,
    errors_together,
    examples,
    references_of,
    removable_units,
    report,
    score,
)
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.pruning.plan_text import read_plan, write_plan
from distill_core.pruning.prune import prune
from distill_core.pruning.recover import affine_maps

pytestmark = pytest.mark.slow

LATENT, TOKENS = (4, 8, 8), 3


def _macs(architecture):
    with torch.device("meta"):
        network = build_unet(architecture)
    return count_macs(DiffusersDenoiser(network=network, architecture=architecture), LATENT, TOKENS)


@pytest.fixture(scope="module")
def batches(small_teacher):
    random = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, *LATENT, generator=random), torch.randn(2, TOKENS, 16, generator=random)
    return examples(small_teacher, latents, context, num_timesteps=2, generator=random)


@pytest.fixture(scope="module")
def analysis(small_teacher, batches):
    return score(small_teacher, batches)


def test_the_score_is_the_error_of_the_network_without_the_unit(small_teacher, batches, analysis):
    weights = {n: w.detach() for n, w in small_teacher.named_parameters().items()}
    for one in analysis.scores[::6]:
        pruning = prune(small_teacher.architecture, PruningPlan.removing(one.unit.blocks, small_teacher.architecture, "one"))
        student = DiffusersDenoiser(network=build_unet(pruning.student).eval(), architecture=pruning.student)
        student.load_state_dict(pruning.weights(weights))
        with torch.no_grad():
            pairs = [(student(*batch), small_teacher(*batch)) for batch in batches]
        ratios = [((found - answer).square().mean() / answer.square().mean()).item() for found, answer in pairs]
        assert one.errors.output == pytest.approx(sum(ratios) / len(ratios), rel=1e-3, abs=1e-9)
        assert one.parameters == small_teacher.architecture.num_parameters - pruning.student.num_parameters
        assert one.macs == analysis.macs - _macs(pruning.student)
    assert analysis.macs == _macs(small_teacher.architecture)


def test_units_cover_what_presets_remove(published):
    names = {unit.name for unit in removable_units(published["sd1"])}
    assert {"mid", "mid to one resnet", "stage down.3", "layer down.0.1 + up.3.1", "down.2.attn.0", "up.1.attn.2"} <= names
    assert not [name for name in names if name.startswith("layer down.1.0")]  # it changes the number of channels
    names = {unit.name for unit in removable_units(published["sdxl"])}
    assert {"down.2.attn.1.block.9", "mid.attn.0.block.0", "up.1.attn.0.block.1", "layer down.2.1 + up.0.1"} <= names
    assert not [name for name in names if name.startswith("stage")]


def test_units_of_sdxl_are_scored_with_its_label(small_xl_teacher):
    random = torch.Generator().manual_seed(0)
    label = Label(torch.randn(1, 8, generator=random), torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    one = examples(
        small_xl_teacher, torch.randn(1, *LATENT), torch.randn(1, TOKENS, 16), label=label, num_timesteps=1, generator=random
    )
    found = score(small_xl_teacher, one)
    assert all(s.errors.output > 0 for s in found.scores) and any(".block.3" in s.unit.name for s in found.scores)


@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6])
def test_a_plan_saves_what_was_asked_for(share, criterion, measure, analysis):
    planner = Planner(analysis, criterion, measure)
    budget = round(share * analysis.total(measure))
    teacher, choice = analysis.teacher, planner.choose(budget)
    plan = planner.plan(budget)
    student = pruned(teacher, name_map(teacher, plan))
    saved = analysis.macs - _macs(student) if measure == "macs" else teacher.num_parameters - student.num_parameters
    assert saved == choice.saving >= budget
    assert name_map(teacher, read_plan(write_plan(plan, teacher), teacher)).removed == name_map(teacher, plan).removed


def test_the_plan_is_the_cheapest_of_all(analysis):
    """Against trying every combination of a few units that do not meet."""
    few = [
        s
        for s in analysis.scores
        if s.unit.name in ("mid", "up.1.attn.0", "up.2.attn.1", "down.1.attn.1", "up.3.attn.2", "down.0.attn.1")
    ]
    assert len(few) == 6
    small = Analysis(analysis.teacher, tuple(few), analysis.macs)
    for share in (0.01, 0.03, 0.05, 0.08):
        budget = round(share * analysis.macs)
        sets = [c for n in range(7) for c in combinations(few, n) if sum(s.macs for s in c) >= budget]
        kept = Planner(small)._is_last_of_encoder
        sets = [c for c in sets if not any(kept(s.unit.name) for s in c)]
        best = min(sum(s.by("recoverability") for s in c) for c in sets)
        assert Planner(small).choose(budget).cost == pytest.approx(best)


def test_more_than_there_is_cannot_be_saved(analysis):
    with pytest.raises(ValueError, match="no plan that ComfyUI opens saves 99%"):
        Planner(analysis).plan(round(0.99 * analysis.macs))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.6])
def test_automatic_plans_open_in_comfyui(share, family, published):
    """On made-up scores: the constraint is on shapes."""
    teacher, random = published[family], torch.Generator().manual_seed(1)
    sizes = {
        u: sum(
            torch.Size(teacher.shapes[n]).numel()
            for n in teacher.shapes
            if any(n.startswith(f"{b}.") for b in u.blocks if ".block." not in b or b == u.name)
        )
        for u in removable_units(teacher)
    }
    scores = tuple(
        Score(u, Errors(*torch.rand(3, generator=random).tolist()), torch.rand((), generator=random).item(), size, size)
        for u, size in sizes.items()
    )
    budget = round(share * teacher.num_parameters)
    plan = Planner(Analysis(teacher, scores, teacher.num_parameters), measure="parameters").plan(budget)
    student = pruned(teacher, name_map(teacher, plan))
    assert opens_in_comfyui(student) and teacher.num_parameters - student.num_parameters >= budget


def test_the_report_and_chart_tell_all_criteria(small_teacher, batches, analysis):
    budget = round(0.3 * analysis.macs)
    planners = {name: Planner(analysis, name) for name in CRITERIA}
    decision = decide(small_teacher, batches, planners["output error"], budget)
    plan, text = decision.plan, report(planners, "output error", budget, decision)
    assert text.startswith("Chosen by output error: saves 3") and all(
        f"For comparison by {name}" in text and f"The chosen plan and that by {name}" in text
        for name in ("similarity", "recoverability")
    )
    assert write_plan(plan, analysis.teacher) in text and "all are skipped at once" in text
    assert plots.score_chart(analysis, plan, "output error").width > 800


def test_the_sizes_of_sdxl_are_exact_in_any_precision(small_xl_teacher):
    label = Label(torch.zeros(1, 8), torch.tensor([[1023.0, 767, 0, 517, 1023, 767]]))
    lower = SimpleNamespace(schedule=small_xl_teacher.schedule, device=torch.device("cpu"), dtype=torch.bfloat16)
    (batch,) = examples(
        lower, torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 8), label=label, num_timesteps=1, generator=torch.Generator()
    )
    assert torch.equal(batch.label.sizes, label.sizes) and batch.label.pooled.dtype == torch.bfloat16


def test_an_encoder_without_attention_has_none_that_must_stay(analysis):
    mid_and_up = tuple(score for score in analysis.scores if not score.unit.name.startswith("down"))
    assert not Planner(replace(analysis, scores=mid_and_up))._is_last_of_encoder("up.0.attn.0")


def test_predictions_that_are_not_finite_are_refused(small_teacher, batches):
    with pytest.raises(ValueError, match="NaN or Inf in the precision it is loaded in; load it in bf16 or fp32"):
        score(small_teacher, [batches[0]._replace(x_t=batches[0].x_t * float("inf"))])


def test_every_timestep_counts_the_same():
    """An error at high noise, where the prompt's effect is small, is not hidden by the larger effect at low noise."""
    large, small = torch.full((2, 4), 10.0), torch.full((2, 4), 0.1)
    assert analyse._error([large, 2 * small], [large, small]) == pytest.approx(0.5)
    assert analyse._error([torch.zeros(2, 4)], [torch.zeros(2, 4)]) == 0


# --- what a plan does as a whole


def test_errors_together_are_those_of_the_units_if_there_is_one(small_teacher, batches, analysis):
    references = references_of(small_teacher, batches)
    for one in analysis.scores[:2]:
        assert errors_together(small_teacher, batches, references, [one.unit]) == pytest.approx(one.errors, rel=1e-3, abs=1e-9)


def test_attentions_that_stand_in_for_each_other_cost_more_together(small_teacher, batches, analysis):
    """Without them, only the mid block reads the prompt."""
    attentions = [one for one in analysis.scores if ".attn." in one.unit.name and "block" not in one.unit.name]
    errors = errors_together(small_teacher, batches, references_of(small_teacher, batches), [one.unit for one in attentions])
    assert errors.prompt > max(one.errors.prompt for one in attentions)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_candidates_save_enough_and_begin_with_the_cheapest(share, analysis):
    planner, budget = Planner(analysis), round(share * analysis.macs)
    candidates = planner.candidates(budget)
    assert candidates[0] == planner.choose(budget) and all(choice.saving >= budget for choice in candidates)
    assert len({frozenset(choice.units) for choice in candidates}) == len(candidates) > 1
    assert any(all(unit.is_structural for unit in choice.units) for choice in candidates)
    assert Planner(analysis, "similarity").candidates(budget) == [Planner(analysis, "similarity").choose(budget)]


def test_the_candidate_that_does_best_as_a_whole_is_taken(small_teacher, batches, analysis, monkeypatch):
    planner, budget, seen = Planner(analysis), round(0.3 * analysis.macs), []
    candidates = planner.candidates(budget)
    best = candidates[-1]

    def errors(denoiser, batches, references, units):
        return Errors(0.0, 0.5, 0.1) if units == best.units else Errors(0.0, 0.1, 0.1 + 0.5 / 0.3)

    monkeypatch.setattr(analyse, "errors_together", errors)
    decision = decide(small_teacher, batches, planner, budget, "name", lambda done, total: seen.append((done, total)))
    assert decision.choice == best and decision.plan == planner.plan_of(best, "name")
    assert seen == [(n, len(candidates)) for n in range(len(candidates) + 1)]


# --- what a linear layer could do in a unit's place


NAME = "up.2.attn.1"


@pytest.fixture
def few_units(monkeypatch):
    """Only a few units are scored."""
    every, few = removable_units, ("mid", "down.1.attn.1", NAME, "layer down.0.1 + up.3.1")
    monkeypatch.setattr(analyse, "removable_units", lambda teacher: [unit for unit in every(teacher) if unit.name in few])


def doubled(x, *_, **__):
    """An attention that is an affine map, as diffusers calls it."""
    return (x.flip(1) * 0.5 + x + 0.3,)


def test_an_affine_part_is_replaced_exactly_and_costs_nothing(small_teacher, batches, few_units):
    with instead(small_teacher.module(NAME), doubled):
        (maps,) = affine_maps(small_teacher, batches, [(NAME, NAME)]).values()
        scores = {one.unit.name: one for one in score(small_teacher, batches).scores}
    x = torch.randn(2, 32, 3, 5)
    for one in maps:
        torch.testing.assert_close(one(x.flatten(2).transpose(1, 2)), one(x).flatten(2).transpose(1, 2))
    assert scores[NAME].errors.recovered < 0.05 * scores[NAME].errors.output
    assert scores[NAME].errors.recoverability(prompt_weight=0.1) < 0.1 * scores[NAME].errors.output
    assert scores[NAME].errors.prompt < 0.01


def test_a_map_is_judged_on_examples_it_was_not_fitted_to(small_teacher):
    """Of noise that a part adds, nothing is recovered, however few the examples."""
    random = torch.Generator().manual_seed(3)
    noisy = examples(small_teacher, torch.randn(2, *LATENT), torch.randn(2, TOKENS, 16), num_timesteps=2, generator=random)

    def noise(x, *_, **__):
        return (x + torch.randn(x.shape, generator=random),)

    with instead(small_teacher.module(NAME), noise):
        (maps,) = affine_maps(small_teacher, noisy, [(NAME, NAME)]).values()
    x = torch.randn(50, 32, 8, 8, generator=random)
    for one in maps:
        missed = (one(x) - noise(x)[0]).square().mean()
        assert missed > 0.95  # the variance of the noise is 1


def test_one_example_has_no_map_and_counts_in_full(small_teacher, few_units):
    random = torch.Generator().manual_seed(0)
    one = examples(small_teacher, torch.randn(1, *LATENT), torch.randn(1, TOKENS, 16), num_timesteps=1, generator=random)
    assert affine_maps(small_teacher, one, [(NAME, NAME)]) == {}
    for found in score(small_teacher, one).scores:
        assert found.errors.recovered == pytest.approx(found.errors.output, rel=1e-4, abs=1e-9) and found.errors.prompt == 0


def test_the_prompts_effect_is_that_of_the_next_caption(small_teacher, batches, few_units):
    label = Label(torch.arange(4.0).reshape(2, 2), torch.ones(2, 6))
    other = batches[0]._replace(label=label).of_others
    assert torch.equal(other.context, batches[0].context.flip(0)) and torch.equal(other.x_t, batches[0].x_t)
    assert other.label.pooled.tolist() == [[2, 3], [0, 1]] and torch.equal(other.label.sizes, label.sizes)
    assert not other.all_alike and not other._replace(context=torch.ones(2, 3, 4)).all_alike
    alike = [batch._replace(context=batch.context[:1].expand_as(batch.context)) for batch in batches]
    assert {batch.all_alike for batch in alike} == {True} and {batch.all_alike for batch in batches} == {False}
    rounded = [references_of(lambda x_t, *_: x_t + 1e-6 * torch.rand(x_t.shape), kind)[0].effect for kind in (alike, batches)]
    assert [bool(effect.any()) for effect in rounded] == [False, True]
    assert {one.errors.prompt for one in score(small_teacher, alike).scores} == {0.0}
    assert all(one.errors.prompt > 0 for one in score(small_teacher, batches).scores)


def test_the_weight_of_the_prompt_decides(small_teacher, batches, few_units):
    for weight in (0.0, 0.02, 5.0):
        for one in score(small_teacher, batches, prompt_weight=weight).scores:
            assert one.by("recoverability") == one.errors.recovered + weight * one.errors.prompt


def test_units_are_fitted_in_groups_that_fit_into_memory(small_teacher, batches, analysis, few_units, monkeypatch):
    monkeypatch.setattr(analyse, "MOST_BYTES", 1)
    before = {one.unit: one.errors.recovered for one in analysis.scores}
    for one in score(small_teacher, batches).scores:
        assert one.errors.recovered == pytest.approx(before[one.unit], rel=1e-5)


def test_agreement(sd15):
    base, small = preset("bk-sdm-base"), preset("bk-sdm-small")
    assert agreement(base, base, sd15) == 1 and 0.5 < agreement(base, small, sd15) < 1


def test_scoring_can_be_cancelled_and_leaves_the_network_as_it_was(small_teacher, batches):
    before = small_teacher(*batches[0])

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(small_teacher, batches, stop)
    assert torch.equal(small_teacher(*batches[0]), before)


def test_unknown_names_list_the_choices(analysis):
    with pytest.raises(ValueError, match="choose from"):
        Planner(analysis, measure="seconds")
    with pytest.raises(ValueError, match="choose from"):
        Planner(analysis, criterion="luck").plan(1)
