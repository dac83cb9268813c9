import json

import pytest
import torch
from torch import nn

from distill_core.training.ema import EMA
from distill_core.training.optim import OPTIMIZERS, Optimizer, stochastically_rounded


def parameters(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    return {"a.weight": nn.Parameter(torch.randn(80, 64, generator=random).to(dtype)),
            "b": nn.Parameter(torch.randn(7, generator=random).to(dtype))}  # fmt: skip


def make(name, weights, **options):
    if OPTIMIZERS[name].package != "torch":
        pytest.importorskip({"lion-pytorch": "lion_pytorch"}.get(OPTIMIZERS[name].package, OPTIMIZERS[name].package))
    learning_rate = 1.0 if name == "prodigy" else 1e-2
    return Optimizer(name, weights, **{"learning_rate": learning_rate, "weight_decay": 1e-2} | options)


def go(optimizer, weights, steps, learning_rate=1e-2):
    for step in steps:
        for number, weight in enumerate(weights.values()):
            random = torch.Generator().manual_seed(10 * step + number)
            weight.grad = weight.detach() + 0.1 * torch.randn(weight.shape, generator=random).to(weight.dtype)
        optimizer.step(learning_rate, torch.Generator().manual_seed(step))


def size(weights):
    return sum(weight.detach().float().square().sum().item() for weight in weights.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_downhill_and_decays(name):
    weights, undecayed = parameters(), parameters()
    before = size(weights)
    rate = 1.0 if name == "prodigy" else 1e-2
    go(make(name, weights, weight_decay=0.5), weights, range(30), rate)
    go(make(name, undecayed, weight_decay=0.0), undecayed, range(30), rate)
    assert size(weights) < 0.95 * before or name == "prodigy" and size(weights) < before
    assert not torch.equal(weights["a.weight"], undecayed["a.weight"])
    assert all(weight.grad is None for weight in weights.values())


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_put_down_and_taken_up_equals_uninterrupted_bit_for_bit(name, rounding, tmp_path):
    from safetensors.torch import load_file, save_file

    if rounding and not OPTIMIZERS[name].one_by_one:
        pytest.skip("updates all weights together")
    dtype = torch.bfloat16 if rounding else torch.float32
    whole, parts = parameters(dtype), parameters(dtype)
    first = make(name, parts, rounding=rounding)
    go(make(name, whole, rounding=rounding), whole, range(6))
    go(first, parts, range(3))
    tensors, rest = first.state()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "s.safetensors")
    rest = json.loads(json.dumps(rest))
    again = {name: nn.Parameter(weight.detach().clone()) for name, weight in parts.items()}
    second = make(name, again, rounding=rounding)
    second.load(load_file(tmp_path / "s.safetensors"), rest)
    go(second, again, range(3, 6))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(weight.dtype == dtype for weight in again.values())


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    import distill_core.training.optim as optim

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optim, "import_module", missing)
    with pytest.raises(ValueError, match="optimizer lion needs a package: python -m pip install lion-pytorch"):
        Optimizer("lion", parameters(), learning_rate=1e-3, weight_decay=0)


def test_schedule_free_gives_out_other_weights_and_takes_its_own_back_exactly():
    weights = parameters()
    optimizer = make("schedulefree", weights)
    go(optimizer, weights, range(5))
    trained = {name: weight.detach().clone() for name, weight in weights.items()}
    with optimizer.exported():
        assert not torch.equal(weights["a.weight"], trained["a.weight"])
    assert all(torch.equal(weights[name], trained[name]) for name in weights)


def test_rounding_goes_to_a_neighbour_and_loses_nothing_on_average():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).repeat(4000, 1)
    rounded = stochastically_rounded(values, torch.Generator().manual_seed(2))
    assert torch.equal(rounded, rounded.bfloat16().float())
    spacing = values[0].abs() * 2**-7
    assert ((rounded - values).abs() <= spacing).all()
    assert ((rounded.double().mean(0) - values[0]).abs() < 0.05 * spacing).all()
    special = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert torch.equal(stochastically_rounded(special, None), special)
    assert stochastically_rounded(torch.tensor([float("nan")]), None).isnan().all()


def test_small_updates_are_not_lost_in_bfloat16():
    weights = {"w": nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))}
    optimizer = make("adamw", weights, rounding=True, weight_decay=0.0)
    for step in range(200):
        weights["w"].grad = torch.ones(1000, dtype=torch.bfloat16)
        optimizer.step(1e-4, torch.Generator().manual_seed(step))
    # Each update is a fortieth of what bfloat16 can tell from 1, so plain rounding would leave every weight at 1.
    assert weights["w"].float().mean().item() == pytest.approx(1 - 200e-4, abs=2e-3)


def test_moving_average_by_hand():
    weights = {"w": torch.zeros(2)}
    average = EMA(weights, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0, 8.0]):
        average.update({"w": torch.full((2,), value)}, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.weights["w"].tolist() == pytest.approx([expected] * 2)
