"""A real HTTP server that speaks the chat-completions protocol, with a script for a model."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# what a script may answer instead of a reply's text
Status = tuple[int, dict[str, str], str]  # status, headers, body


class Served:
    """reply(request, number) -> texts or messages of the choices, or a Status, or None: no answer.

    models: the names of the list of models, or a Status."""

    def __init__(self, reply: Callable, models=("judge",)) -> None:
        self.reply, self.models = reply, models
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def served(reply: Callable, models=("judge",)):
    state = Served(reply, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if isinstance(models, tuple) and models and isinstance(models[0], int):
                return self._send(*models)
            body = {"data": [{"id": m, "object": "model"} for m in models]}
            self._send(200, {}, json.dumps(body))

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with state.lock:
                state.requests.append(request)
                state.headers.append(dict(self.headers))
                number = len(state.requests)
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                said = state.reply(request, number)
            finally:
                with state.lock:
                    state.at_once -= 1
            if isinstance(said, tuple):
                return self._send(*said)
            if said is None:  # the connection breaks
                self.close_connection = True
                return None
            choices = [
                {
                    "index": i,
                    "finish_reason": "stop",
                    "message": {"role": "assistant"}
                    | (text if isinstance(text, dict) else {"content": text}),
                }
                for i, text in enumerate(said)
            ]
            for choice in choices:
                choice["finish_reason"] = choice["message"].pop("finish_reason", "stop")
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
            usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(choices)}
            usage["total_tokens"] = sum(usage.values())
            self._send(200, {}, json.dumps(body | {"choices": choices, "usage": usage}))

        def _send(self, status, headers, body):
            data = body.encode()
            self.send_response(status)
            for name, value in ({"content-type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def slowly(seconds, texts):
    time.sleep(seconds)
    return texts
