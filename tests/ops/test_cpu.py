"""The C++ backend against float64: values, gradients, odd shapes, torch.library.

All of it on every build of the kernels that this machine can run.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q3mega import ops
from q3mega.ops.backends import cpu
from q3mega.ops.fused import lm_head as lm_head

VARIANTS = ("grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo")
KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(scope="module", params=cpu.BUILDS, autouse=True)
def build(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_cpu", import_module(f"q3mega.{request.param}"))
        yield


def randn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def both(run, *leaves: torch.Tensor, atol: float = 2e-5) -> None:
    """run(backend, *leaves) gives (scalar, other outputs): cpu in fp32 is the reference in fp64."""
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        scalar, *others = run(backend, *inputs)
        grads = torch.autograd.grad(scalar, inputs)
        results.append([scalar.detach(), *others, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=2e-4)


def sized(n: int, v: int, h: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    leaves = randn(seed, (n, h), (v, h))
    return leaves, torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 7, 10**6], ids=lambda rows: f"blocks of {rows}")
def blocks(request, monkeypatch):
    """The buffer holds so many rows of a vocabulary of 37."""
    monkeypatch.setattr(lm_head, "CPU_LOGITS_BYTES", request.param * 37 * 4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("n", "valid"), [(1, None), (20, None), (20, 30), (0, None)])
def test_linear_logprob(blocks, n, valid, temperature) -> None:
    leaves, targets = sized(n, 37, 6, 0)
    (a, b) = randn(1, (n,), (n,))
    a[::3] = b[::3] = 0.0
    targets = targets % (valid or 37)

    def run(backend, hidden, weight):
        logp, entropy = ops.linear_logprob(
            hidden, weight, targets, temperature=temperature, valid_vocab=valid, backend=backend
        )
        return (logp * a + entropy * b).sum(), logp.detach(), entropy.detach()

    both(run, *leaves)


def rows_of(n: int, seed: int, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    advantages, old, ref, rollout, weights = randn(seed, *[(n,)] * 5)
    advantages[::4], weights[::5] = 0.0, 0.0
    return {
        "advantages": advantages,
        "old_logprobs": logp + 0.5 * old,
        "ref_logprobs": logp + 0.5 * ref,
        "rollout_logprobs": logp + 0.5 * rollout,
        "loss_weights": weights.abs(),
        "seq_ids": torch.arange(n) // 7,
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_coef": 0.1, "kl_estimator": "k1", "clip_high": 0.28},
        {"kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.05},
        {"kl_coef": 0.1, "kl_estimator": "k3", "tis_cap": 1.5, "clip_ratio_c": 1.4},
        {"entropy_coef": 0.05, "temperature": 0.7, "valid_vocab": 30},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_grpo_loss(blocks, variant, settings) -> None:
    (hidden, weight), targets = sized(23, 37, 6, 2)
    targets = targets % 30
    with torch.no_grad():
        logp = ops.linear_logprob(hidden, weight, targets)[0]
    rows = rows_of(23, 3, logp)

    def run(backend, hidden, weight):
        typed = {k: x if k == "seq_ids" else x.to(hidden.dtype) for k, x in rows.items()}
        out = ops.grpo_loss(
            hidden, weight, targets, **typed, variant=variant, **settings, backend=backend
        )
        return 1.7 * out.loss, *out[1:]

    both(run, hidden, weight)


def test_nothing_at_masked_tokens_reaches_the_loss() -> None:
    leaves, targets = sized(9, 37, 6, 4)
    rows = rows_of(9, 5, torch.zeros(9))
    rows["loss_weights"][:4] = 0.0
    for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name][:4] = torch.nan
    settings = {"kl_coef": 0.1, "tis_cap": 2.0}
    both(lambda b, *x: ops.grpo_loss(*x, targets, **rows, **settings, backend=b)[:1], *leaves)
    rows["loss_weights"] = torch.zeros(9)  # not one row left
    both(lambda b, *x: ops.grpo_loss(*x, targets, **rows, backend=b)[:1], *leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("valid", [None, 30])
def test_distill_loss(blocks, kind, temperature, valid) -> None:
    leaves = randn(6, (20, 6), (37, 6))
    teacher, head, weights = randn(7, (20, 9), (37, 9), (20,))
    weights[::3] = 0.0

    def run(backend, hidden, weight):
        dtype = hidden.dtype
        out = ops.distill_loss(
            hidden, weight, teacher_hidden=teacher.to(dtype), teacher_weight=head.to(dtype),
            divergence=kind, beta=0.3, temperature=temperature, valid_vocab=valid,
            loss_weights=weights.to(dtype), backend=backend,
        )  # fmt: skip
        return out

    both(run, *leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 5, 36])
def test_distill_from_the_teachers_best(blocks, kind, tail, k) -> None:
    leaves = randn(8, (11, 6), (37, 6))
    logits, weights = randn(9, (11, 37), (11,))
    logprobs, ids = logits.log_softmax(-1).topk(k)
    weights[::3] = 0.0

    def run(backend, hidden, weight):
        dtype = hidden.dtype
        return ops.distill_loss(
            hidden, weight, teacher_topk=(ids, logprobs.to(dtype)), divergence=kind, beta=0.3,
            temperature=1.3, tail=tail, loss_weights=weights.to(dtype), backend=backend,
        )  # fmt: skip

    both(run, *leaves)


def test_a_narrower_teacher_takes_the_students_blocks(monkeypatch) -> None:
    monkeypatch.setattr(lm_head, "CPU_LOGITS_BYTES", 1)
    leaves, teacher = randn(22, (11, 12), (37, 12)), randn(23, (11, 4), (37, 4))  # 3 rows, not 1

    def run(backend, hidden, weight):
        other = [x.to(hidden.dtype) for x in teacher]
        return ops.distill_loss(
            hidden, weight, teacher_hidden=other[0], teacher_weight=other[1],
            divergence="forward_kl", backend=backend,
        )  # fmt: skip

    both(run, *leaves)


def test_sums_over_picks_do_not_depend_on_the_threads() -> None:
    dz, hidden = randn(24, (40, 5), (40, 7))
    picked = torch.randint(-1, 9, (40, 5), generator=torch.Generator().manual_seed(25))
    threads, actual = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        actual.append(torch.zeros(9, 7))
        cpu.picked_d_weight(dz, hidden, picked, actual[-1])
    torch.set_num_threads(threads)
    there = (picked[:, :, None] == torch.arange(9)).float()
    torch.testing.assert_close(actual[0], torch.einsum("nk,nkv,nh->vh", dz, there, hidden))
    assert torch.equal(actual[0], actual[1]) and torch.equal(actual[0], actual[2])


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("tail", [True, False])
def test_no_token_counts(n, tail) -> None:
    leaves = [x.requires_grad_() for x in randn(21, (n, 6), (37, 6))]
    ids, logprobs = torch.arange(4).expand(n, 4), torch.full((n, 4), -2.0)
    out = ops.distill_loss(
        *leaves, teacher_topk=(ids, logprobs), divergence="forward_kl", tail=tail,
        loss_weights=torch.zeros(n), backend="cpu",
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, leaves)
    assert not any(x.any() for x in (out.loss, out.per_token, *grads))


@given(n=st.integers(0, 9), v=st.integers(1, 70), h=st.integers(1, 9), seed=st.integers(0, 9999))
def test_random_shapes(n, v, h, seed) -> None:
    leaves, targets = sized(n, v, h, seed)
    rows = rows_of(n, seed + 1, torch.full((n,), -1.0))
    both(lambda b, *x: ops.grpo_loss(*x, targets, **rows, entropy_coef=0.1, backend=b)[:1], *leaves)
    teacher = randn(seed + 2, (n, h), (v, h))

    def run(backend, hidden, weight):
        other = [x.to(hidden.dtype) for x in teacher]
        return ops.distill_loss(
            hidden, weight, teacher_hidden=other[0], teacher_weight=other[1], divergence="jsd",
            loss_weights=torch.ones(n, dtype=hidden.dtype), backend=backend,
        )  # fmt: skip

    both(run, *leaves)


def test_large_logits_and_a_large_vocabulary() -> None:
    (hidden, weight), targets = sized(5, 5003, 16, 10)
    both(
        lambda b, *x: (sum(o.sum() for o in ops.linear_logprob(*x, targets, backend=b)),),
        8 * hidden, 2 * weight, atol=2e-3,
    )  # fmt: skip


def test_training_after_inference_mode() -> None:
    (hidden, weight), targets = sized(4, 1203, 6, 20)
    with torch.inference_mode():
        ops.linear_logprob(hidden, weight, targets, backend="cpu")
    logp, _ = ops.linear_logprob(hidden.requires_grad_(), weight, targets, backend="cpu")
    logp.sum().backward()
    assert hidden.grad.any()


def test_nan_stays_nan() -> None:
    (hidden, weight), targets = sized(4, 203, 6, 19)
    weight[150] = torch.nan
    logp, entropy = ops.linear_logprob(hidden, weight, targets, backend="cpu")
    assert logp.isnan().all() and entropy.isnan().all()


def test_calls_in_several_threads_do_not_share_a_buffer() -> None:
    cases = [sized(64, 997, 16, seed) for seed in range(4)]

    def run(case) -> torch.Tensor:
        return ops.linear_logprob(*case[0], case[1], backend="cpu")[0]

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, cases * 25))
    assert all(torch.equal(x, alone[i % 4]) for i, x in enumerate(together))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen: int) -> None:
    leaves, targets = sized(8, 37, 6, 11)
    rows = rows_of(8, 12, torch.full((8,), -3.0))
    leaves[1 - frozen].requires_grad_()
    ops.grpo_loss(*leaves, targets, **rows, entropy_coef=0.1).loss.backward()
    assert leaves[frozen].grad is None and leaves[1 - frozen].grad.any()


def test_bfloat16_operands_are_computed_in_fp32() -> None:
    (hidden, weight), targets = sized(8, 37, 6, 13)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    logp, _ = ops.linear_logprob(hidden, weight, targets, backend="cpu")
    assert logp.dtype == torch.float32
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(8), targets]
    torch.testing.assert_close(logp.double(), exact, atol=1e-5, rtol=1e-5)
    logp.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.fixture
def half_products(monkeypatch):
    """torch.mm with fp32 results of half-precision operands, which only a GPU has."""
    mm = torch.mm

    def emulated(a, b, *, out_dtype=None, **options):
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", emulated)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["linear_logprob", "grpo_loss", "distill_loss", "distill_topk"])
def test_half_precision_weights_add_to_fp32_main_gradients(name, tied, half_products) -> None:
    def run(megatron: bool) -> torch.Tensor:
        hidden, weight, *options = operands()[name]
        weight = torch.nn.Parameter(weight.detach().bfloat16())
        if megatron:  # as its DistributedDataParallel leaves a parameter
            weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
            weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, tied
        if name == "distill_loss":
            options[:2] = [x.bfloat16() for x in options[:2]]
        out = getattr(torch.ops.q3mega, name)(hidden.detach().bfloat16(), weight, *options)
        (3 * out[0].sum()).backward()
        if not megatron:
            return weight.grad
        assert weight.grad_added_to_main_grad
        assert not tied or not weight.grad.any()
        return weight.main_grad - 1

    rounded, exact = run(False), run(True)
    assert rounded.dtype == torch.bfloat16 and rounded.any()
    torch.testing.assert_close(exact.bfloat16().float(), rounded.float(), atol=1e-2, rtol=1e-2)
    assert not torch.equal(exact, exact.bfloat16().float())  # nothing was rounded on the way


def test_fp64_stays_with_the_reference() -> None:
    (hidden, weight), targets = sized(3, 37, 6, 14)
    logp, _ = ops.linear_logprob(hidden.double(), weight.double(), targets)
    assert logp.dtype == torch.float64
    with pytest.raises(RuntimeError, match="fp64"):
        ops.linear_logprob(hidden.double(), weight.double(), targets, backend="cpu")


def operands() -> dict[str, tuple]:
    leaves, targets = sized(9, 37, 6, 15)
    hidden, weight = (x.requires_grad_() for x in leaves)
    rows = rows_of(9, 16, torch.full((9,), -3.0))
    w = rows["loss_weights"]
    teacher, head = randn(17, (9, 4), (37, 4))
    logprobs, ids = randn(18, (9, 37))[0].log_softmax(-1).topk(4)
    grpo = (
        hidden, weight, targets, rows["advantages"], rows["old_logprobs"], w, None, None, "grpo",
        0.2, 0.2, 0.0, 0.01, "k3", None, None, 1.0, -1, "", "cpu", True, True,
    )  # fmt: skip
    how = w, "jsd", 0.5, 1.0
    return {
        "linear_logprob": (hidden, weight, targets, 1.0, -1, "", "cpu"),
        "grpo_loss": grpo,
        "distill_loss": (hidden, weight, teacher, head, *how, -1, "", "cpu", True, True),
        "distill_topk": (
            hidden, weight, ids, ops.distill_loss.__globals__["bucketed"](logprobs, True), *how,
            -1, "", "cpu", True, True,
        ),
        "distill_renormalised": (hidden, weight, ids, logprobs, *how, "", "cpu", True, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(operands()))
def test_opcheck(name: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.q3mega, name), operands()[name], test_utils=tests)


# -- attention -----------------------------------------------------------------------------------


def attend(lengths: list[int], heads: tuple[int, int], dim: int, seed: int = 0, **settings) -> None:
    """Forward and backward of packed sequences, cpu in fp32 against the reference in fp64."""
    n, borders = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    leaves = randn(seed, (n, heads[0], dim), (n, heads[1], dim), (n, heads[1], dim))
    (pull,) = randn(seed + 1, (n, heads[0], dim))
    q_scale, k_scale = (1 + 0.1 * x for x in randn(seed + 2, (n,), (n,)))
    scales = {"q_scale": q_scale, "k_scale": k_scale}

    def run(backend, q, k, v):
        out = ops.dual_chunk_attention(
            q, k, v, cu_seqlens=borders, rope_theta=100.0, backend=backend, **scales, **settings
        )
        return (out * pull).sum(), out.detach()

    both(run, *leaves, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1], [9, 1, 200, 64], [65], [300], [130, 129]])
@pytest.mark.parametrize(
    "sizes",
    [
        {"chunk_size": 10**6, "local_size": 1},
        {"chunk_size": 48, "local_size": 16},
        {"chunk_size": 100, "local_size": 1},
        {"chunk_size": 64, "local_size": 0},
        {"chunk_size": 7, "local_size": 6},
        {"chunk_size": 64, "local_size": 16, "clamp_at": 63, "softmax_scale": 0.3},
    ],
    ids=str,
)
def test_attention(lengths, sizes) -> None:
    attend(lengths, (4, 2), 8, **sizes)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), heads=st.integers(1, 3),
    group=st.integers(1, 3), half=st.integers(1, 20), chunk=st.integers(1, 70), data=st.data(),
)  # fmt: skip
def test_attention_of_random_shapes(lengths, heads, group, half, chunk, data) -> None:
    local = data.draw(st.integers(0, chunk - 1))
    attend(lengths, (heads * group, heads), 2 * half, 3, chunk_size=chunk, local_size=local)


@pytest.mark.parametrize("cut", [1, 30, 64, 149])
def test_attention_in_pieces_is_attention_at_once(cut) -> None:
    q, k, v = randn(4, (150, 4, 8), (150, 2, 8), (150, 2, 8))
    settings = {"chunk_size": 48, "local_size": 16, "backend": "cpu"}
    at_once = ops.dual_chunk_attention(q, k, v, **settings)
    first = ops.dual_chunk_attention(q[:cut], k[:cut], v[:cut], **settings)
    second = ops.dual_chunk_attention(q[cut:], k, v, q_offset=cut, **settings)
    torch.testing.assert_close(torch.cat([first, second]), at_once, atol=1e-5, rtol=1e-5)


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    leaves = [x.requires_grad_() for x in randn(5, (200, 4, 8), (200, 2, 8), (200, 2, 8))]
    actual, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = ops.dual_chunk_attention(*leaves, chunk_size=48, local_size=16, backend="cpu")
            actual.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))
