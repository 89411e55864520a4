"""Weights by broadcast: to servers in processes of their own, which join the trainer's group."""

import json
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from helpers.token_server import token_server
from helpers.weight_sync_ranks import cut_at
from safetensors.torch import load_file

from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.servers.client import LOADING_VERSION, RolloutServerFailed
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync import broadcast
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 61], [10], [11, 61]]
GREEDY = SamplingParams(6, temperature=0)
SERVER = Path(__file__).parents[2] / "helpers" / "token_server.py"


class Process:
    """A server of ours, and what can be done to it."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.popen = subprocess.Popen(
            [sys.executable, str(SERVER), kind, str(seed)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def url(self) -> str:
        self.at = self.popen.stdout.readline().strip()
        return self.at

    def test(self, **body) -> dict:
        request = urllib.request.Request(f"{self.at}/test", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def processes(request):
    found = [Process(request.param, 6), Process(request.param, 7)]
    try:
        for process in found:
            assert process.url()
        yield found
    finally:
        for process in found:
            process.popen.kill()
            process.popen.wait()


@pytest.fixture
def trainer():
    return Engine(SHAPES["dense"], LAYOUT(), seed=5)


def synced(trainer, processes, **settings):
    urls, kind = [p.at for p in processes], processes[0].kind
    servers = ServerSampler(urls, TOKENIZER, kind=kind, **settings)
    return WeightSyncedSampler(trainer, servers, None)


def change(trainer):
    for parameter in trainer.chunks[0].parameters():
        parameter.data *= 1.1
    trainer.weight_version += 1


def drawn(groups):
    return [c.tokens for group in groups for c in group]


@pytest.mark.slow
def test_every_tensor_arrives(trainer, processes, tmp_path, monkeypatch, caplog):
    """One by one, and all in one; the group stays."""
    sampler = synced(trainer, processes)
    names = set()
    for size in (1, 1 << 30):
        monkeypatch.setattr(broadcast, "BUCKET_BYTES", size)
        with caplog.at_level("INFO"):
            found = sampler.generate(PROMPTS, GREEDY)
        assert (
            f"weights-{sampler.name}-{trainer.weight_version}: " in caplog.text
        )  # with its seconds
        assert drawn(found) == drawn(InProcessSampler(trainer, TOKENIZER).generate(PROMPTS, GREEDY))
        (version,) = {v for group in found for c in group for v, _ in c.weight_versions}
        trainer.save_hf(tmp_path, {})
        ours = {
            n: broadcast.digests(t) for n, t in load_file(tmp_path / "model.safetensors").items()
        }
        for process in processes:
            said = process.test()
            assert said["version"] == version
            assert said["checksums"].keys() == ours.keys()
            assert all(sha in ours[name] for name, sha in said["checksums"].items())
        names.add(sampler.broadcast.name)
        change(trainer)
    assert len(names) == 1


@pytest.fixture
def one_by_one(monkeypatch):
    monkeypatch.setattr(broadcast, "BUCKET_BYTES", 1)


# What each kind is asked at the beginning, for each bucket, and at the end; the last with how many
# times an update asks for it: an SGLang is asked to end at first, too.
STEPS = {
    "sglang": ("/pause_generation", "/update_weights_from_distributed", "/end_weight_update", 2),
    "vllm": ("/pause", "/collective_rpc receive_weights", "/collective_rpc close_weights", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["begin", "receive", "close"])
def test_a_server_that_fails_is_left_out_until_the_next_update(
    trainer, processes, one_by_one, step
):
    sampler = synced(trainer, processes)
    begin, receive, close, closes = STEPS[processes[0].kind]
    fault = {"begin": (begin, 1), "receive": (receive, 3), "close": (close, closes)}[step]
    processes[0].test(faults=[(*fault, "500")])
    groups = sampler.generate(PROMPTS, GREEDY)
    (version,) = {v for group in groups for c in group for v, _ in c.weight_versions}
    assert [s.alive for s in sampler.servers.servers] == [False, True]
    assert processes[0].test()["version"] != version == processes[1].test()["version"]
    found = sampler.generate(PROMPTS, GREEDY)  # which looks again
    assert drawn(found) == drawn(InProcessSampler(trainer, TOKENIZER).generate(PROMPTS, GREEDY))
    assert [p.test()["version"] for p in processes] == [version] * 2


def test_a_transfer_that_is_cut_is_made_again(trainer, processes, one_by_one, monkeypatch):
    sampler = synced(trainer, processes)
    monkeypatch.setattr(Engine, "tensors", cut_at(5))
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    assert [p.test()["version"] for p in processes] == [LOADING_VERSION] * 2
    with pytest.raises(RolloutServerFailed, match="is up with weights before"):
        sampler.servers.version = "before"
        sampler.servers.generate(PROMPTS, GREEDY)
    again = synced(trainer, processes)  # as a run that was killed and goes on
    found = again.generate(PROMPTS, GREEDY)
    assert drawn(found) == drawn(InProcessSampler(trainer, TOKENIZER).generate(PROMPTS, GREEDY))


@pytest.mark.dist
def test_rank_0_sends_what_all_ranks_hold(trainer, processes, torchrun, tmp_path):
    trainer.save_hf(tmp_path, {})
    groups = InProcessSampler(trainer, TOKENIZER).generate(PROMPTS, replace(GREEDY, max_tokens=12))
    layouts: list[dict] = [{"tensor": 2}, {"pipeline": 2}, {}]
    how = [str(tmp_path), processes[0].kind, processes[0].at, None, PROMPTS]
    cases = [({"processes": 2, **way}, *how) for way in layouts]
    results = torchrun("weight_sync_ranks.py", 2, json.dumps(cases))
    for got in results:
        assert all(tokens == drawn(groups)[i] for i, tokens, _ in got)
        assert len({version for *_, runs in got for version, _ in runs}) == 1


@pytest.mark.slow
def test_one_that_dies_in_a_transfer_does_not_hold_up_the_others(trainer, processes, one_by_one):
    sampler = synced(trainer, processes)
    sampler.generate(PROMPTS, GREEDY)
    change(trainer)
    processes[1].test(faults=[(STEPS[processes[1].kind][1], 4, "die")])
    found = sampler.generate(PROMPTS, GREEDY)
    assert drawn(found) == drawn(InProcessSampler(trainer, TOKENIZER).generate(PROMPTS, GREEDY))
    assert [s.alive for s in sampler.servers.servers] == [True, False]
    processes[0].test(faults=[("/update_weight_version", n, "500") for n in range(1, 9)])
    change(trainer)
    with pytest.raises(RolloutServerFailed, match="no server is left"):
        sampler.generate(PROMPTS, GREEDY)


def test_servers_that_cannot_join_are_refused(trainer):
    with token_server(trainer, kind="vllm") as server:
        server.extended = False
        with pytest.raises(
            UserError, match=r"--worker-extension-cls q3mega\.rollout\.weight_sync\.vllm_worker"
        ):
            broadcast.Broadcast(ServerSampler([server.url], TOKENIZER))
    with token_server(trainer, kind="sglang") as server:
        server.layout = server.layout | {"pp_size": 2}
        with pytest.raises(UserError, match=r"pp_size=2.*a server for each replica"):
            broadcast.Broadcast(ServerSampler([server.url], TOKENIZER, kind="sglang"))
