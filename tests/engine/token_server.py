"""A real HTTP server with vLLM's token-level protocol, in front of an engine of ours.

Tokens, log-probabilities, weights and their checksums are real; `fault` breaks what it is told to.
"""

import hashlib
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from safetensors import safe_open

from q3mega.engine import Engine
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import each_sequence, token_logprobs

POSTS = (
    "/inference/v1/generate", "/pause", "/resume", "/update_weight_version", "/collective_rpc",
    "/weight_checker",
)  # fmt: skip
ONE_AT_A_TIME = threading.Lock()  # megatron's state is the process's


class TokenServer:
    """fault(path, body, number) -> None, or "slow", "500", "400", "truncated", "aborted", "mixed",
    "kill". tempered: log-probabilities at the sampling temperature, as with processed_logprobs."""

    def __init__(self, engine: Engine, fault: Callable | None, tempered: bool, hold: float) -> None:
        self.engine, self.fault, self.tempered, self.hold = engine, fault, tempered, hold
        self.version, self.paused, self.dead = "default", False, False
        self.tokenizer = None  # with one it answers /tokenize
        self.asked: list[dict] = []  # bodies of generate
        self.paths: Counter = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def post(self, path: str, body: dict) -> dict:
        match path:
            case "/inference/v1/generate":
                with self.lock:
                    self.asked.append(body)
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                time.sleep(self.hold)  # so that several are under way at once
                try:
                    with ONE_AT_A_TIME:
                        return self.generate(body)
                finally:
                    with self.lock:
                        self.at_once -= 1
            case "/pause" | "/resume":
                self.paused = path == "/pause"
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/collective_rpc":
                assert body["method"] == "reload_weights" and self.paused
                with ONE_AT_A_TIME:
                    self.engine.load_hf(body["kwargs"]["weights_path"])
            case "/weight_checker":
                return {"checksums": self.checksums()}
        return {}

    def generate(self, body: dict) -> dict:
        assert not self.paused
        how, prompt = body["sampling_params"], body["token_ids"]
        eos, eod = how.get("stop_token_ids", (-1, -1))
        tokenizer = SimpleNamespace(
            eos=eos, eod=eod, think_open=-1, think_close=-1,
            encode=lambda text: [],
        )  # fmt: skip
        heat = how["temperature"]
        params = SamplingParams(
            how["max_tokens"], heat, how.get("top_p", 1.0), how.get("top_k", 0), seed=how["seed"]
        )
        ((found,),) = InProcessSampler(self.engine, tokenizer).generate([prompt], params)
        logprobs = found.logprobs
        if not self.tempered:
            (logprobs,) = token_logprobs(self.engine, [(prompt, found.tokens)])
        content = [
            {"token_id": t, "logprob": p} for t, p in zip(found.tokens, logprobs, strict=True)
        ]
        if how["logprobs"]:
            (logits,) = each_sequence(self.engine, [prompt], lambda head, _: [head.logits()[-1]])
            best = (logits / (heat if self.tempered else 1.0)).log_softmax(-1).max(-1)
            content[0]["top_logprobs"] = [
                {"token_id": int(best.indices), "logprob": float(best.values)}
            ]
        choice = {
            "index": 0,
            "token_ids": found.tokens,
            "logprobs": {"content": content},
            "finish_reason": found.finish_reason,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(found.tokens)}],
        }
        if k := how.get("prompt_logprobs"):
            return {"choices": [choice], "prompt_logprobs": self.best_of(prompt, k)}
        return {"choices": [choice]}

    def best_of(self, prompt: list[int], k: int) -> list[dict | None]:
        """The k best in each token's place and the token itself, as vLLM tells them."""
        (logits,) = each_sequence(self.engine, [prompt], lambda head, _: [head.logits()])
        rows = []
        for logprobs, token in zip(logits.log_softmax(-1), prompt[1:], strict=False):
            ids = [token, *logprobs.topk(k).indices.tolist()]
            rows.append({str(i): {"logprob": float(logprobs[i]), "rank": 1} for i in ids})
        return [None, *rows]

    def checksums(self) -> dict[str, str]:
        found = {}
        with tempfile.TemporaryDirectory() as folder, ONE_AT_A_TIME:
            self.engine.save_hf(folder, {})
            for file in Path(folder).glob("*.safetensors"):
                with safe_open(file, "np") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        digest = hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest()
                        found[f"dp0:pp0:pcp0:tp0:{name}"] = digest
        return found


@contextmanager
def token_server(engine, fault=None, *, tempered=True, hold=0.0):
    state = TokenServer(engine, fault, tempered, hold)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if state.dead:
                return self._hang_up()
            known = {
                "/health": {},
                "/version": {"version": "0.0.test"},
                "/weight_info": {"weight_version": state.version},
            }
            self._send(200 if self.path in known else 404, known.get(self.path, {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/tokenize" and state.tokenizer:
                return self._send(200, {"tokens": state.tokenizer.encode(body["prompt"])})
            if state.dead:
                return self._hang_up()
            if self.path not in POSTS:
                return self._send(404, {"detail": "Not Found"})
            if self.path == POSTS[0] and "token_ids" not in body:
                return self._send(400, {"error": "token_ids is missing"})
            state.paths[self.path] += 1
            fault = state.fault and state.fault(self.path, body, state.paths[self.path])
            if fault == "kill":
                state.dead = True
                threading.Thread(target=server.shutdown).start()
                server.socket.close()
                return self._hang_up()
            if fault == "slow":
                time.sleep(1.5)
            if fault in ("500", "400", "404"):
                return self._send(int(fault), {"error": f"told to answer {fault}"})
            answer = state.post(self.path, body)
            if fault == "aborted":
                answer["choices"][0]["finish_reason"] = "abort"
            if fault == "mixed":
                answer["choices"][0]["logprobs"]["content"][0]["token_id"] += 1
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
