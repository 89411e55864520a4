"""Forced backends that are not there say why."""

import pytest
import torch

from q3mega import ops
from q3mega.ops import dispatch


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_every_operator_has_a_reference_and_a_reason_for_the_rest(op: str) -> None:
    served = dispatch.backends(op)
    assert set(served) == set(dispatch.NAMES)
    assert served["reference"] in ("ok", "default")
    (best,) = (name for name, state in served.items() if state == "default")
    x = torch.zeros(1, 1, 128, device="cuda" if torch.cuda.is_available() else "cpu")
    assert dispatch.resolve(op, None, x) is dispatch.resolve(op, best, x)
    for name, reason in served.items():
        if reason not in ("ok", "default"):
            with pytest.raises(RuntimeError, match=f"{name}.*{op}.*{reason}"):
                dispatch.resolve(op, name, x)
    with pytest.raises(RuntimeError, match="choose one of"):
        dispatch.resolve(op, "abacus", torch.zeros(1))


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 128)
    monkeypatch.setenv("Q3MEGA_BACKEND", "reference")
    for op in dispatch.OPERATORS:
        assert dispatch.resolve(op, None, x) is dispatch.resolve(op, "reference", x)


def test_a_forced_reference_is_the_definition() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    targets = torch.randint(9, (5,))
    logprob, _ = ops.linear_logprob(hidden, weight, targets, backend="reference")
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(logprob, expected)
