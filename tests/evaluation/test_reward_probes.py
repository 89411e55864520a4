import pytest

from q3mega.evaluation.reward_probes import audit, probes
from q3mega.problems import FAMILIES, generate
from q3mega.rewards import TASK_REWARD, Verdict, reward


def test_no_probe_earns_anything():
    assert audit() == []


def test_the_audit_finds_a_reward_that_can_be_cheated(monkeypatch):
    @reward("keyword")
    def keyword(completion, row):
        return Verdict(float(row["answer"] in completion), "holds the answer")

    monkeypatch.setitem(TASK_REWARD, "boxed_digit", "keyword")
    found = {(family, probe) for family, probe, _ in audit()}
    assert ("boxed_digit", "answer inside the thinking") in found
    assert {family for family, _ in found} == {"boxed_digit"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_probes(family):
    (problem,) = generate(family, 1, seed=0)
    assert len({text for _, text in probes(vars(problem))}) >= 15
