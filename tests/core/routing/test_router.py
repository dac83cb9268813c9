"""Each example is answered by the student in charge of its timestep, and as that student answers it alone."""

import pytest
import torch

from distill_core.diffusion.conditioning import Caption, Label
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.ranges import TimestepRanges
from distill_core.diffusion.sampling import sample, timesteps
from distill_core.diffusion.schedule import flow, scaled_linear
from distill_core.lora.layers import Lora
from distill_core.networks.files import save_unet
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import preset
from distill_core.routing.experts import write_experts
from distill_core.routing.router import ExpertDenoiser, dispatch

from ...students import student_of

pytestmark = pytest.mark.slow

RANGES = TimestepRanges((699.0, 249.0))


class Listening(DiffusersDenoiser):
    """Keeps the timesteps of every call."""

    def __call__(self, x_t, t, context, label=None):
        self.seen = [*getattr(self, "seen", []), t.tolist()]
        return super().__call__(x_t, t, context, label)


@pytest.fixture
def experts(small_teacher):
    plans = ["bk-sdm-base", "bk-sdm-tiny", "bk-sdm-small"]
    made = [student_of(small_teacher, preset(plan)) for plan in plans]
    return [Listening(network=student.network, architecture=student.architecture) for student in made]


def inputs(t):
    random = torch.Generator().manual_seed(0)
    return torch.randn(len(t), 4, 8, 8, generator=random), torch.tensor(t), torch.randn(len(t), 5, 16, generator=random)


def test_a_mixed_batch_is_each_example_by_its_own_student_in_order(experts):
    routed, (x, t, context) = ExpertDenoiser.given(RANGES, experts), inputs([999, 0, 249, 250, 700, 699, 3])
    with torch.no_grad():
        answer = routed(x, t, context)
        for number, places in {2: [1, 2, 6], 1: [3, 5], 0: [0, 4]}.items():
            assert experts[number].seen == [t[places].tolist()]  # in charge of these, called once
            assert torch.equal(answer[places], experts[number](x[places], t[places], context[places]))


@pytest.mark.parametrize("t,number", [([0, 249], 2), ([250, 699], 1), ([700, 999], 0)])
def test_a_batch_within_one_range_is_one_call_of_the_whole(t, number, experts):
    routed, (x, t, context) = ExpertDenoiser.given(RANGES, experts), inputs(t)
    with torch.no_grad():
        assert torch.equal(routed(x, t, context), experts[number](x, t, context))
    assert [len(getattr(student, "seen", [])) for student in experts] == [2 * (n == number) for n in range(3)]


def test_the_label_goes_with_its_example(small_xl_teacher, xl_batch):
    x, _, context, label = xl_batch
    routed, t = ExpertDenoiser.given(TimestepRanges((499.0,)), [small_xl_teacher, small_xl_teacher]), torch.tensor([900, 3])
    with torch.no_grad():
        answer = routed(x, t, context, label)
        for place in (0, 1):
            one = slice(place, place + 1)
            alone = small_xl_teacher(x[one], t[one], context[one], Label(*(entry[one] for entry in label)))
            assert torch.equal(answer[one], alone)


def test_dispatch_keeps_the_order_of_any_batch():
    random = torch.Generator().manual_seed(0)
    for size in (1, 2, 17):
        numbers, x = torch.randint(4, (size,), generator=random), torch.randn(size, 3, generator=random)
        answer = dispatch(numbers, lambda number, which, x=x: x[which] * (10**number))
        assert torch.equal(answer, x * (10.0**numbers)[:, None])


def test_it_samples_as_a_sampler_that_was_split_there(experts):
    x, _, context = inputs([0, 0])
    null, options = Caption(torch.zeros(5, 16)), {"num_steps": 6, "guidance": 3.0}
    routed = sample(ExpertDenoiser.given(RANGES, experts), context, null, noise=x, **options)
    states = {}
    sample(
        ExpertDenoiser.given(RANGES, experts),
        context,
        null,
        noise=x,
        on_state=lambda x_t, t: states.update({int(t): x_t}),
        **options,
    )
    steps = timesteps(scaled_linear(), 6).tolist()
    assert [t for t in steps if t > 699] and [t for t in steps if 249 < t <= 699] and [t for t in steps if t <= 249]
    for t in steps:
        number = 0 if t > 699 else 1 if t > 249 else 2
        assert [t] * 4 in experts[number].seen and all([t] * 4 not in experts[n].seen for n in range(3) if n != number)
    assert routed.isfinite().all() and set(states) == set(steps)


