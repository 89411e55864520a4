"""A real HTTP server with vLLM's or SGLang's token-level protocol, in front of an engine of ours.

Tokens, log-probabilities, weights and their checksums are real; `fault` breaks what it is told to.
`python token_server.py KIND SEED [PACE]` is one in a process of its own, whose weights may be
broadcast.
"""

import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from q3mega import device  # noqa: F401

# isort: split
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from q3mega.engine import Engine
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import each_sequence, token_logprobs
from q3mega.rollout.weight_sync.vllm_worker import Receiver

ONE_AT_A_TIME = threading.Lock()  # megatron's state is the process's


class TokenServer:
    """fault(path, body, number) -> None, or "slow", "500", "400", "truncated", "aborted", "mixed",
    "kill", "die" (the process, with SIGKILL). tempered: log-probabilities at the sampling
    temperature. hold: seconds before an answer; pace: and for each of its tokens. routes: as with
    --enable-return-routed-experts."""

    POSTS: tuple[str, ...]  # the first one samples
    PROMPT: str
    FAILED: int  # its status for what fails inside

    def __init__(
        self,
        engine: Engine,
        fault: Callable | None,
        tempered: bool,
        hold: float,
        pace: float,
        routes: bool,
    ) -> None:
        self.engine, self.fault, self.tempered = engine, fault, tempered
        self.hold, self.pace, self.routes = hold, pace, routes
        self.version, self.paused, self.dead = "default", False, False
        self.tokenizer = None  # with one it answers /tokenize
        self.asked: list[dict] = []  # bodies of generate
        self.paths: Counter = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.under_way: dict[str, threading.Event] = {}  # set: abort
        self.session: dict[str, torch.Tensor] | None = None  # what an open update received
        self.url = ""

    def gets(self) -> dict[str, dict]:
        raise NotImplementedError

    def post(self, path: str, body: dict) -> dict:
        raise NotImplementedError

    def spoil(self, answer: dict, fault: str) -> None:
        raise NotImplementedError

    def counted(self, body: dict, answer: Callable[[dict], dict]) -> dict:
        with self.lock:
            self.asked.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.hold)  # so that several are under way at once
        try:
            return answer(body)
        finally:
            with self.lock:
                self.at_once -= 1

    def sample(
        self, name: str, prompt: list[int], params: SamplingParams, stops: list[int]
    ) -> tuple[list[int], list[float], str, str, torch.Tensor | None]:
        """(tokens, log-probabilities, finish_reason, version, routes)"""
        assert not self.paused
        eos, eod = stops or (-1, -1)
        tokenizer = SimpleNamespace(
            vocab_size=self.engine.valid_vocab, eos=eos, eod=eod, think_open=-1, think_close=-1,
            encode=lambda text: [],
        )  # fmt: skip
        aborted = self.under_way.setdefault(name, threading.Event())
        with ONE_AT_A_TIME:
            version = self.version
            ((found,),) = InProcessSampler(self.engine, tokenizer).generate([prompt], params)
            logprobs, finish = found.logprobs, found.finish_reason
            if not self.tempered:
                (logprobs,) = token_logprobs(self.engine, [(prompt, found.tokens)])
        end = len(found.tokens)
        for i in range(1, end + 1) if self.pace else ():
            if aborted.wait(self.pace) and i < end:
                end, finish = i, "abort"
                break
        self.under_way.pop(name, None)  # two ranks may have given one name
        routes = None if found.routes is None else found.routes[: len(prompt) + end - 1]
        return found.tokens[:end], logprobs[:end], finish, version, routes

    def best(self, prompt: list[int], heat: float) -> tuple[int, float]:
        """The likeliest next token and its log-probability."""
        with ONE_AT_A_TIME:
            (logits,) = each_sequence(self.engine, [prompt], lambda head, _: [head.logits()[-1]])
        best = (logits / (heat if self.tempered else 1.0)).log_softmax(-1).max(-1)
        return int(best.indices), float(best.values)

    def abort(self, is_meant: Callable[[str], bool]) -> None:
        for name, event in list(self.under_way.items()):
            if is_meant(name):
                event.set()

    def load(self, folder: str) -> None:
        with ONE_AT_A_TIME:
            self.engine.load_hf(folder)

    def end_session(self) -> None:
        assert self.session is not None
        received, self.session = self.session, None
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save_hf(folder, {})
            held = Path(folder) / "model.safetensors"
            save_file(load_file(held) | received, held, metadata={"format": "pt"})
            self.load(folder)

    def checksums(self) -> dict[str, str]:
        found = {}
        with tempfile.TemporaryDirectory() as folder, ONE_AT_A_TIME:
            self.engine.save_hf(folder, {})
            for file in Path(folder).glob("*.safetensors"):
                with safe_open(file, "np") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        found[name] = hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest()
        return found


