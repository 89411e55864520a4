"""The sampler over a real vLLM, in an environment of its own: docs/engines.md has the command."""

import os
import socket
import subprocess
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from q3mega import device  # noqa: F401

# isort: split
from tiny import LAYOUT, SHAPE

from q3mega.engine import Engine
from q3mega.rollout import SamplingParams
from q3mega.rollout.gap import measure
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.protocol import EngineFailed
from q3mega.rollout.servers import ServerSampler
from q3mega.rollout.synced import SyncedSampler

PYTHON = os.environ.get("Q3MEGA_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="Q3MEGA_VLLM does not name the python of a vLLM"),
]
SECONDS = 600  # until a server on a busy machine is up
TOKENIZER = SimpleNamespace(
    eos=63, eod=62, think_open=61, think_close=60, encode=lambda text: [50, 51, 60]
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 61], [10], [11, 61]]


def made(seed: int) -> Engine:
    engine = Engine(SHAPE(tied=False, head_dim=64), LAYOUT(), seed=seed)
    for parameter in engine.chunks[0].parameters():  # away from uniform, and norms of its own
        parameter.data *= 2 if parameter.dim() > 1 else 1 + seed / 10
    return engine


@pytest.fixture(scope="module")
def engine():
    return made(5)


@pytest.fixture(scope="module")
def started(engine, tmp_path_factory):
    """(url, process) of a server with the engine's weights."""
    folder = tmp_path_factory.mktemp("vllm")
    engine.save_hf(folder / "hf", {"eos_token_id": 63, "pad_token_id": 62})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"""--model {folder / "hf"} --host 127.0.0.1 --port {port} --dtype float32
        --enforce-eager --skip-tokenizer-init --enable-scale-out --max-model-len 512
        --logprobs-mode processed_logprobs --max-num-seqs 32"""
    more = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words.split()],
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more,
            stdout=log, stderr=log, start_new_session=True,
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


def drawn(groups):
    return [(c.tokens, c.mask, c.finish_reason) for group in groups for c in group]


def test_tokens_budgets_and_log_probabilities_are_the_trainers(engine, started):
    sampler = ServerSampler([started[0]], TOKENIZER)
    assert sampler.engines[started[0]]
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
    begun = sampler.proceed(PROMPTS, None, params, seconds=0.5)
    cut = [c for group in begun for c in group if c.finish_reason == "abort"]
    print([len(c.tokens) for c in cut])
    assert any(c.tokens for c in cut)
    assert drawn(sampler.proceed(PROMPTS, begun, params)) == drawn(whole)


def test_it_samples_from_weights_that_change(started, tmp_path):
    trainer = made(6)
    servers = ServerSampler([started[0]], TOKENIZER)
    params = SamplingParams(20, n=8, seed=3)
    assert measure(trainer, servers, PROMPTS, params).mean > 0.01
    sampler = SyncedSampler(trainer, servers, tmp_path)
    for _ in range(2):
        gap = measure(trainer, sampler, PROMPTS, params)
        print(gap)
        assert gap.mean <= 1e-3 and gap.flipped == 0
        for parameter in trainer.chunks[0].parameters():
            parameter.data *= 1.2
        trainer.changes += 1


def test_a_server_that_is_killed_is_an_error_that_names_it(started):
    url, process = started
    sampler = ServerSampler([url], TOKENIZER, retries=1)
    timer = threading.Timer(0.5, lambda: os.killpg(process.pid, 9))
    timer.start()
    with pytest.raises(EngineFailed, match=url):
        for seed in range(10_000):
            sampler.generate(PROMPTS, SamplingParams(400, n=8, seed=seed))
    timer.join()
