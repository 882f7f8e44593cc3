"""The optimizer of the shipped base: what a checkpoint keeps is all that the next step needs."""

from pathlib import Path

import torch

from tools.tiny_base.optimize import descend, load_state, make_optimizers, save_state, set_learning_rates


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Linear(4, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
        self.head = torch.nn.Linear(8, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.embeddings(values)
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return self.head(values)


def train(model: Small, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        set_learning_rates(optimizers, step, 6)
        values = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        descend(model(values).square().sum(), model, optimizers)


def test_matrices_inside_layers_go_to_muon_and_frozen_ones_to_nobody() -> None:
    model = Small()
    model.layers[0].weight.requires_grad = False
    muon, adamw = (optimizer.param_groups[0]["params"] for optimizer in make_optimizers(model, 0.0))
    assert [parameter is model.layers[1].weight for parameter in muon] == [True]
    assert len(adamw) == len(list(model.parameters())) - 2


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = Small()
    torch.manual_seed(0)
    first = Small()
    train(whole, make_optimizers(whole, 0.1), range(6))

    optimizers = make_optimizers(first, 0.1)
    train(first, optimizers, range(3))
    save_state(tmp_path / "state.pt", first, optimizers, 3)
    resumed = Small()
    optimizers = make_optimizers(resumed, 0.1)
    start = load_state(tmp_path / "state.pt", resumed, optimizers)
    assert start == 3
    train(resumed, optimizers, range(start, 6))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_checkpoint_training_starts_at_its_first_step(tmp_path: Path) -> None:
    model = Small()
    assert load_state(tmp_path / "none.pt", model, make_optimizers(model, 0.0)) == 0