class Worker(Receiver):
    """The only worker of a vLLM, with the extension that takes broadcasts: all of it but what it
    asks of vLLM's layers."""

    rank, device = 0, torch.device("cpu")
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0, world_size=1)
    )

    def __init__(self, server: TokenServer) -> None:
        self.server = server
        model = SimpleNamespace(load_weights=lambda pairs: server.session.update(pairs))
        self.model_runner = SimpleNamespace(get_model=lambda: model)

    def reload_weights(self, weights_path: str) -> None:
        self.server.load(weights_path)

    def open_weights(self) -> None:
        self.receiving, self.server.session = True, {}

    def close_weights(self) -> None:
        self.receiving = False
        self.server.end_session()


class Vllm(TokenServer):
    POSTS = (
        "/inference/v1/generate", "/inference/v1/abort_requests", "/pause", "/resume",
        "/update_weight_version", "/collective_rpc", "/weight_checker",
    )  # fmt: skip
    PROMPT, FAILED = "token_ids", 500
    extended = True  # does it have our extension of its workers?

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.worker = Worker(self)

    def gets(self) -> dict[str, dict]:
        return {
            "/health": {},
            "/version": {"version": "0.0.test"},
            "/weight_info": {"weight_version": self.version},
            "/get_world_size": {"world_size": 1},
        }

    def post(self, path: str, body: dict) -> dict:
        match path:
            case "/inference/v1/generate":
                return self.counted(body, self.generate)
            case "/inference/v1/abort_requests":
                self.abort(lambda name: f"generate-tokens-{name}" in body["request_ids"])
            case "/pause" | "/resume":
                self.paused = path == "/pause"
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/collective_rpc":
                own = hasattr(Receiver, body["method"])
                assert self.extended if own else body["method"] == "reload_weights"
                assert self.paused or body["method"] == "leave_trainer"
                getattr(self.worker, body["method"])(**body["kwargs"])
            case "/weight_checker":
                placed = {f"dp0:pp0:pcp0:tp0:{n}": sha for n, sha in self.checksums().items()}
                return {"checksums": placed}
        return {}

    def generate(self, body: dict) -> dict:
        how, prompt = body["sampling_params"], body["token_ids"]
        heat = how["temperature"]
        params = SamplingParams(
            how["max_tokens"], heat, how.get("top_p", 1.0), how.get("top_k", 0), seed=how["seed"],
            routes=self.routes,
        )  # fmt: skip
        tokens, logprobs, finish, version, routes = self.sample(
            body["request_id"], prompt, params, how.get("stop_token_ids", [])
        )
        content = [{"token_id": t, "logprob": p} for t, p in zip(tokens, logprobs, strict=True)]
        if how["logprobs"]:
            best, logprob = self.best(prompt, heat)
            content[0]["top_logprobs"] = [{"token_id": best, "logprob": logprob}]
        choice = {
            "index": 0,
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": finish,
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        }
        if routes is not None:
            with io.BytesIO() as file:
                experts = routes.unflatten(1, (-1, self.engine.shape.topk)) - 1
                np.save(file, experts.numpy())
                choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        if k := how.get("prompt_logprobs"):
            return {"choices": [choice], "prompt_logprobs": self.best_of(prompt, k)}
        return {"choices": [choice]}

    def best_of(self, prompt: list[int], k: int) -> list[dict | None]:
        """The k best in each token's place and the token itself, as vLLM tells them."""
        with ONE_AT_A_TIME:
            (logits,) = each_sequence(self.engine, [prompt], lambda head, _: [head.logits()])
        rows = []
        for logprobs, token in zip(logits.log_softmax(-1), prompt[1:], strict=False):
            ids = [token, *logprobs.topk(k).indices.tolist()]
            rows.append({str(i): {"logprob": float(logprobs[i]), "rank": 1} for i in ids})
        return [None, *rows]

    def spoil(self, answer: dict, fault: str) -> None:
        (choice,) = answer["choices"]
        if fault == "aborted":
            choice["finish_reason"] = "abort"
        else:
            choice["logprobs"]["content"][0]["token_id"] += 1


