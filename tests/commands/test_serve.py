"""The page to type in: what it sends, and that nothing a client does ends the server."""
import base64
import http.client
import io
import json
import random
import socket
import sys
import threading
import time

import numpy as np
import pytest
import soundfile as sf
import torch

import sample
import serve
from webdriver import Browser, needs_browser, wait_for
from cli import BadInput, Failure
from generate import load
from untrained import untrained_run

TEXT = {"text": "two", "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(untrained_run(tmp_path_factory.mktemp("served")), device="cpu")


@pytest.fixture(scope="module")
def server(model):
    server = serve.Server(model, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                     daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method, path, body=None, **headers):
    """-> (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def say(server, **asked):
    return ask(server, "POST", "/say", json.dumps(asked))


def error(answer, status):
    assert answer[0] == status
    return json.loads(answer[1])["error"]


def test_the_page_comes_with_what_it_needs_to_know(server, model):
    status, page = ask(server, "GET", "/")
    assert status == 200 and b"<!doctype html>" in page
    for element in ("text", "kind", "seed", "temperature", "guidance", "steps", "voice"):
        assert f'id="{element}"'.encode() in page
    about = json.loads(ask(server, "GET", "/about?x=1")[1])
    assert about["kinds"] == model.kinds and about["sample_rate"] == 16000 and about["voices"]
    assert about["defaults"] == {"steps": 2, "temperature": 0.8, "guidance": 1.0}


def test_an_unknown_method_and_a_broken_head_are_a_line_too(server):
    """Fault: they were pages of HTML, where every other error is JSON."""
    assert error(ask(server, "PUT", "/say", "{}"), 501) == "Unsupported method ('PUT')"
    assert "Too many" in error(ask(server, "GET", "/", **{f"a{i}": "b" for i in range(150)}), 431)


def test_head_has_the_length_of_get_and_no_body(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    length = len(ask(server, "GET", "/")[1])
    assert b" 200 " in head and f"Content-Length: {length}".encode() in head and body == b""


def test_what_is_sent_are_the_samples_of_say_with_the_comment(server, model):
    status, data = say(server, **TEXT, kind="sound", temperature=0.5, steps=1)
    wav = model.say("two", seed=3, kind="sound", temperature=0.5, steps=1)
    assert status == 200 and data[data.index(b"data") + 8:] == np.round(
        wav * np.float32(32767)).astype("<i2").tobytes()
    assert sf.SoundFile(io.BytesIO(data)).comment == model.comment


@pytest.mark.parametrize("asked, says", [
    ({}, "text: is missing"), ({"text": " "}, "text: is missing"), ({"text": 5}, "text: is mis"),
    ({"text": "a" * 1001}, "text: has 1001 characters, 1000"),
    ({"text": "a" * 40}, "text: 'a"), ({"text": "\ud800"}, "text: holds half"),
    ({"text": "a", "kind": "smell"}, "kind: is none of"), ({"text": "a", "kind": [1]}, "kind: is"),
    ({"text": "a", "steps": 0}, "steps: must be a whole number in 1 .. 100"),
    ({"text": "a", "steps": 1.5}, "steps: must be"), ({"text": "a", "seed": True}, "seed: must"),
    ({"text": "a", "seed": 1e400}, "seed: must be"), ({"text": "a", "guidance": "1"}, "guidance:"),
    ({"text": "a", "temperature": -1}, "temperature: must be a number in 0 .. 10"),
    ({"text": "a", "temperature": float("nan")}, "temperature: must be"),
    ({"text": "a", "voice": "none"}, "voice: is no longer here"),
    ({"text": "a", "seconds": 9}, "'seconds': is no field")])
def test_a_wrong_field_is_one_line(server, asked, says):
    status, body = say(server, **asked)
    assert 400 <= status < 500 and json.loads(body)["error"].startswith(says)


def test_limits_of_size_hold_before_anything_is_read(server):
    for path, header, status in [("/say", "Content-Length: 20001", b" 413 "),
                                 ("/voice", "Content-Length: 20000001", b" 413 "),
                                 ("/say", "Content-Length: 1" + 30 * "0", b" 413 "),
                                 ("/say", "Content-Length: -1", b" 411 "),
                                 ("/say", "X: 1", b" 411 "),
                                 ("/say", "Transfer-Encoding: chunked", b" 411 ")]:
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
            assert status in client.makefile("rb").readline()


def test_a_page_of_another_origin_and_a_foreign_name_of_this_machine_are_refused(server):
    own = f"localhost:{server.server_port}"
    for headers, status in [({"Host": own, "Origin": f"http://{own}"}, 200), ({"Host": own}, 200),
                            ({"Host": own, "Origin": "http://evil.example"}, 403),
                            ({"Host": own, "Origin": "null"}, 403),
                            ({"Host": "evil.example"}, 403), ({"Host": "["}, 400)]:
        assert ask(server, "GET", "/about", **headers)[0] == status, headers


def odd_requests(count):
    """Bytes that no browser sends."""
    r = random.Random(0)
    good = b'{"text": "two", "seed": 1}'
    heads = [b"GET / HTTP/1.1", b"POST /say HTTP/1.1", b"POST /voice HTTP/1.1", b"PUT /say HTTP/1.1",
             b"GET /../../etc/passwd HTTP/1.1", b"GET /say HTTP/1.1", b"POST / HTTP/1.1",
             b"GET", b"", b"GET / HTTP/9.9", b"GET / HTTP/1.1 x y", b"\xff\xfe / HTTP/1.1",
             b"GET /" + b"a" * 70000 + b" HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /\x00 HTTP/1.0"]
    lengths = [None, b"0", b"5", b"-1", b"1e3", b"999999999999999", b"", b"26", b"\xc2\xb2", b"+5"]
    bodies = [good, b"", b"{", b"null", b"[]", b'"text"', b"[" * 15000, b'{"text": {}}', b"\xff" * 99,
              b'{"text": "a", "seed": -1}', b'{"text": "a", "steps": 1e999}', r.randbytes(300),
              b'{"text": "a", "voice": {"a": []}}', b'{"text": "' + b"\\ud800" + b'"}',
              b"RIFF" + r.randbytes(500), b'{"text": "a", "temperature": NaN}']
    for _ in range(count):
        body = r.choice(bodies)
        length = r.choice([str(len(body)).encode(), r.choice(lengths)])
        request = r.choice(heads) + b"\r\nHost: localhost\r\n"
        request += b"" if length is None else b"Content-Length: " + length + b"\r\n"
        request += r.choice([b"", b"", b"Expect: 100-continue\r\n", b"Transfer-Encoding: x\r\n",
                             b"x" * 70000 + b": 1\r\n", b"a: b\r\n" * 150, b"no colon\r\n"])
        request += b"\r\n" + body
        yield request[:r.randrange(len(request))] if r.random() < 0.2 else request


def test_what_training_lacked_for_a_text_is_in_a_header(server, model, monkeypatch):
    monkeypatch.setitem(model.seen, "letters", {"speech": "two"})
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("POST", "/say", json.dumps(TEXT | {"text": "two \u00e95"}))
    assert connection.getresponse().headers["Note"].startswith(
        "no%20text%20of%20training%20had%20%C3%A9%205%3A")
    connection.close()


def test_two_hundred_odd_requests_are_survived(server, model, monkeypatch, capsys):
    """Each gets an error or an answer, or its connection is closed; the 201st is served."""
    monkeypatch.setattr(serve.Handler, "timeout", 5.0)
    statuses = []
    for request in odd_requests(200):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
            try:
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
                statuses.append(client.makefile("rb").read()[:15])
            except OSError:                              # closed before all of it was read
                statuses.append(b"closed")
    assert len(statuses) == 200 and len(set(statuses)) >= 8
    assert b"HTTP/1.1 500 In" not in statuses
    assert not server.queue.tickets and say(server, **TEXT)[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_two_clients_get_their_own_audio_one_after_the_other(server, model, monkeypatch):
    running = []
    most = []
    stream = model.stream

    def watched(*arguments, **options):
        running.append(1)
        most.append(len(running))
        yield from stream(*arguments, **options)
        running.pop()
    monkeypatch.setattr(model, "stream", watched)

    found = {}
    clients = [threading.Thread(target=lambda i=i: found.update({i: say(server, text="two", seed=i)}))
               for i in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    monkeypatch.undo()
    assert most == [1, 1, 1, 1]
    assert [found[i] for i in range(4)] == [say(server, text="two", seed=i) for i in range(4)]


class Endless:
    """A stream in place of Model.stream that goes on until it is closed."""

    def __init__(self, model, monkeypatch):
        self.started = 0
        self.ended = 0
        monkeypatch.setattr(model, "stream", self.stream)

    def stream(self, text, **options):
        self.started += 1
        try:
            while True:
                yield np.zeros(4096, np.float32)
                time.sleep(0.001)
        finally:
            self.ended += 1


def connect(server, **asked):
    """A client that has asked and reads nothing."""
    client = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
    body = json.dumps(asked).encode()
    client.sendall(b"POST /say HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                   % (len(body), body))
    return client


def test_generation_ends_for_a_client_that_leaves_and_for_one_that_stops_reading(
        server, model, monkeypatch):
    endless = Endless(model, monkeypatch)
    client = connect(server, **TEXT)
    assert b"200 OK" in client.recv(4096)
    client.close()
    wait_for(lambda: endless.ended == 1)

    monkeypatch.setattr(serve, "TIMEOUT", 0.5)
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    with connect(server, **TEXT):
        wait_for(lambda: endless.ended == 2, 10)
    monkeypatch.undo()
    assert say(server, **TEXT)[0] == 200


def test_who_leaves_the_queue_is_not_generated_for_and_a_full_queue_says_so(
        server, model, monkeypatch):
    endless = Endless(model, monkeypatch)
    first = connect(server, **TEXT)
    wait_for(lambda: endless.started == 1)
    waiting = [connect(server, **TEXT) for _ in range(serve.MOST_WAITING)]
    wait_for(lambda: len(server.queue.tickets) == 1 + serve.MOST_WAITING)
    assert "8 others are waiting" in error(say(server, **TEXT), 503)

    for client in (*waiting, first):
        client.close()
    wait_for(lambda: not server.queue.tickets)
    assert endless.started == endless.ended == 1


def test_a_model_that_fails_says_so_or_ends_before_the_end(server, model, monkeypatch, capsys):
    def failing(pieces):
        def stream(text, **options):
            yield from [np.zeros(100, np.float32)] * pieces
            raise Failure("lm: latent 0 is not finite")
        return stream

    monkeypatch.setattr(model, "stream", failing(0))
    assert error(say(server, **TEXT), 500) == "lm: latent 0 is not finite"
    monkeypatch.setattr(model, "stream", failing(2))
    with pytest.raises(http.client.IncompleteRead):
        say(server, **TEXT)
    assert capsys.readouterr().err.count("/say: lm: latent 0 is not finite\n") == 2


def wav_bytes(wav):
    file = io.BytesIO()
    sf.write(file, wav, 16000, format="WAV")
    return file.getvalue()


def test_an_uploaded_voice_is_spoken_with_and_the_oldest_is_forgotten(
        server, model, tmp_path, monkeypatch):
    wav = 0.3 * np.sin(np.arange(16000) / 9)
    status, body = ask(server, "POST", "/voice", wav_bytes(wav))
    name = json.loads(body)["voice"]
    assert status == 200 and json.loads(body)["speech"] == 0.16

    with open(tmp_path / "ref.wav", "wb") as f:
        f.write(wav_bytes(wav))
    stream = model.stream
    used = []
    monkeypatch.setattr(model, "stream", lambda text, voice, **options: used.append(voice.latents)
                        or stream(text, voice=voice, **options))
    assert say(server, **TEXT, voice=name)[0] == 200
    assert torch.equal(used[0], model.voice(tmp_path / "ref.wav").latents)

    for _ in range(serve.MOST_VOICES):
        ask(server, "POST", "/voice", wav_bytes(wav))
    assert "upload the recording again" in error(say(server, **TEXT, voice=name), 404)


def test_a_recording_without_a_voice_is_refused_in_words_of_the_page(server, monkeypatch):
    silent = error(ask(server, "POST", "/voice", wav_bytes(np.zeros(8000))), 400)
    assert silent.startswith("prompt the recording: is silent, it has no voice")
    for data in (b"", b"no audio at all", b"#EXTM3U\nhttp://localhost/x\n"):
        assert "/tmp" not in error(ask(server, "POST", "/voice", data), 400)
    monkeypatch.setattr(serve, "MOST_VOICE_SECONDS", 0.4)
    assert "lasts 0 s" in error(ask(server, "POST", "/voice", wav_bytes(np.ones(8000))), 413)


def test_an_address_that_is_taken_is_one_line(server, model):
    with pytest.raises(BadInput, match=r"--port \d+: cannot be listened on \(Address already in"):
        serve.serve(model, "127.0.0.1", server.server_port)
    with pytest.raises(BadInput, match="cannot be listened on"):
        serve.serve(model, "no.such.host.invalid", 0)


def test_what_the_page_asks_for_is_refused_beside_serve(monkeypatch):
    for option in (["--text", "two"], ["--out", "x.wav"], ["--prompt-seconds", "1"]):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--run", "x", "--serve", *option])
        with pytest.raises(BadInput, match=f"{option[0]}: is not for --serve"):
            sample.parse()


# ---------------------------------------------------------------- in a browser

@needs_browser
def test_the_page_plays_what_is_generated_and_draws_it(server, model, tmp_path,
                                                             monkeypatch):
    browser = Browser(tmp_path)
    try:
        browser.call(f"{browser.session}/url", url=f"http://localhost:{server.server_port}/")
        wait_for(lambda: browser.run("return document.getElementById('kind').options.length") == 3)
        browser.run("document.getElementById('text').value = 'two'")
        browser.click("#say")
        wait_for(lambda: browser.run("return !document.getElementById('result').hidden"), 20)
        wait_for(lambda: browser.run("return document.getElementById('audio').duration > 0"))

        seconds = len(model.say("two")) / 16000
        assert abs(browser.run("return document.getElementById('audio').duration") - seconds) < 0.01
        assert f"{seconds:.2f} s" in browser.run("return document.getElementById('status').innerText")
        colours = browser.run("""
            const canvas = document.getElementById('spectrogram');
            const pen = canvas.getContext('2d');
            return new Set(pen.getImageData(100, 0, 300, canvas.height - 30).data).size""")
        assert colours > 50
        picture = browser.call(f"{browser.session}/screenshot")
        assert base64.b64decode(picture).startswith(b"\x89PNG")

        # characters that training never had are said on the page, and errors
        monkeypatch.setitem(model.seen, "letters", {"speech": "tw"})
        browser.click("#say")
        wait_for(lambda: "; no text of training had o:" in browser.run(
            "return document.getElementById('status').innerText"), 20)
        browser.run("document.getElementById('steps').max = 1000")
        browser.run("document.getElementById('steps').value = 500")
        browser.click("#say")
        wait_for(lambda: "steps: must be" in browser.run(
            "return document.getElementById('status').innerText"))
    finally:
        browser.close()
