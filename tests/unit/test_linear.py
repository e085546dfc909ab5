"""Linear, GELU and the heads' loss against torch's own: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import linear
from models.head_loss import mean_cross_entropy
from models.linear import ENOUGH_ROWS, Linear, gelu
from models.onednn import usable

ROWS = 2 * ENOUGH_ROWS


def error(mine: Tensor, wanted: Tensor) -> float:
    return ((mine.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("shape", [(ROWS, 24), (2, ROWS, 24), (3, 5, 24), (24,)])
@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("prefers_onednn", [True, False])
def test_linear_is_torch_s_in_value_and_gradients(
    shape: tuple[int, ...], width: int, prefers_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prefers_onednn and not usable(torch.float32, ("_linear_pointwise",)):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear, "_prefers_onednn", lambda: prefers_onednn)
    torch.manual_seed(0)
    mine = Linear(24, width)
    reference = nn.Linear(24, width).double()
    reference.load_state_dict(mine.state_dict())
    x = torch.randn(shape, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, wanted = mine(x), reference(wide)
    gradient = torch.randn_like(y)
    assert error(y, wanted) <= 1e-6
    parameters = (x, mine.weight, mine.bias)
    got = torch.autograd.grad(y, parameters, gradient)
    others = torch.autograd.grad(
        wanted, (wide, reference.weight, reference.bias), gradient.double()
    )
    for one, other, parameter in zip(got, others, parameters, strict=True):
        assert error(one, other) <= 1e-6
        assert one.stride() == parameter.stride()


def test_linear_under_autocast_is_torch_s_to_the_bit() -> None:
    torch.manual_seed(0)
    mine = Linear(16, 32)
    x = torch.randn(ROWS, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = mine(x), F.linear(x, mine.weight, mine.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wanted)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
)
def test_gelu_is_torch_s_tanh_form_in_value_and_gradient(
    dtype: torch.dtype, largest: float
) -> None:
    torch.manual_seed(0)
    # More than a chunk, both tails, and a layout that is not contiguous.
    x = (torch.randn(3, 1000, 70, dtype=torch.float64) * 3).to(dtype).transpose(0, 1)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0.0, 100.0, -100.0
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, wanted = gelu(x), F.gelu(wide, approximate="tanh")
    gradient = torch.randn_like(y)
    assert y.dtype == dtype
    assert error(y, wanted) <= largest
    (got,) = torch.autograd.grad(y, x, gradient)
    (other,) = torch.autograd.grad(wanted, wide, gradient.double())
    assert error(got, other) <= largest


@pytest.mark.parametrize("positions", [1, ROWS])
def test_the_heads_loss_is_cross_entropy_in_value_and_gradients(positions: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 30)
    x = torch.randn(positions, 12, requires_grad=True)
    targets = torch.randint(0, 30, (positions,))
    with torch.no_grad():
        head.weight.mul_(50)  # some targets are next to impossible
    loss = mean_cross_entropy(x, head, targets)
    wanted = F.cross_entropy(head(x), targets)
    assert error(loss, wanted) <= 1e-6
    parameters = (x, head.weight, head.bias)
    for _ in range(2):  # nothing is used up
        got = torch.autograd.grad(loss * 3, parameters, retain_graph=True)
        others = torch.autograd.grad(wanted * 3, parameters, retain_graph=True)
        for one, other in zip(got, others, strict=True):
            assert error(one, other) <= 1e-5


def test_the_heads_loss_stays_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 30)
    x, targets = torch.randn(ROWS, 12), torch.randint(0, 30, (ROWS,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_cross_entropy(x, head, targets)
    assert torch.equal(loss, mean_cross_entropy(x, head, targets))