class Sglang(TokenServer):
    """Its checksums are those of a CPU. It stops at `own` ids too, as SGLang does at its model's;
    seeds are looked at, as with deterministic inference."""

    POSTS = (
        "/generate", "/abort_request", "/pause_generation", "/continue_generation",
        "/flush_cache", "/update_weight_version", "/update_weights_from_disk", "/weights_checker",
        "/init_weights_update_group", "/destroy_weights_update_group", "/begin_weight_update",
        "/update_weights_from_distributed", "/end_weight_update",
    )  # fmt: skip
    PROMPT, FAILED = "input_ids", 400
    own: tuple[int, ...] = ()
    layout: dict = {"device": "cpu", "tp_size": 1, "pp_size": 1, "dp_size": 1}  # noqa: RUF012

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.groups: dict[str, dist.ProcessGroup] = {}

    def gets(self) -> dict[str, dict]:
        return {
            "/server_info": {"version": "0.0.sg", **self.layout},
            "/model_info": {"weight_version": self.version},
        }

    def post(self, path: str, body: dict) -> dict:
        match path:
            case "/generate":
                return self.counted(body, self.generate)
            case "/abort_request":
                self.abort(lambda name: name.startswith(body["rid"]))
            case "/pause_generation" | "/continue_generation":
                self.paused = path == "/pause_generation"
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/update_weights_from_disk":
                assert self.paused
                self.load(body["model_path"])
            case "/weights_checker":
                short = {name: sha[:16] for name, sha in self.checksums().items()}
                return {"success": True, "ranks": [{"checksums": short}]}
            case "/init_weights_update_group":
                self.join(**body)
            case "/destroy_weights_update_group":
                dist.destroy_process_group(self.groups.pop(body["group_name"]))
            case "/begin_weight_update":
                assert self.session is None and self.paused
                self.session = {}
            case "/update_weights_from_distributed":
                self.receive(**body)
            case "/end_weight_update":
                self.end_session()
        return {"success": True}

    def join(self, master_address, master_port, rank_offset, world_size, group_name, backend):
        """As SGLang does, by a group beside the default one: the prefixes of keys must match."""
        limit = timedelta(seconds=20)
        store = dist.TCPStore(master_address, master_port, world_size, False, limit)
        group, _ = _new_process_group_helper(
            world_size, rank_offset, [], dist.Backend(backend),
            dist.PrefixStore(group_name, store), group_name=group_name, timeout=limit,
        )  # fmt: skip
        _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        self.groups[group_name] = group

    def receive(self, names, dtypes, shapes, group_name, flush_cache):
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for dtype, shape in zip(dtypes, shapes, strict=True)
        ]
        group = self.groups[group_name]
        for work in [group.broadcast(tensor, 0) for tensor in tensors]:
            work.wait()
        self.session |= dict(zip(names, tensors, strict=True))

    def generate(self, body: dict) -> dict:
        how, prompt = body["sampling_params"], body["input_ids"]
        assert "ignore_eos" not in how and body["return_logprob"]
        heat = how["temperature"]
        params = SamplingParams(
            how["max_new_tokens"], heat, how.get("top_p", 1.0), max(0, how.get("top_k", 0)),
            seed=how["sampling_seed"],
        )  # fmt: skip
        stops = list(self.own) or how.get("stop_token_ids", [])
        tokens, logprobs, finish, version, _ = self.sample(body["rid"], prompt, params, stops)
        meta = {
            "output_token_logprobs": [[p, t, None] for t, p in zip(tokens, logprobs, strict=True)],
            "finish_reason": {"type": finish},
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        }
        if body["top_logprobs_num"]:
            best, logprob = self.best(prompt, heat)
            meta["output_top_logprobs"] = [[[logprob, best, None]]]
        return {"output_ids": tokens, "meta_info": meta}

    def spoil(self, answer: dict, fault: str) -> None:
        if fault == "aborted":
            answer["meta_info"]["finish_reason"]["type"] = "abort"
        else:
            answer["meta_info"]["output_token_logprobs"][0][1] += 1


