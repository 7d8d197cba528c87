"""Muon and AdamW as one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vg.errors import ConfigError
from vg.training.lora import LoraConfig
from vg.training.muon import MuonWithAdamW, matrices
from vg.training.optim import GroupConfig, OptimConfig, build_optimizer, build_schedule


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.hidden = nn.Linear(32, 48)
        self.box = nn.Linear(48, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.norm(x + self.attention(x, x, x)[0])
        output: Tensor = self.box(self.hidden(x).relu())
        return output


def new_network() -> Network:
    torch.manual_seed(0)
    return Network()


def train(model: Network, *optimizers: torch.optim.Optimizer, steps: int = 4) -> Tensor:
    """Return all weights after some steps on the same data."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randint(20, (3, 5), generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_matrices_are_weights_of_linear_layers_that_are_not_outputs() -> None:
    model = new_network()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter] for parameter in matrices(model)}
    assert found == {"attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"}


def test_it_equals_two_optimizers() -> None:
    config = OptimConfig(algorithm="muon", lr=1e-2, weight_decay=0.1, groups={"hidden": GroupConfig(lr=1e-3)})
    model = new_network()
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, MuonWithAdamW)
    together = train(model, optimizer)

    model = new_network()
    of_muon = [
        {"params": [model.attention.in_proj_weight, model.attention.out_proj.weight], "lr": 1e-2},
        {"params": [model.hidden.weight], "lr": 1e-3},
    ]
    of_adamw = [
        {"params": [model.embedding.weight, model.box.weight], "weight_decay": 0.1},
        {"params": [*model.norm.parameters(), *map(_bias, (model.attention.out_proj, model.box))], "weight_decay": 0.0},
        {"params": [model.attention.in_proj_bias], "weight_decay": 0.0},
        {"params": [model.hidden.bias], "weight_decay": 0.0, "lr": 1e-3},
    ]
    muon = torch.optim.Muon(of_muon, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert torch.equal(together, train(model, muon, torch.optim.AdamW(of_adamw, lr=1e-2, fused=True)))


def test_kernels_of_a_convolution_are_one_matrix() -> None:
    torch.manual_seed(0)
    convolution, images = nn.Conv2d(2, 24, 3, bias=False), torch.randn(4, 2, 8, 8)
    matrix = nn.Parameter(convolution.weight.detach().flatten(1))  # [24, 2 x 3 x 3]
    optimizer = build_optimizer(convolution, OptimConfig(algorithm="muon", lr=1e-2, weight_decay=0.1))
    muon = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        convolution.zero_grad()
        convolution(images).square().mean().backward()
        assert convolution.weight.grad is not None
        matrix.grad = convolution.weight.grad.flatten(1)
        optimizer.step()
        muon.step()
        assert torch.equal(convolution.weight.flatten(1), matrix)


def test_grouped_and_small_convolutions_are_left_to_adamw() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, 16, 7, groups=16), nn.Conv2d(16, 4, 1), nn.Conv2d(3, 32, 1)
    )
    assert list(matrices(model)) == [model[0].weight]


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias


def test_models_of_matrices_only_and_without_any() -> None:
    layer = nn.Linear(32, 32, bias=False)
    optimizer = build_optimizer(layer, OptimConfig(algorithm="muon"))
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    with pytest.raises(ConfigError, match=r"optim\.algorithm=muon: no matrix is trained, set optim\.algorithm=adamw"):
        build_optimizer(nn.Linear(32, 4), OptimConfig(algorithm="muon"))
    with pytest.raises(ValueError, match="lora trains matrices of low rank"):
        OptimConfig(algorithm="muon", lora=LoraConfig(targets=["text"]))


def test_a_restored_state_continues_exactly() -> None:
    model, config = new_network(), OptimConfig(algorithm="muon", lr=1e-2)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, num_steps=10)
    train(model, optimizer)
    schedule.step()
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer)

    model = new_network()
    model.load_state_dict(weights)
    optimizer = build_optimizer(model, config)
    optimizer.load_state_dict(state)
    assert torch.equal(train(model, optimizer), expected)
    assert {group["lr"] for group in optimizer.param_groups} == set(schedule.get_last_lr())