def test_students_alike_are_as_one(small_teacher):
    x, t, context = inputs([0, 400, 999])
    routed = ExpertDenoiser.given(RANGES, [small_teacher] * 3)
    with torch.no_grad():
        torch.testing.assert_close(routed(x, t, context), small_teacher(x, t, context), rtol=1e-3, atol=1e-3)  # rounding


def test_students_are_loaded_when_they_are_needed_and_once(experts):
    loaded = []

    def loading(number):
        loaded.append(number)
        return experts[number]

    routed = ExpertDenoiser(RANGES, [lambda n=n: loading(n) for n in range(3)])
    assert routed.schedule == experts[0].schedule and routed.prediction == "eps" and routed.dtype == torch.float32
    assert loaded == [0]
    with torch.no_grad():
        for _ in range(2):
            routed(*inputs([3, 900]))
    assert loaded == [0, 2]


def test_students_that_do_not_go_together_are_refused(experts, small_teacher):
    with pytest.raises(ValueError, match="there are 3 ranges but 2 experts"):
        ExpertDenoiser.given(RANGES, experts[:2])
    other = DiffusersDenoiser(
        network=small_teacher.network, architecture=small_teacher.architecture, sampling=ModelSampling(prediction="v")
    )
    with pytest.raises(ValueError, match="prediction types"):
        ExpertDenoiser.given(RANGES, [other, *experts[:2]])(*inputs([0, 999]))
    straight = DiffusersDenoiser(network=small_teacher.network, architecture=small_teacher.architecture, noise_levels=flow())
    with pytest.raises(ValueError, match="noise schedules"):
        ExpertDenoiser.given(RANGES, [straight, *experts[:2]])(*inputs([0, 999]))
    with pytest.raises(ValueError, match="ranges cover 500 timesteps, but the expert's schedule has 1000"):
        ExpertDenoiser.given(TimestepRanges((399.0, 249.0), 500), experts)(*inputs([3]))


# --- from folders


def test_a_folder_of_whole_students_answers_as_they_do(experts, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, student in zip(files, experts, strict=True):
        save_unet(path, student.named_parameters(), student.architecture)
    routed = ExpertDenoiser.open(write_experts(tmp_path / "experts", RANGES, files, teacher="abc"))
    batch = inputs([999, 0, 250])
    with torch.no_grad():
        assert torch.equal(routed(*batch), ExpertDenoiser.given(RANGES, experts)(*batch))


def test_a_shared_base_answers_as_networks_with_each_lora_alone(small_teacher, tmp_path):
    plan, files, alone, random = preset("bk-sdm-base"), [], [], torch.Generator().manual_seed(0)
    base = student_of(small_teacher, plan)
    save_unet(tmp_path / "base.safetensors", base.named_parameters(), base.architecture)
    for number, (rank, targets) in enumerate([(2, ("*.attn2.to_*",)), (3, ("*.conv1", "*.to_q")), (2, ("mid.*", "down.*.to_k"))]):
        student = student_of(small_teacher, plan)
        lora = Lora(student, rank=rank, alpha=1.5, targets=targets if number < 2 else targets[1:])
        for parameter in lora.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=random) / 5
        files.append(tmp_path / f"{number}.safetensors")
        lora.write(files[-1], {name: parameter.detach() for name, parameter in lora.parameters().items()}, {})
        alone.append(student)
    experts = write_experts(tmp_path / "experts", RANGES, files, base=tmp_path / "base.safetensors", teacher="abc")
    routed = ExpertDenoiser.open(experts)
    x, t, context = inputs([999, 0, 250, 3])
    with torch.no_grad():
        for _ in range(2):  # back and forth
            answer = routed(x, t, context)
            for number, places in {2: [1, 3], 1: [2], 0: [0]}.items():
                expected = alone[number](x[places], t[places], context[places])
                torch.testing.assert_close(answer[places], expected, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(expected, base(x[places], t[places], context[places]), atol=1e-2)
    networks = {id(routed.expert(number).network) for number in range(3)}
    assert len(networks) == 1 and not any(p.requires_grad for p in routed.expert(0).network.parameters())
