"""AdamW with bfloat16 states against torch's own, and the rounding it stands on."""

from __future__ import annotations

import torch

from dpo_kit.engine.optimizer import LeanAdamW, round_stochastically

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def test_rounding_is_right_on_average_and_hits_neighbours_only():
    torch.manual_seed(0)
    value = torch.full((200_000,), 1.0 + 0.25 * 2**-7)  # a quarter of the way to the next bfloat16
    rounded = round_stochastically(value).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded > 1).float().mean() - 0.25) < 0.01
    exact = torch.tensor([0.0, -1.5, 2.0**-100])
    assert torch.equal(round_stochastically(exact).float(), exact)


def trained(make, steps=300):
    torch.manual_seed(0)
    target = torch.randn(64)
    weight = torch.nn.Parameter(torch.zeros(64))
    optimizer = make([weight])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((weight - target) ** 2 * torch.linspace(0.1, 3, 64)).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return weight.detach(), losses, optimizer


def test_it_follows_torchs_adamw():
    ours, losses, optimizer = trained(lambda p: LeanAdamW(p, **OPTIONS))
    theirs, their_losses, _ = trained(lambda p: torch.optim.AdamW(p, **OPTIONS))
    assert {t.dtype for n, t in optimizer.state_dict()["state"][0].items() if n != "step"} == {torch.bfloat16}
    assert abs(losses[-1] - their_losses[-1]) < 0.02 * their_losses[0]
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_the_second_moment_keeps_moving():
    """A gradient that grows by half: rounding to nearest would leave exp_avg_sq where it is."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = LeanAdamW([weight], **OPTIONS)
    for size in (1.0, 1.5):
        for _ in range(1500):
            weight.grad = torch.full((4096,), size)
            optimizer.step()
    expected = 2.25 - (2.25 - (1 - 0.999**1500)) * 0.999**1500
    assert abs(optimizer.state[weight]["exp_avg_sq"].float().mean() - expected) < 0.02 * expected


def test_scale_and_skip_are_read_as_torch_reads_them():
    results = []
    for kind in (LeanAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.ones(8))
        optimizer = kind([weight], **OPTIONS) if kind is LeanAdamW else kind([weight], fused=True, **OPTIONS)
        weight.grad = torch.full((8,), 4.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        optimizer.step()
        results.append(weight.detach().clone())
        weight.grad = torch.full((8,), torch.nan)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(weight.detach(), results[-1])
        assert optimizer.state[weight]["step"] == 1
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)
