"""A web page that classifies photos and shows where the network looked.

    pip install -e '.[train]'
    python examples/serve.py SOURCE [PORT]       # then open http://127.0.0.1:8000

SOURCE is a workdir, a weight file, or a name on the Hub. Drop a photo on the page to see its
classes and, for each, a Grad-CAM map. Programs post the bytes of a photo to /predict and get JSON.
The server is that of the standard library: it listens on this machine only, and belongs behind a
proxy anywhere else.
"""

import base64
import contextlib
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

import resnet_jax as rj

PAGE = Path(__file__).with_name("serve.html")
MAX_BYTES = 20 * 2**20  # of a photo
MAX_WAITING = 8  # requests; each may hold a photo in memory


class Explainer:
    """Classifies photos and explains the answers, one photo at a time."""

    def __init__(self, source: str) -> None:
        self.classifier = rj.Classifier.load(source, batch_size=1)
        self._lock = threading.Lock()
        # Compiles, so that the first visitor need not wait.
        self.classifier.explain(Image.new("RGB", (64, 64)), top=3)

    def __call__(self, photo: bytes) -> dict:
        """{"image", "classes"} for an encoded photo; raises rj.DataError if it is none."""
        with self._lock:
            [found] = self.classifier.explain(photo, top=3)
        classes = [
            {"name": each.name, "probability": each.probability, "overlay": _url(each.overlay())}
            for each in found
        ]
        return {"image": _url(Image.fromarray(found[0].image.squeeze())), "classes": classes}


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /predict classifies; whatever else is answered with one line."""

    timeout = 30  # seconds that a client may be silent
    explain: Explainer
    waiting = threading.BoundedSemaphore(MAX_WAITING)

    def do_GET(self) -> None:
        if self.path != "/":
            return self._refuse(404, "there is only / and /predict")
        self._reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self.path != "/predict":
            return self._refuse(404, "post photos to /predict")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._refuse(411, "the request needs the header Content-Length")
        if int(length) > MAX_BYTES:
            self._skip(int(length))
            return self._refuse(413, f"the photo has more than {MAX_BYTES // 2**20} MB")
        if not self.waiting.acquire(blocking=False):
            self._skip(int(length))
            return self._refuse(503, "too many photos are waiting; try again in a moment")
        try:
            answer = self.explain(self.rfile.read(int(length)))
        except rj.DataError as error:
            return self._refuse(422, str(error))
        finally:
            self.waiting.release()
        self._reply(200, json.dumps(answer).encode(), "application/json")

    def _skip(self, length: int) -> None:
        """Reads and forgets a body: clients send all of it before they read the answer."""
        left = min(length, 10 * MAX_BYTES)
        while left > 0 and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def _refuse(self, status: int, reason: str) -> None:
        self._reply(status, json.dumps({"error": reason}).encode(), "application/json")

    def _reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Does not print a traceback where a client hangs up."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(source: str, port: int = 8000) -> Server:
    """A server that is ready to answer; port 0 takes a free one."""
    handler = type("Handler", (Handler,), {"explain": Explainer(source)})
    return Server(("127.0.0.1", port), handler)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        server = make_server(sys.argv[1], *map(int, sys.argv[2:]))
    except (rj.ResNetJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{server.RequestHandlerClass.explain.classifier}\nhttp://127.0.0.1:{server.server_port}")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
