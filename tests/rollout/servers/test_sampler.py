"""The sampler over servers: a real HTTP server answers from an engine of ours, and breaks down.

The same against a vLLM in an environment of its own: docs/rollout_servers.md has the command.
"""

import base64
import io
import json
import math
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from helpers.token_server import ONE_AT_A_TIME, token_server

from q3mega.cli import main
from q3mega.data import package_text
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.evaluation.logprob_mismatch import measure
from q3mega.model.routing import differing
from q3mega.rollout import SamplingParams
from q3mega.rollout.base import cut_at_unknown
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import token_logprobs
from q3mega.rollout.servers import client, sampler, sglang, vllm
from q3mega.rollout.servers.client import RetryableError, RolloutServerFailed
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler, norms

# ids of a make-believe tokenizer over 64 tokens; the stop text closes the think block
LOAD = {"vllm": "/collective_rpc reload_weights", "sglang": "/update_weights_from_disk"}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 61], [10], [11, 61]]


def made(seed: int, kind: str = "dense") -> Engine:
    engine = Engine(SHAPES[kind], LAYOUT(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.chunks[0].parameters():  # away from uniform, and norms of its own
        parameter.data *= 2 if parameter.dim() > 1 else 1
        parameter.data += 0.1 * torch.rand(parameter.shape, generator=generator)
    return engine


@pytest.fixture(scope="module")
def engine():
    return made(5)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sampler, "FIRST_BACK_OFF_S", 0.01)


@pytest.fixture(params=["vllm", "sglang"])
def kind(request):
    return request.param


@pytest.fixture
def serve(engine, kind):
    """serve(n or a fault for each) -> (sampler, servers)"""
    with ExitStack() as stack:

        def start(*faults, engines=None, tempered=True, hold=0.0, pace=0.0, **settings):
            engines = engines or [engine] * len(faults)
            how = {"kind": kind, "tempered": tempered, "hold": hold, "pace": pace}
            servers = [
                stack.enter_context(token_server(e, f, **how))
                for e, f in zip(engines, faults, strict=True)
            ]
            urls = [s.url for s in servers]
            return ServerSampler(urls, TOKENIZER, kind=kind, **settings), servers

        yield start


def flat(groups):
    return [(c.tokens, c.mask, c.finish_reason) for group in groups for c in group]


def drawn(groups):
    return [c.tokens for group in groups for c in group]


def test_greedy_answers_and_budgets_are_those_in_process(engine, serve):
    sampler, (first, second) = serve(None, None)
    own = InProcessSampler(engine, TOKENIZER)
    for budget in (None, 1, 4, 12, 40):
        params = SamplingParams(12, temperature=0, thinking_budget=budget)
        theirs, ours = sampler.generate(PROMPTS, params), own.generate(PROMPTS, params)
        assert flat(theirs) == flat(ours)
        for (a,), (b,) in zip(theirs, ours, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        if budget == 4:
            assert any(0 in c.mask for (c,) in ours)
    assert first.asked and second.asked
    said = "0.0.test" if sampler.kind == "vllm" else "0.0.sg"
    assert sampler.server_versions == {first.url: said, second.url: said}


@pytest.mark.slow
@pytest.mark.parametrize("heat", [1.0, 0.6])
def test_log_probabilities_are_the_trainers(engine, serve, heat):
    sampler, _ = serve(None)
    params = SamplingParams(10, heat, n=3, seed=7)
    found = sampler.generate(PROMPTS, params)
    cooled = made(5)  # at temperature T a model is the one with an lm_head of 1 / T
    cooled.chunks[0].output_layer.weight.data /= heat
    pairs = [(p, c.tokens) for p, group in zip(PROMPTS, found, strict=True) for c in group]
    trainer = token_logprobs(cooled, pairs)
    for own, completion in zip(trainer, [c for group in found for c in group], strict=True):
        assert completion.logprobs == pytest.approx(own, abs=1e-4)
    assert drawn(found) == drawn(sampler.generate(PROMPTS, params))
    assert drawn(found) != drawn(sampler.generate(PROMPTS, replace(params, seed=8)))
    assert len(set(map(tuple, drawn(found[:1])))) > 1  # the tries at one prompt differ


def test_log_probabilities_that_the_server_cannot_tell(serve, kind):
    raw, _ = serve(None, tempered=False)
    remedy = {"vllm": "--logprobs-mode processed_logprobs", "sglang": "RETURN_ORIGINAL_LOGPROB"}
    with pytest.raises(UserError, match=remedy[kind]):
        raw.generate(PROMPTS, SamplingParams(4, 0.6))
    (group, *_) = raw.generate(PROMPTS, SamplingParams(4, 0.6, top_p=0.9, thinking_budget=2))
    assert all(
        math.isnan(p) == (m == 1) for p, m in zip(group[0].logprobs, group[0].mask, strict=True)
    )
    assert raw.generate([[1]], SamplingParams(4))[0][0].logprobs[0] < 0


def test_load_is_bounded_and_spread(serve):
    sampler, servers = serve(None, None, hold=0.02, concurrency=3)
    found = sampler.generate(PROMPTS, SamplingParams(2, n=6))
    assert sum(map(len, found)) == 24
    assert all(1 < s.most_at_once <= 3 for s in servers)
    assert all(len(s.asked) >= 6 for s in servers)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow", "500", "truncated", "aborted", "mixed", "kill"])
def test_a_batch_outlives_a_fault(serve, fault):
    """Whatever breaks, the same sequences come back: the id and the seed go with the request."""
    params = SamplingParams(6, n=3, seed=3, thinking_budget=3)
    whole = drawn(serve(None)[0].generate(PROMPTS, params))
    timeout = 1.0 if fault == "slow" else 60.0
    sampler, servers = serve(
        lambda path, body, number: fault if number == 2 else None, None, timeout=timeout
    )
    assert drawn(sampler.generate(PROMPTS, params)) == whole
    asked = [
        (b.get("request_id") or b["rid"].partition(".")[0],
         b["sampling_params"].get("seed") or b["sampling_params"]["sampling_seed"])
        for s in servers for b in s.asked
    ]  # fmt: skip
    assert len({i for i, _ in asked}) == len(set(asked))
    assert sampler.servers[0].alive == (fault != "kill")
    assert drawn(sampler.generate(PROMPTS, params)) == whole  # and the next batch does too


def test_what_cannot_be_bettered_is_an_error(serve):
    params = SamplingParams(4)
    sampler, (server,) = serve(lambda path, body, number: "500", retries=2)
    with pytest.raises(RolloutServerFailed, match=r"failed 3 times.*told to answer 500"):
        sampler.generate([[1]], params)
    assert server.paths[server.POSTS[0]] == 3
    sampler, (server,) = serve(lambda path, body, number: "400")
    with pytest.raises(UserError, match=r"400.*shorter prompt"):
        sampler.generate([[1]], params)
    assert server.paths[server.POSTS[0]] == 1
    sampler, _ = serve(*[lambda path, body, number: "kill"] * 2)
    with pytest.raises(RolloutServerFailed, match="no server is left"):
        sampler.generate(PROMPTS, params)
    with pytest.raises(RolloutServerFailed, match=r"no server of .* is up"):
        sampler.generate(PROMPTS, params)


def test_a_server_that_is_none_is_refused_at_once(serve, kind, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"(?i){url} is no {kind} server that is up"):
            ServerSampler([url], TOKENIZER, kind=kind)
    _, (server,) = serve(None)
    with pytest.raises(UserError, match="key_env=NO_SUCH_KEY"):
        ServerSampler([server.url], TOKENIZER, key_env="NO_SUCH_KEY")
    other = "sglang" if kind == "vllm" else "vllm"
    with pytest.raises(UserError, match=f"(?i)is no {other} server"):
        ServerSampler([server.url], TOKENIZER, kind=other)
    if kind == "sglang":
        return
    monkeypatch.setattr(vllm, "_GENERATE", "/elsewhere")
    with pytest.raises(UserError, match="--enable-scale-out"):
        ServerSampler([server.url], TOKENIZER)


def test_servers_of_two_versions_are_not_mixed(serve, engine):
    sampler, (first, second) = serve(None, None)
    second.version = "another"
    with pytest.raises(RolloutServerFailed, match="must hold the same weights"):
        sampler.generate(PROMPTS, SamplingParams(4))
    sampler.version = "another"
    (group, *_) = sampler.generate(PROMPTS, SamplingParams(4))
    assert group[0].weight_versions == [("another", len(group[0].tokens))]
    first.asked.clear()
    sampler.generate(PROMPTS, SamplingParams(4))
    assert not first.asked


def change_while_sampling(servers):
    def fault(path, body, number):
        if path == servers[0].POSTS[0] and number == 2:
            servers[0].version = "restarted"

    return fault


def test_weights_that_change_in_a_batch_are_not_sampled_from(serve):
    box = []
    sampler, servers = serve(change_while_sampling(box), None)
    box += servers
    sampler.version = "default"
    found = sampler.generate(PROMPTS, SamplingParams(4, n=3))
    assert {v for group in found for c in group for v, _ in c.weight_versions} == {"default"}
    assert not sampler.servers[0].alive


ANSWERS = {}
ANSWERS["vllm"] = {
    "choices": [
        {
            "token_ids": [4, 7],
            "logprobs": {"content": [{"token_id": t, "logprob": -0.5} for t in (4, 7)]},
            "finish_reason": "stop",
            "weight_versions": [{"version": "v", "start": 0, "end": 2}],
        }
    ]
}
ANSWERS["sglang"] = {
    "output_ids": [4, 7],
    "meta_info": {
        "output_token_logprobs": [[-0.5, 4, None], [-0.5, 7, None]],
        "finish_reason": {"type": "stop", "matched": 7},
        "weight_versions": [{"version": "v", "start": 0, "end": 2}],
    },
}
PARSED = {"vllm": vllm.parsed, "sglang": sglang.parsed}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inner:
        yield from places(part, (*path, key))


@given(st.sampled_from([(k, p) for k, a in ANSWERS.items() for p in places(a) if p]), JSON)
def test_an_answer_with_anything_in_it_is_whole_or_unusable(place, junk):
    kind, (*parents, last) = place
    answer = json.loads(json.dumps(ANSWERS[kind]))
    part = answer
    for key in parents:
        part = part[key]
    part[last] = junk
    try:
        found = PARSED[kind](json.dumps(answer).encode())
    except RetryableError:
        return
    if kind == "vllm":
        tokens = found.token_ids
        pairs = [(t.token_id, t.logprob) for t in found.logprobs.content]
        end, versions = found.finish_reason, found.weight_versions
    else:
        meta, tokens = found.meta_info, found.output_ids
        pairs = [(token, logprob) for logprob, token, _ in meta.output_token_logprobs]
        end, versions = meta.finish_reason.type, meta.weight_versions
    assert tokens and [token for token, _ in pairs] == tokens
    assert all(-1e30 < logprob <= 1e-3 for _, logprob in pairs)
    assert versions and end in ("stop", "length", "abort")


@given(st.binary(max_size=80), st.integers(0, 150), st.sampled_from(list(ANSWERS)))
def test_bytes_that_are_no_answer_are_unusable(junk, end, kind):
    for body in (junk, json.dumps(ANSWERS[kind]).encode()[:end]):
        with pytest.raises(RetryableError):
            PARSED[kind](body)
    PARSED[kind](json.dumps(ANSWERS[kind]).encode())


def test_a_stop_at_ids_of_the_servers_own_is_an_error(engine):
    with token_server(engine, kind="sglang") as server:
        sampler = ServerSampler([server.url], TOKENIZER, kind="sglang", concurrency=1)
        server.own = (20, 21)
        with pytest.raises(UserError, match=r"none of \[62, 63\]: start it with --skip-tokenizer"):
            sampler.generate(PROMPTS, SamplingParams(40, n=4))


# -- interrupted -------------------------------------------------------------------------------


def test_a_batch_is_interrupted_and_gone_on_with(serve, engine):
    """Greedy, so the parts together are the whole; each token knows its weights."""
    sampler, servers = serve(None, None, pace=0.02, concurrency=3)
    for budget in (None, 4, 12):
        params = SamplingParams(12, temperature=0, thinking_budget=budget, n=2)
        with ONE_AT_A_TIME:
            whole = InProcessSampler(engine, TOKENIZER).generate(PROMPTS, params)
        begun = sampler.resume(PROMPTS, None, params, seconds=0.1)
        cut = [c for group in begun for c in group if c.finish_reason == "abort"]
        assert cut and all(len(c.tokens) == len(c.logprobs) == len(c.mask) for c in cut)
        kept = flat(begun)
        for server in servers:
            server.version = f"after {budget}"
        done = sampler.resume(PROMPTS, begun, params)
        assert flat(begun) == kept  # what was given is not changed
        assert flat(done) == flat(whole)
        for a, b in zip([c for g in begun for c in g], [c for g in done for c in g], strict=True):
            assert b.tokens[: len(a.tokens)] == a.tokens
            assert b.logprobs[: len(a.tokens)] == a.logprobs
            if a.finish_reason != "abort":
                assert a == b
            elif a.tokens:
                assert b.weight_versions == [
                    *a.weight_versions,
                    (f"after {budget}", sum(b.mask) - sum(a.mask)),
                ]
            else:
                assert b.weight_versions == [(f"after {budget}", sum(b.mask))]


def test_an_interrupt_comes_from_any_thread(serve):
    sampler, servers = serve(None, None, pace=0.05, concurrency=2)

    def later():
        while not any(s.under_way for s in servers):
            time.sleep(0.05)
        sampler.interrupt()

    thread = threading.Thread(target=later)
    thread.start()
    begun = sampler.generate(PROMPTS, SamplingParams(200, n=4, temperature=0))
    thread.join()
    assert all(s.at_once == 0 for s in servers)
    cut = [c for group in begun for c in group if c.finish_reason == "abort"]
    assert any(c.tokens for c in cut) and any(not c.tokens for c in cut)  # under way, and waiting
    sampler.interrupt()  # there is nothing to interrupt
    assert len(sampler.generate([[1]], SamplingParams(2))[0][0].tokens) <= 2


def test_what_goes_on_draws_anew(serve):
    """The tokens after an interrupt are not those after the prompt again, under the same seed."""
    sampler, _ = serve(None)
    params, tries = SamplingParams(6, n=40, seed=1), []
    for group in sampler.generate([[9]], replace(params, max_tokens=3)):
        tries += [replace(c, finish_reason="abort") for c in group if c.finish_reason == "length"]
    (done,) = sampler.resume([[9]], [tries], replace(params, n=len(tries)))
    same = sum(c.tokens[3:6] == c.tokens[:3] for c in done)
    assert same < len(done) / 4


# -- routes ----------------------------------------------------------------------------------------


def test_routes_are_those_in_process_and_the_gap_compares_them():
    engine, params = made(5, "moe"), SamplingParams(8, temperature=0, routes=True)
    own = InProcessSampler(engine, TOKENIZER)
    with token_server(engine, routes=True) as server:
        sampler = ServerSampler([server.url], TOKENIZER)
        for budget in (None, 3, 8):  # one call, two, and a stop text that is never fed
            asked = replace(params, thinking_budget=budget)
            for (found,), (expected,), prompt in zip(
                sampler.generate(PROMPTS, asked), own.generate(PROMPTS, asked), PROMPTS, strict=True
            ):
                same = differing(found.routes, expected.routes, 2)
                assert found.tokens == expected.tokens and same[0] == 0
                assert len(found.routes) == len(prompt) + len(found.tokens) - 1
                fed = found.routes.any(1)
                assert fed.all() or budget == 8
        params = SamplingParams(8, n=2, seed=1, routes=True)
        assert measure(engine, sampler, PROMPTS, params).routes == 0
        assert measure(made(6, "moe"), sampler, PROMPTS, params).routes > 0.1
        assert measure(engine, sampler, PROMPTS, replace(params, routes=False)).routes is None
    with token_server(engine) as server, pytest.raises(UserError, match="return-routed-experts"):
        ServerSampler([server.url], TOKENIZER).generate(PROMPTS, params)


@pytest.mark.parametrize("array", [np.zeros((2, 2, 2), np.uint8), np.zeros((3, 4), np.uint8), None])
def test_routes_of_other_tokens_are_refused(array):
    """Of three fed tokens: too few, of another form, no array at all."""
    file = io.BytesIO(b"")
    if array is not None:
        np.save(file, array)
    choice = {
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "weight_versions": [{"version": "a", "end": 2}],
    }
    content = [{"token_id": t, "logprob": -1.0} for t in (1, 2)]
    encoded = base64.b64encode(file.getvalue()).decode()
    answer = choice | {"logprobs": {"content": content}, "routed_experts": encoded}
    parsed = vllm.parsed(json.dumps({"choices": [answer]}).encode())
    with pytest.raises(UserError, match="routed_experts of a server"):
        vllm.routes_of(parsed, 2)


# -- weights -----------------------------------------------------------------------------------


def test_the_servers_sample_from_the_engines_weights(serve, kind, tmp_path):
    trainer = made(7)
    servers, (one, two) = serve(None, None, engines=[made(5), made(6)])
    sampler = WeightSyncedSampler(trainer, servers, tmp_path)
    own, params = InProcessSampler(trainer, TOKENIZER), SamplingParams(10, temperature=0)
    versions = []
    for step in range(2):
        found = sampler.generate(PROMPTS, params)
        assert drawn(found) == drawn(own.generate(PROMPTS, params))
        (version,) = {v for group in found for c in group for v, _ in c.weight_versions}
        assert [path.name for path in tmp_path.iterdir()] == [version]
        versions.append(version)
        sampler.generate(PROMPTS, params)
        assert one.paths[LOAD[kind]] == step + 1  # once, not for every call
        for parameter in trainer.chunks[0].parameters():
            parameter.data *= 1.3
        trainer.weight_version += 1
    assert versions[0] != versions[1]
    sampler.generate(PROMPTS, params)
    two.version = "default"  # as after a restart
    sampler.generate(PROMPTS, params)
    assert (one.paths[LOAD[kind]], two.paths[LOAD[kind]]) == (3, 4)


def test_text_ends_before_an_id_that_no_token_has(serve, tmp_path):
    """A server samples from all rows of its lm_head; a loss would refuse those beyond the ids."""
    trainer = Engine(SHAPES["dense"], LAYOUT(), seed=7, ids=50)
    servers, _ = serve(None, engines=[made(5)])
    whole = [c for g in servers.generate(PROMPTS, SamplingParams(20, n=4, seed=1)) for c in g]
    cut = [cut_at_unknown(c, trainer.valid_vocab) for c in whole]
    assert 0 < sum(len(c.tokens) for c in cut) < sum(len(c.tokens) for c in whole)
    for before, after in zip(whole, cut, strict=True):
        end = len(after.tokens)
        assert after == before or (after.finish_reason == "length" and before.tokens[end] >= 50)
        assert after.tokens == before.tokens[:end] and after.logprobs == before.logprobs[:end]
        assert max(after.tokens, default=0) < 50
        assert sum(n for _, n in after.weight_versions) == sum(after.mask)
    groups = WeightSyncedSampler(trainer, servers, tmp_path).generate(
        PROMPTS, SamplingParams(20, n=4)
    )
    assert max(t for group in groups for c in group for t in c.tokens) < 50


def test_an_update_that_is_cut_is_made_again(serve, kind, engine, tmp_path):
    engine.save_hf(tmp_path, {})
    cut = {LOAD[kind]}

    def fault(path, body, number):
        return "500" if path in cut and number == 1 else None

    sampler, (server, _) = serve(fault, None, engines=[made(6), made(8)])
    sampler.load(tmp_path, "v1", norms(tmp_path))
    assert server.version == client.LOADING_VERSION and not sampler.servers[0].alive
    asked = len(server.asked)
    sampler.generate(PROMPTS, SamplingParams(4))
    assert len(server.asked) == asked
    sampler.load(tmp_path, "v1", norms(tmp_path))
    assert server.version == "v1" and not server.paused and sampler.servers[0].alive


def test_wrong_weights_are_seen(serve, kind, engine, tmp_path):
    engine.save_hf(tmp_path / "right", {})
    made(6).save_hf(tmp_path / "wrong", {})
    sampler, (server,) = serve(None, engines=[made(9)])
    with pytest.raises(RolloutServerFailed, match="read other weights than were written"):
        sampler.load(tmp_path / "wrong", "v1", norms(tmp_path / "right"))
    assert server.version == client.LOADING_VERSION and server.paused
    sampler, (server,) = serve(lambda path, body, number: "404" if "pause" in path else None)
    remedy = {"vllm": "VLLM_SERVER_DEV_MODE=1", "sglang": "is it an SGLang 0.5.23"}
    with pytest.raises(UserError, match=remedy[kind]):
        sampler.load(tmp_path / "right", "v1", norms(tmp_path / "right"))


# -- the gap -----------------------------------------------------------------------------------


def test_the_gap_of_equal_weights_is_rounding_and_of_others_is_not(serve, engine):
    params = SamplingParams(10, n=2, seed=1)
    sampler, _ = serve(None)
    same = measure(engine, sampler, PROMPTS, params)
    assert same.mean <= same.max < 1e-5 and abs(same.kl) < 1e-6 and same.flipped == 0
    others = measure(made(6), sampler, PROMPTS, params)
    assert others.tokens == same.tokens and others.max > others.mean > 0.1
    assert others.kl > 0.1 and others.flipped > 0.1


def test_the_command_fails_above_its_threshold(tmp_path, capsys):
    train_tokenizer(package_text.documents("year_2889"), 512, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    right = Engine(replace(SHAPES["tied"], vocab=512), LAYOUT(), seed=0)
    right.save_hf(tmp_path, {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eod})
    wrong = Engine(replace(SHAPES["tied"], vocab=512), LAYOUT(), seed=1)
    for engine, code in ((right, 0), (wrong, 1)):
        with token_server(engine) as server:
            words = ["--servers", server.url, "--problems", "3", "--max-tokens", "4"]
            assert main(["logprob-mismatch", str(tmp_path), *words, "--threshold", "1e-4"]) == code
        said = capsys.readouterr()
        assert "mean |delta log p|" in said.out
        assert ("above --threshold 0.0001" in said.err) == bool(code)
    assert (
        main(["logprob-mismatch", str(tmp_path), "--servers", server.url, "--problems", "0"]) == 2
    )
