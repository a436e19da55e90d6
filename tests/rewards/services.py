"""An HTTP service whose answers a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

type Request = dict[str, object]
type Respond = Callable[[Request], object]  # what is sent as JSON; an int is a status, None no answer for 5 s


@contextmanager
def service(respond: Respond) -> Iterator[tuple[str, list[tuple[str, Request]]]]:
    """Its address, and what came in: the Authorization header and the request."""
    heard: list[tuple[str, Request]] = []
    over = threading.Event()

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            heard.append((self.headers.get("authorization", ""), request))
            answer = respond(request)
            if answer is None:
                over.wait(5)
                return
            if isinstance(answer, int):
                self.send_error(answer)
                return
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", heard
    finally:
        over.set()
        server.shutdown()
        server.server_close()
