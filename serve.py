"""A page to type in: python sample.py --run RUN --serve [--port 8000]

    GET  /         the page, serve.html
    GET  /about    {"model", "kinds", "voices", "sample_rate", "defaults", ...} as JSON
    POST /voice    the bytes of an audio file          -> {"voice": its name, "speech": seconds}
    POST /say      {"text", "kind", "seed", "steps", "temperature", "guidance", "voice"}, all but
                   the text optional                   -> a .wav, sent while it is generated; the
                   header Note says, percent-encoded, what training lacked for this text

    curl --data '{"text": "three seven"}' http://localhost:8000/say > hello.wav

       request ─► checked ─► queue, in order of coming ─► model ─► piece by piece to the client
                    └─ 4xx {"error": "one line"}             └─ who leaves stops being generated for

One generation at a time: a model serves one. It listens on this machine alone unless --host says
otherwise, and there only to pages of its own: a page of another origin, which a browser would let
post, gets 403. Uploads become latents and are deleted; texts are not logged.
"""
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
from collections import deque
from contextlib import closing, contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from urllib.parse import quote, urlsplit

import torch

from audio import pcm16, wav_header
from cli import BadInput, Failure
from prompts import length

MOST_TEXT = 1000                    # characters of a text
MOST_STEPS = 100                    # per latent
MOST_WAITING = 8                    # requests in the queue; more get 503
MOST_VOICES = 16                    # that are kept; then the oldest goes
MOST_UPLOAD = 20_000_000            # bytes of a recording
MOST_VOICE_SECONDS = 600.0          # of a recording
MOST_REQUEST = 20_000               # bytes of a text with its settings
TIMEOUT = 30.0                      # seconds without a byte, in either direction
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serve.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# what is asked of a number: its type, least and most
NUMBERS = {"seed": (int, 0, 2 ** 53), "steps": (int, 1, MOST_STEPS), "temperature": (float, 0, 10),
           "guidance": (float, -10, 10)}


class Refusal(Exception):
    """A request that gets an error: its status of HTTP and one line."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Queue:
    """`with queue.turn():` one at a time, in the order of coming. Refusal where it is full."""

    def __init__(self, most=MOST_WAITING):
        self.most = most
        self.tickets = deque()                          # the first one is served
        self.changed = threading.Condition()

    @contextmanager
    def turn(self):
        ticket = object()
        with self.changed:
            if len(self.tickets) > self.most:
                raise Refusal(503, f"{self.most} others are waiting; try again in a while")
            self.tickets.append(ticket)
            self.changed.wait_for(lambda: self.tickets[0] is ticket)
        try:
            yield
        finally:
            with self.changed:
                self.tickets.popleft()
                self.changed.notify_all()


# ---------------------------------------------------------------- what is asked

def read_request(body, model, voices):
    """The body of POST /say -> (text, options of Model.stream). Errors: Refusal."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the request is not JSON") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the request is no JSON object")
    known = ("text", "kind", "voice", *NUMBERS)
    for name in asked:
        if name not in known:
            raise Refusal(400, f"{name[:40]!r}: is no field; use {', '.join(known)}")

    # the text
    text = asked.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "text: is missing; say something")
    if len(text) > MOST_TEXT:
        raise Refusal(413, f"text: has {len(text)} characters, {MOST_TEXT} are possible")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(400, "text: holds half a character (a lone surrogate)") from None

    # its settings; null = the run's own
    options = {name: number(asked[name], name) for name in NUMBERS if asked.get(name) is not None}
    options["kind"] = asked.get("kind") or model.kinds[0]
    if options["kind"] not in model.kinds:
        raise Refusal(400, f"kind: is none of {', '.join(model.kinds)}")
    if asked.get("voice") is not None:
        options["voice"] = voices.get(str(asked["voice"]))
        if options["voice"] is None:
            raise Refusal(404, "voice: is no longer here; upload the recording again")
    return text, options


def number(value, name):
    """A number of the request, in its range."""
    kind, low, high = NUMBERS[name]
    wanted = "a whole number" if kind is int else "a number"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or kind is float and isinstance(value, float)) or not low <= value <= high:
        raise Refusal(400, f"{name}: must be {wanted} in {low} .. {high}")
    return kind(value)


