"""Every policy loss against its formula, token by token in plain Python and autograd, in fp64."""

import math

import pytest
import torch

from q3mega import ops
from q3mega.errors import UserError

N, V, H = 24, 19, 6
VARIANTS = ("grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo")


def operands(seed=0, far=0.5):
    """far: spread of the log ratios, wide enough that every clip is met."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = randn(N, H).requires_grad_(), randn(V, H).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    logp = logprobs(hidden, weight, targets)[0].detach()
    mask = torch.rand(N, generator=generator) > 0.25
    return (hidden, weight, targets), {
        "advantages": randn(N),
        "old_logprobs": logp + far * randn(N),
        "ref_logprobs": logp + 0.5 * randn(N),
        "rollout_logprobs": logp + 0.5 * randn(N),
        "loss_weights": mask * torch.rand(N, dtype=torch.float64, generator=generator),
        "seq_ids": torch.arange(N) // 7,
    }


def logprobs(hidden, weight, targets, temperature=1.0):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def clip(x, low, high):
    return min(max(x, low), high)


def naive(inputs, rows, variant, *, clip_low=0.2, clip_high=0.2, clip_ratio_c=None, kl_coef=0.0,
          kl_estimator="k3", entropy_coef=0.0, tis_cap=None, temperature=1.0):  # fmt: skip
    """The loss, one token a time; `min` and `max` of Python pick a branch, and so its gradient."""
    logp, entropy = logprobs(*inputs, temperature)
    old, ref, rollout = (rows[f"{x}_logprobs"] for x in ("old", "ref", "rollout"))
    w, seq, loss = rows["loss_weights"], rows["seq_ids"], torch.zeros((), dtype=torch.float64)
    for t in range(N):
        if w[t] == 0:
            continue
        a = rows["advantages"][t]
        ratio = (logp[t] - old[t]).exp()
        if variant.startswith("gspo"):
            own = [i for i in range(N) if seq[i] == seq[t] and w[i] != 0]
            ratio = (sum(logp[i] - old[i] for i in own) / len(own)).exp()
            if variant == "gspo_token":
                ratio = ratio.detach() * logp[t].exp() / logp[t].exp().detach()
        if variant == "cispo":
            term = -min(ratio.detach(), torch.tensor(clip_high)) * a * logp[t]
        elif variant == "sapo":
            tau = 1.0 if a >= 0 else 1.05
            term = -4 / tau / (1 + (-tau * (ratio - 1)).exp()) * a
        else:
            bounded = clip(ratio, torch.tensor(1 - clip_low), torch.tensor(1 + clip_high))
            term = -min(ratio * a, bounded * a)
            if clip_ratio_c is not None and a < 0:
                term = min(term, -clip_ratio_c * a)
        if tis_cap is not None:
            term = term * min((old[t] - rollout[t]).exp(), torch.tensor(tis_cap))
        d = ref[t] - logp[t]
        kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kl_estimator]
        loss = loss + w[t] * (term + kl_coef * kl - entropy_coef * entropy[t])
    return loss


def check(inputs, rows, variant, **settings):
    got = ops.grpo_loss(*inputs, **rows, variant=variant, **settings)
    want = naive(inputs, rows, variant, **settings)
    torch.testing.assert_close(got.loss, want, atol=1e-7, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(x, inputs[:2]) for x in (got.loss, want))
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
    return got


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients(variant, seed):
    inputs, rows = operands(seed)
    check(inputs, rows, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_terms_together(variant):
    inputs, rows = operands(2)
    check(
        inputs, rows, variant, clip_low=0.1, clip_high=1.3 if variant == "cispo" else 0.3,
        clip_ratio_c=1.5, kl_coef=0.3, entropy_coef=0.05, tis_cap=1.2, temperature=0.8,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    inputs, rows = operands(3)
    got = check(inputs, rows, "grpo", kl_coef=0.5, kl_estimator=estimator)
    d = rows["ref_logprobs"] - logprobs(*inputs)[0].detach()
    want = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]
    torch.testing.assert_close(got.kl, want * (rows["loss_weights"] != 0))


def test_k3_estimates_the_exact_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(2, V, H, dtype=torch.float64, generator=generator)
    hidden = torch.randn(1, H, dtype=torch.float64, generator=generator).expand(V, H)
    every = torch.arange(V)  # all tokens, weighted with their probability: the exact expectation
    logp, ref_logp = (logprobs(hidden, w, every)[0] for w in (policy, ref))
    out = ops.grpo_loss(
        hidden, policy, every, advantages=torch.zeros(V), old_logprobs=logp,
        loss_weights=logp.exp(), ref_logprobs=ref_logp, kl_coef=1.0,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, (logp.exp() * (logp - ref_logp)).sum())


def test_on_policy_every_variant_is_the_policy_gradient():
    inputs, rows = operands(4, far=0.0)
    rows["seq_ids"] = torch.arange(N)  # a token a sequence
    want = torch.autograd.grad(
        -(logprobs(*inputs)[0] * rows["advantages"] * rows["loss_weights"]).sum(), inputs[0]
    )[0]
    for variant in VARIANTS:
        high = 5.0 if variant == "cispo" else 0.2
        loss = ops.grpo_loss(*inputs, **rows, variant=variant, clip_high=high).loss
        torch.testing.assert_close(torch.autograd.grad(loss, inputs[0])[0], want)


@pytest.mark.parametrize("a,ratio,clipped", [(1, 1.1, 0), (1, 1.3, 1), (1, 0.5, 0), (-1, 0.5, 1),
                                             (-1, 0.9, 0), (-1, 2.9, 0), (-1, 3.1, 1)])  # fmt: skip
def test_clip_fraction_counts_lost_gradients(a, ratio, clipped):
    (hidden, weight, targets), _ = operands()
    one = hidden[:1].detach().requires_grad_(), weight, targets[:1]
    old = logprobs(*one)[0].detach() - math.log(ratio)
    out = ops.grpo_loss(
        *one, advantages=torch.tensor([float(a)]), old_logprobs=old, loss_weights=torch.ones(1),
        clip_ratio_c=3.0,
    )  # fmt: skip
    assert out.clip_fraction == clipped
    assert bool(torch.autograd.grad(out.loss, one[0])[0].any()) is not bool(clipped)


def test_outputs_beside_the_loss_are_detached_and_zero_at_masked_tokens():
    inputs, rows = operands()
    out = ops.grpo_loss(*inputs, **rows)
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    counts = rows["loss_weights"] != 0
    logp, entropy = (x.detach() * counts for x in logprobs(*inputs))
    torch.testing.assert_close(out.logprobs, logp)
    torch.testing.assert_close(out.entropy, entropy)
    del rows["ref_logprobs"]
    assert not ops.grpo_loss(*inputs, **rows).kl.any()


def test_far_ratios_stay_finite():
    inputs, rows = operands(5, far=300.0)
    rows["ref_logprobs"] = rows["old_logprobs"]
    for variant in VARIANTS:
        loss = ops.grpo_loss(*inputs, **rows, variant=variant, kl_coef=0.1).loss
        assert loss.isfinite() and torch.autograd.grad(loss, inputs[0])[0].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "column", ["advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"]
)
@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_tokens_without_weight_do_not_matter(variant, column, junk):
    inputs, rows = operands()
    settings = {"variant": variant, "kl_coef": 0.1, "kl_estimator": "k2", "tis_cap": 2.0}
    want = ops.grpo_loss(*inputs, **rows, **settings)
    rows[column] = rows[column].masked_fill(rows["loss_weights"] == 0, junk)
    got = ops.grpo_loss(*inputs, **rows, **settings)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.clip_fraction, want.clip_fraction)
    ours, theirs = (torch.autograd.grad(x.loss, inputs[:2]) for x in (got, want))
    torch.testing.assert_close(ours, theirs)


def test_no_tokens():
    inputs, rows = operands()
    (hidden, weight, targets), rows = inputs, {k: v[:0] for k, v in rows.items()}
    for variant in VARIANTS:
        out = ops.grpo_loss(hidden[:0], weight, targets[:0], **rows, variant=variant)
        assert out.loss == 0 and out.clip_fraction == 0
        out.loss.backward()


@pytest.mark.parametrize(
    "change,word",
    [
        ({"variant": "ppo"}, "variant='ppo'"),
        ({"kl_estimator": "k9"}, "kl_estimator='k9'"),
        ({"variant": "gspo", "seq_ids": None}, "seq_ids"),
        ({"tis_cap": 2.0, "rollout_logprobs": None}, "rollout_logprobs"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, "ref_logprobs"),
        ({"advantages": torch.zeros(3)}, "advantages"),
    ],
)
def test_wrong_arguments_are_named(change, word):
    inputs, rows = operands()
    with pytest.raises(UserError, match=word):
        ops.grpo_loss(*inputs, **(rows | change))
