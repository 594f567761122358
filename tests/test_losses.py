"""Losses: golden values, known answers, derived gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_kit.loss_types import LOSS_TYPES, loss_at_reference
from dpo_kit.losses import implicit_rewards, preference_loss

PC, PR = [-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0]
RC, RR = [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1]
LC, LR = [2, 5, 4], [1, 10, 7]

# beta 0.1; the margins x = (pc - rc) - (pr - rr) are 0, 10 and 20 nats. Pair 1 by hand: sigmoid
# -log sigma(1) = 0.3132617; ipo (0.1/5 - (-9.9/10) - 1/0.2)^2 = 3.99^2 = 15.9201.
GOLDEN = {
    ("sigmoid", 0.0): [0.6931472, 0.3132617, 0.1269280],
    ("sigmoid", 0.1): [0.6931472, 0.4132617, 0.3269280],
    ("robust", 0.1): [0.6931472, 0.1882617, -0.1230720],
    ("hinge", 0.0): [1.0, 0.0, 0.0],
    ("ipo", 0.0): [25.0, 15.920100, 5.014401],
    ("sigmoid_norm", 0.0): [0.6931472, 0.6439218, 0.5646083],
}


def tensors(dtype=torch.float64):
    return [torch.tensor(v, dtype=dtype) for v in (PC, PR, RC, RR)]


def lens():
    return {"chosen_lens": torch.tensor(LC), "rejected_lens": torch.tensor(LR)}


@pytest.mark.parametrize(("loss_type", "smoothing"), GOLDEN)
def test_golden_values(loss_type, smoothing):
    loss = preference_loss(*tensors(), beta=0.1, loss_type=loss_type, label_smoothing=smoothing, **lens())
    expected = torch.tensor(GOLDEN[loss_type, smoothing], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-7)


def test_golden_rewards():
    pc, pr, rc, rr = tensors()
    torch.testing.assert_close(implicit_rewards(pc, rc, beta=0.1), torch.tensor([0.0, 0.01, -0.09]).double())
    torch.testing.assert_close(implicit_rewards(pr, rr, beta=0.1), torch.tensor([0.0, -0.99, -2.09]).double())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_policy_equal_to_reference_gives_the_known_answer(loss_type, beta):
    pc, pr, _, _ = tensors()
    loss = preference_loss(pc, pr, pc, pr, beta=beta, loss_type=loss_type, **lens())
    assert loss.tolist() == pytest.approx([loss_at_reference(loss_type, beta)] * 3, rel=1e-12)
    known = {"ipo": (1 / (2 * beta)) ** 2, "hinge": 1.0}.get(loss_type, math.log(2))
    assert loss_at_reference(loss_type, beta) == pytest.approx(known)


def test_sigmoid_gradient_is_that_of_the_paper():
    """d loss / d pc = -beta * sigma(-beta x): the weight of eq. 7's gradient."""
    pc, pr, rc, rr = tensors()
    pc.requires_grad_()
    preference_loss(pc, pr, rc, rr, beta=0.1).sum().backward()
    x = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(pc.grad, -0.1 * torch.sigmoid(-0.1 * x), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_match_finite_differences(loss_type):
    x = [t.requires_grad_() for t in tensors()]
    x[0].data[0] += 0.3  # away from the kink of hinge at margins 10 and 20: beta x = 0.03, 1, 2 there
    x[0].data[1] -= 3

    def loss(*t):
        return preference_loss(*t, beta=0.1, loss_type=loss_type, **lens())

    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert preference_loss(*tensors(dtype), beta=0.1).dtype == dtype


def test_rewards_carry_no_gradient():
    pc, _, rc, _ = tensors()
    assert not implicit_rewards(pc.requires_grad_(), rc, beta=0.1).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0 must be greater than 0"),
        ({"beta": 0.1, "loss_type": "IPO"}, "loss_type = 'IPO' is not one of sigmoid, ipo"),
        ({"beta": 0.1, "loss_type": "ipo"}, "needs chosen_lens and rejected_lens"),
        ({"beta": 0.1, "loss_type": "hinge", "label_smoothing": 0.1}, "has no meaning for loss_type 'hinge'"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "must be at least 0 and below 0.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        preference_loss(*tensors(), **arguments)