def encode_upload(data, model):
    """The bytes of an audio file -> the Voice that it lends. Errors: BadInput, Refusal."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "recording")
        with open(path, "wb") as f:
            f.write(data)
        try:
            seconds = length(path, model.cfg.vae)
            if not seconds <= MOST_VOICE_SECONDS:
                raise Refusal(413, f"the recording lasts {seconds:.0f} s, "
                                   f"{MOST_VOICE_SECONDS:.0f} s are possible")
            return model.voice(path)
        except BadInput as e:
            raise BadInput(str(e).replace(path, "the recording")) from None


# ---------------------------------------------------------------- the server

class Server(ThreadingHTTPServer):
    """A model, its queue and the voices that were uploaded."""
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, model, host, port):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.model = model
        self.queue = Queue()
        self.voices = {}
        self.alone = host in LOOPBACK

    def about(self):
        """What the page needs to know."""
        model = self.model
        names = ("steps", "temperature", "guidance")
        return {"model": model.comment, "kinds": model.kinds, "sample_rate": model.sample_rate,
                "channels": model.cfg.vae.channels, "voices": bool(model.cfg.data.prompt_frames),
                "defaults": {name: model.defaults[name] for name in names},
                "most_text": MOST_TEXT, "most_upload": MOST_UPLOAD,
                "waiting": len(self.queue.tickets)}

    def handle_error(self, request, address):
        """One line where a connection ends in a way that nobody foresaw."""
        error = sys.exception()
        print(f"{address[0]}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
              file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One request; each closes its connection."""
    protocol_version = "HTTP/1.1"
    server_version = "nanoCALM"
    sys_version = ""
    timeout = TIMEOUT

    def log_message(self, format, *arguments):
        """Nothing: who listens to what is nobody's concern."""

    def do_GET(self):
        self.answer({"/": self.page, "/about": self.about})

    do_HEAD = do_GET

    def do_POST(self):
        self.answer({"/say": self.say, "/voice": self.voice})

    def answer(self, routes):
        """Serve the request; every error is one line for the client, none ends the server."""
        self.close_connection = True
        self.started = False                            # whether a status was sent
        try:
            self.check_origin()
            path = urlsplit(self.path).path
            if path not in routes:
                raise Refusal(404, f"there is no {path[:80]} here")
            routes[path]()
        except (ConnectionError, TimeoutError):
            return                                      # the client has left
        except Exception as e:
            self.refuse(e)

    def refuse(self, error):
        """Tell the client of an error; behind a piece of audio only by ending before the end."""
        line = " ".join(str(error).split()).removeprefix("--")
        status = 400
        if isinstance(error, Refusal):
            status = error.status
        elif not isinstance(error, BadInput):
            status = 500
            line = line if isinstance(error, Failure) else f"{type(error).__name__}: {line}"
            print(f"{self.path[:80]}: {line}", file=sys.stderr, flush=True)
        if self.started:
            return
        try:
            self.send(status, "application/json", json.dumps({"error": line}).encode())
        except (ConnectionError, TimeoutError):
            return

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses, an unknown method or a broken head, in a line as well
        (it has a page of HTML).
        """
        self.close_connection = True
        self.started = False
        self.refuse(Refusal(code, message or HTTPStatus(code).phrase))

    def check_origin(self):
        """Refusal where a page of another origin asks, or this machine under a foreign name."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        try:
            name = urlsplit(f"//{host}").hostname
            foreign = origin is not None and urlsplit(origin).netloc != host
        except ValueError:
            raise Refusal(400, "Host or Origin: cannot be read") from None
        if foreign or self.server.alone and name not in LOOPBACK:
            raise Refusal(403, "this server answers its own page alone")

    def body(self, most):
        """The bytes of the request. Errors: Refusal."""
        size = self.headers.get("Content-Length", "")
        if not (size.isascii() and size.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "Content-Length: is missing or no number")
        if len(size) > 12 or int(size) > most:
            raise Refusal(413, f"{size[:12]} bytes are too many, {most} are possible")
        data = self.rfile.read(int(size))
        if len(data) < int(size):
            raise ConnectionError("the client has left")
        return data

    def send(self, status, kind, data=None, more=None):
        """A whole answer, or with data = None the head of one whose pieces follow. more: {header:
        value}.
        """
        self.started = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if data is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if data and self.command != "HEAD":
            self.wfile.write(data)

    def send_piece(self, data):
        """A piece of an answer; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    # ---------------------------------------------------------------- routes

    def page(self):
        with open(PAGE, "rb") as f:
            self.send(200, "text/html; charset=utf-8", f.read())

    def about(self):
        self.send(200, "application/json", json.dumps(self.server.about()).encode())

    def voice(self):
        """POST /voice. The oldest voice goes where there are too many."""
        data = self.body(MOST_UPLOAD)
        voices = self.server.voices
        with self.server.queue.turn():
            voice = encode_upload(data, self.server.model)
            name = secrets.token_hex(8)
            voices[name] = voice
            while len(voices) > MOST_VOICES:
                del voices[next(iter(voices))]
        self.send(200, "application/json",
                  json.dumps({"voice": name, "speech": voice.speech}).encode())

    def say(self):
        """POST /say."""
        model = self.server.model
        text, options = read_request(self.body(MOST_REQUEST), model, self.server.voices)
        note = quote(model.note(text, options["kind"]))
        with self.server.queue.turn():
            if self.has_left():
                return
            with closing(model.stream(text, **options)) as pieces:
                first = next(pieces)                    # what fails does so before the status
                self.send(200, "audio/wav", more={"Note": note})
                self.send_piece(wav_header(model.cfg.vae.channels, model.sample_rate,
                                           comment=model.comment))
                for wav in chain([first], pieces):
                    if wav.size:
                        self.send_piece(pcm16(torch.atleast_2d(torch.from_numpy(wav))))
        self.send_piece(b"")

    def has_left(self):
        """Whether the client has closed its connection while it waited."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:                         # nothing new, but open
            return False
        finally:
            self.connection.settimeout(TIMEOUT)


def serve(model, host, port):
    """Serve a model until Ctrl-C. Errors: BadInput where the address cannot be had."""
    try:
        server = Server(model, host, port)
    except (OSError, OverflowError, UnicodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise BadInput(f"--host {host} --port {port}: cannot be listened on ({why}); choose "
                       "another --port, 0 finds a free one") from None
    shown = "localhost" if server.alone else host
    print(f"{model.comment.removeprefix('synthetic audio, generated by ')}: open "
          f"http://{shown}:{server.server_port}/ (Ctrl-C ends)", flush=True)
    with server:
        server.serve_forever()
