"""Ranks that share a model, or its experts, stay together through episodes with tools."""

import json

import pytest


@pytest.mark.dist
def test_ranks_agree_on_what_tools_say_and_on_when_to_sample(torchrun):
    cases = [({"processes": 2, "tensor": 2}, [[1, 2]]), ({"processes": 2, "expert": 2}, [[1], [3]])]
    shared, apart = torchrun("episode_ranks.py", 2, json.dumps(cases))
    (asked, texts), (asked_too, texts_too) = shared
    assert (asked, texts) == (asked_too, texts_too) and asked == 3
    assert [t.count("<tool_response>\n0\n") for t in texts] == [1, 2]  # the first rank's tool spoke
    (asked, [short]), (asked_too, [long]) = apart
    assert asked == asked_too == 4  # the expert layers meet in every turn
    assert (short.count("\n0\n"), long.count("\n1\n")) == (1, 3)
