"""The sampler over a real vLLM, in an environment of its own; docs/rollout_servers.md has
the command."""

import os
import socket
import subprocess
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import q3mega
from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPE
from helpers.weight_sync_ranks import cut_at

from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.evaluation.logprob_mismatch import measure
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.servers import vllm
from q3mega.rollout.servers.client import RolloutServerFailed
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync import broadcast
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler

PYTHON = os.environ.get("Q3MEGA_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="Q3MEGA_VLLM does not name the python of a vLLM"),
]
RECEIVER = "--worker-extension-cls q3mega.rollout.weight_sync.vllm_worker.Receiver"
SECONDS = 600  # until a server on a busy machine is up
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 61], [10], [11, 61]]


def made(seed: int, **how) -> Engine:
    shape = {"tied": False, "head_dim": 64} | how
    engine = Engine(SHAPE(**shape), LAYOUT(), seed=seed)
    for parameter in engine.chunks[0].parameters():  # away from uniform, and norms of its own
        parameter.data *= 2 if parameter.dim() > 1 else 1 + seed / 10
    return engine


@contextmanager
def vllm_server(
    engine: Engine, folder: Path, flags: str = ""
) -> Iterator[tuple[str, subprocess.Popen]]:
    """(url, process) of a server with the engine's weights."""
    engine.save_hf(folder / "hf", {"eos_token_id": 63, "pad_token_id": 62})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"""--model {folder / "hf"} --host 127.0.0.1 --port {port} --dtype float32
        --enforce-eager --skip-tokenizer-init --enable-scale-out --max-model-len 512
        --logprobs-mode processed_logprobs --max-num-seqs 32 {flags}"""
    more = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(Path(q3mega.__file__).parent.parent),
    }  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words.split()],
            env=os.environ | more, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(SECONDS):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def engine():
    return made(5)


@pytest.fixture(scope="module")
def started(engine, tmp_path_factory):
    with vllm_server(engine, tmp_path_factory.mktemp("vllm"), RECEIVER) as server:
        yield server


def drawn(groups):
    return [(c.tokens, c.mask, c.finish_reason) for group in groups for c in group]


def test_tokens_budgets_and_log_probabilities_are_the_trainers(engine, started):
    sampler = ServerSampler([started[0]], TOKENIZER)
    assert sampler.server_versions[started[0]]
    own = InProcessSampler(engine, TOKENIZER)
    for budget in (None, 4, 12, 40):
        params = SamplingParams(12, temperature=0, thinking_budget=budget)
        assert drawn(sampler.generate(PROMPTS, params)) == drawn(own.generate(PROMPTS, params))
    params = SamplingParams(30, n=8, seed=3, thinking_budget=8)
    found = sampler.generate(PROMPTS, params)
    assert drawn(found) == drawn(sampler.generate(PROMPTS, params))
    assert {c.finish_reason for group in found for c in group} == {"stop", "length"}
    gap = measure(engine, sampler, PROMPTS, params)
    print(gap)
    assert gap.mean <= 1e-3 and gap.flipped == 0
    sampler.generate(PROMPTS, SamplingParams(4, 0.6))  # the server's mode is the one that we need


def test_a_batch_is_interrupted_and_gone_on_with(started):
    sampler = ServerSampler([started[0]], TOKENIZER)
    params = SamplingParams(300, temperature=0, n=4)
    whole = sampler.generate(PROMPTS, params)
    begun = sampler.resume(PROMPTS, None, params, seconds=0.5)
    cut = [c for group in begun for c in group if c.finish_reason == "abort"]
    print([len(c.tokens) for c in cut])
    assert any(c.tokens for c in cut)
    assert drawn(sampler.resume(PROMPTS, begun, params)) == drawn(whole)


def changed(trainer: Engine) -> None:
    for parameter in trainer.chunks[0].parameters():
        parameter.data *= 1.2
    trainer.weight_version += 1


@pytest.mark.parametrize("way", ["folder", "broadcast"])
def test_it_samples_from_weights_that_change(started, tmp_path, way):
    trainer = made({"folder": 6, "broadcast": 7}[way])
    servers = ServerSampler([started[0]], TOKENIZER)
    params = SamplingParams(20, n=8, seed=3)
    assert measure(trainer, servers, PROMPTS, params).mean > 0.01
    sampler = WeightSyncedSampler(trainer, servers, tmp_path if way == "folder" else None)
    for _ in range(2):
        gap = measure(trainer, sampler, PROMPTS, params)
        print(gap)
        assert gap.mean <= 1e-3 and gap.flipped == 0
        changed(trainer)


def test_a_broadcast_that_was_cut_is_made_again(started, monkeypatch):
    """By the same trainer, and by one that comes after it; its layers hold parts of old ones."""
    monkeypatch.setattr(broadcast, "BUCKET_BYTES", 1)
    params = SamplingParams(20, n=8, seed=3)
    trainer = made(8)
    samplers = [
        WeightSyncedSampler(trainer, ServerSampler([started[0]], TOKENIZER), None) for _ in range(2)
    ]
    for sampler in (samplers[0], samplers[0], samplers[1]):
        changed(trainer)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Engine, "tensors", cut_at(6))
            samplers[0].generate(PROMPTS, params)
        gap = measure(trainer, sampler, PROMPTS, params)
        print(gap)
        assert gap.mean <= 1e-3 and gap.flipped == 0


@pytest.mark.parametrize("shape", [{"experts": 4, "topk": 2, "moe_ffn": 32}, {"tied": True}])
def test_other_shapes_are_updated(tmp_path, shape):
    """A mixture, router and experts included, and a model whose lm_head is its embedding. A vLLM on
    a CPU loads neither anew from a folder, and tells no routes."""
    trainer = made(5, **shape)
    with vllm_server(trainer, tmp_path, RECEIVER) as (url, _):
        servers = ServerSampler([url], TOKENIZER)
        params = SamplingParams(20, n=8, seed=3)
        sampler = WeightSyncedSampler(trainer, servers, None)
        for each in (servers, sampler, sampler):
            gap = measure(trainer, each, PROMPTS, params)
            print(gap)
            assert gap.mean <= 1e-3 and gap.flipped == 0
            changed(trainer)
        with pytest.raises(UserError, match="--enable-return-routed-experts"):
            servers.generate(PROMPTS, replace(params, routes=True))


def test_routes_are_read_as_a_vllm_writes_them():
    """Its own encoder, on (fed tokens, layers, topk) experts."""
    write = """
        import numpy, sys
        from vllm.entrypoints.scale_out.token_in_token_out.serving import numpy2base64
        print(numpy2base64(numpy.arange(24, dtype=numpy.uint8).reshape(4, 3, 2) % 7))
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(write)], env=env, capture_output=True, text=True, check=True
    )
    choice = vllm.Choice.model_construct(token_ids=[1, 2], routed_experts=done.stdout.split()[-1])
    routes = vllm.routes_of(choice, prompt=3)
    assert routes.tolist() == (torch.arange(24).reshape(4, 6) % 7 + 1).tolist()


def test_a_server_that_is_killed_is_an_error_that_names_it(started):
    url, process = started
    sampler = ServerSampler([url], TOKENIZER, retries=1)
    timer = threading.Timer(0.5, lambda: os.killpg(process.pid, 9))
    timer.start()
    with pytest.raises(RolloutServerFailed, match=url):
        for seed in range(10_000):
            sampler.generate(PROMPTS, SamplingParams(400, n=8, seed=seed))
    timer.join()