KINDS = {"vllm": Vllm, "sglang": Sglang}


@contextmanager
def token_server(
    engine, fault=None, *, kind="vllm", tempered=True, hold=0.0, pace=0.0, routes=False
):
    state = KINDS[kind](engine, fault, tempered, hold, pace, routes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if state.dead:
                return self._hang_up()
            known = state.gets()
            self._send(200 if self.path in known else 404, known.get(self.path, {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/tokenize" and state.tokenizer:
                return self._send(200, {"tokens": state.tokenizer.encode(body["prompt"])})
            if state.dead:
                return self._hang_up()
            if self.path == "/test":  # of a server in a process of its own
                return self._send(200, state.test(**body))
            if self.path not in state.POSTS:
                return self._send(404, {"detail": "Not Found"})
            if self.path == state.POSTS[0] and state.PROMPT not in body:
                return self._send(400, {"error": f"{state.PROMPT} is missing"})
            path = f"{self.path} {body['method']}" if "method" in body else self.path
            state.paths[path] += 1
            fault = state.fault and state.fault(path, body, state.paths[path])
            if fault == "die":
                os._exit(9)
            if fault == "kill":
                state.dead = True
                threading.Thread(target=server.shutdown).start()
                server.socket.close()
                return self._hang_up()
            if fault == "slow":
                time.sleep(1.5)
            if fault in ("500", "400", "404"):
                return self._send(int(fault), {"error": f"told to answer {fault}"})
            try:
                answer = state.post(self.path, body)
            except Exception as error:
                said = {"success": False, "message": repr(error)}
                return self._send(state.FAILED, said)
            if fault in ("aborted", "mixed"):
                state.spoil(answer, fault)
            self._send(200, answer, cut=fault == "truncated")

        def _send(self, status, body, cut=False):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data) - 20 * cut))
            self.end_headers()
            self.wfile.write(data[: len(data) - 20 * cut])

        def _hang_up(self):
            self.close_connection = True
            self.connection.close()

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass  # the client that hung up is part of the test

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def main(kind: str, seed: int, pace: float = 0.0) -> None:
    """Serves until its standard input ends; the first line that it prints is its url."""
    torch.set_num_threads(1)
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=seed)
    with token_server(engine, kind=kind, pace=pace) as server:

        def test(faults=(), version=None) -> dict:
            """Break at each (path, number), counted from now; take a version; say how it is."""
            server.paths.clear()
            table = {(path, number): fault for path, number, fault in faults}
            server.fault = lambda path, body, number: table.get((path, number))
            server.version = version or server.version
            return {"version": server.version, "checksums": server.checksums()}

        server.test = test
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    from helpers.tiny_models import LAYOUT, SHAPES

    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
