"""Muon against PyTorch's, and its Newton-Schulz iteration against the SVD."""

import pytest
import torch

from minomni.train import muon
from minomni.train.loop import Recipe, make_optimizers
from minomni.train.muon import Muon, orthogonal


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_steps_as_torch_s_does(bf16, monkeypatch):
    """Wide, high and square matrices, two of one shape, one that gets no gradient, weight decay,
    three steps.

    torch's Muon always multiplies in bf16, so the two agree in two digits. In bf16 both round alike
    but for the order of summing.
    """
    monkeypatch.setattr(muon, "has_bf16", lambda device: bf16)
    tolerance = 0.02 if bf16 else 0.05  # five steep polynomials enlarge a rounding of 0.4 %
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    ours = [
        torch.nn.Parameter(draw(shape)) for shape in ((8, 24), (24, 8), (8, 24), (16, 16), (4, 6))
    ]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs):
            a.grad = b.grad = draw(a.shape)
        before = [matrix.detach().clone() for matrix in theirs]
        mine.step(), other.step()
        for a, b, c in zip(ours, theirs, before):
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * float((b - c).detach().abs().max())
            )
    assert mine.state_dict()["state"].keys() == other.state_dict()["state"].keys()


@pytest.mark.parametrize("shape", [(4, 6, 3), (6, 2, 5)])
def test_a_filter_is_updated_as_its_matrix(shape):
    """[out, in, kernel] as [out, in * kernel], wide or high, beside a matrix of another shape."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    conv_filter = torch.nn.Parameter(start.clone())
    matrix = torch.nn.Parameter(start.reshape(shape[0], -1).clone())
    other = torch.nn.Parameter(torch.randn(3, 5, generator=draw))
    optimizers = [Muon(group, lr=0.02) for group in ([conv_filter, other], [matrix])]
    for _ in range(2):
        gradient = torch.randn(shape, generator=draw)
        conv_filter.grad = gradient
        matrix.grad = gradient.reshape(shape[0], -1)
        other.grad = torch.randn(3, 5, generator=draw)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv_filter.reshape(shape[0], -1), matrix)
    assert not torch.equal(conv_filter, start)


def test_muon_gets_matrices_and_filters_of_several_channels():
    layers = {
        "up": torch.nn.ConvTranspose1d(4, 2, 4),
        "conv": torch.nn.Conv1d(4, 4, 3),
        "linear": torch.nn.Linear(4, 4),
        "depthwise": torch.nn.Conv1d(4, 4, 3, groups=4),
        "last": torch.nn.Conv1d(4, 1, 3),
        "patches": torch.nn.Conv3d(3, 4, 2),
        "embed": torch.nn.Embedding(8, 4),
    }
    parameters = dict(torch.nn.ModuleDict(layers).named_parameters())
    adamw, orthogonalized = make_optimizers(parameters, Recipe(steps=1, batch=1, lr=1.0))
    assert isinstance(adamw, torch.optim.AdamW)
    chosen = {id(parameter) for parameter in orthogonalized.param_groups[0]["params"]}
    names = {name for name, parameter in parameters.items() if id(parameter) in chosen}
    assert names == {"up.weight", "conv.weight", "linear.weight"}


def test_newton_schulz_keeps_directions_and_evens_out_lengths():
    """A matrix with known singular vectors, of lengths from 1 to 0.1: afterwards all lie between
    0.6 and 1.3.
    """
    u, v = (
        torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(i))).Q
        for i in (1, 2)
    )
    turned = orthogonal((u @ torch.diag(torch.linspace(1, 0.1, 8)) @ v.T)[None], steps=5)[0].float()
    lengths = u.T @ turned @ v
    assert ((lengths.diagonal() > 0.6) & (lengths.diagonal() < 1.3)).all()
    assert (lengths - lengths.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape):
    """In fp64, to all digits, against the singular value decomposition."""
    matrices = torch.randn(
        4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    u, lengths, v = torch.linalg.svd(matrices, full_matrices=False)
    lengths = lengths / lengths.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        lengths = 3.4445 * lengths - 4.7750 * lengths**3 + 2.0315 * lengths**5
    torch.testing.assert_close(
        orthogonal(matrices, 5), u @ torch.diag_embed(lengths) @ v, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("given", "in_hardware", "multiplied"),
    [("float32", True, "bfloat16"), ("float32", False, "float32"), ("float64", True, "float64")],
)
def test_newton_schulz_multiplies_in_what_the_device_is_good_at(
    given, in_hardware, multiplied, monkeypatch
):
    monkeypatch.setattr(muon, "has_bf16", lambda device: in_hardware)
    matrices = torch.randn(1, 2, 2, dtype=getattr(torch, given))
    assert orthogonal(matrices, 5).dtype == getattr(torch, multiplied)
