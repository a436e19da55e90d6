"""Servers without an engine, whose answers and ills a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rto_megatron.generation.vllm.client.server_client import GENERATE_ROUTE, Json

Answer = dict[str, Json]


def choice(token_ids: list[int], finish_reason: str = "length", version: str = "4") -> Answer:
    """One generated response."""
    content: list[Json] = [{"token_id": token_id, "logprob": -1.5} for token_id in token_ids]
    return {
        "token_ids": list(token_ids),
        "logprobs": {"content": content},
        "finish_reason": finish_reason,
        "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}],
    }


class CannedServer:
    """Answers generation requests by `respond`; control routes always answer, as those of a dead engine can.

    Args:
        respond: seed of the request (None: a probe of one token) -> the choice, or the status of an error.
    """

    def __init__(self, respond: Callable[[int | None], Answer | int]) -> None:
        self.respond = respond
        self.version = "4"
        self.num_generated_tokens = 0
        self.seeds: list[int] = []  # of the generation requests that came in
        self.num_probes = 0
        self._awake = threading.Event()
        self._awake.set()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Generates nothing from here on, until `wake`: requests that came in are answered then."""
        self._awake.clear()

    def wake(self) -> None:
        """Ends `stop`."""
        self._awake.set()

    def close(self) -> None:
        """Refuses connections from here on; what came in before stays unanswered if it slept."""
        self._http.shutdown()
        self._http.server_close()

    def generate(self, seed: int | None) -> Answer | int:
        """The answer to one request, once awake."""
        if seed is None:
            self.num_probes += 1
        else:
            self.seeds.append(seed)
        answer = self.respond(seed)
        self._awake.wait()
        return answer


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def _handler(server: CannedServer) -> type[BaseHTTPRequestHandler]:
    class Canned(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(f'vllm:generation_tokens_total{{engine="0"}} {server.num_generated_tokens}\n')
            else:
                self._send(json.dumps({"weight_version": server.version, "is_paused": False}))

        def do_POST(self) -> None:
            assert self.path == GENERATE_ROUTE
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = server.generate(body["sampling_params"].get("seed"))
            if isinstance(answer, int):
                self.send_error(answer)
            else:
                self._send(json.dumps({"choices": [answer]}))

        def _send(self, text: str) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            return

        def handle(self) -> None:
            try:
                super().handle()
            except (BrokenPipeError, ConnectionResetError):
                return  # the client gave up

    return Canned


@contextmanager
def canned_servers() -> Iterator[Callable[[Callable[[int | None], Answer | int]], CannedServer]]:
    """Starts servers, and closes those that are still open at the end."""
    servers: list[CannedServer] = []

    def start(respond: Callable[[int | None], Answer | int]) -> CannedServer:
        servers.append(CannedServer(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.wake()
        server.close()
