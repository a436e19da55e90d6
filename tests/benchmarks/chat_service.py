"""An OpenAI-compatible server whose answers, limits and ills a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

type Body = dict[str, object]
Top = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Said:
    """One chat completion."""

    content: str | None
    top: Top | None = None
    refusal: str | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Refused:
    """An answer that is no completion."""

    status: int
    text: str = "no"
    headers: Mapping[str, str] = field(default_factory=dict)


Respond = Callable[[Body], Said | Refused]


@dataclass
class Heard:
    """What came in."""

    url: str
    bodies: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def text_of(body: Body) -> str:
    """All that a request says."""
    messages = body["messages"]
    assert isinstance(messages, list)
    return "\n".join(one["content"] for one in messages)


@contextmanager
def chat_service(respond: Respond) -> Iterator[Heard]:
    """Serves chat completions while inside; `respond` is called by several threads."""

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            heard.bodies.append(body)
            heard.keys.append(self.headers.get("authorization", ""))
            answer = respond(body)
            if isinstance(answer, Refused):
                self._send(answer.status, answer.text.encode(), answer.headers)
            else:
                self._send(200, json.dumps(completion(answer)).encode(), {})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = True
    heard = Heard(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield heard
    finally:
        server.shutdown()
        server.server_close()


def completion(said: Said) -> Body:
    """As the API answers."""
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in said.top or ()]
    logprobs = None if said.top is None else {"content": [{"token": "x", "logprob": 0, "top_logprobs": top}]}
    message = {"role": "assistant", "content": said.content, "refusal": said.refusal}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": said.finish_reason}
    return {
        "id": "c1",
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }
