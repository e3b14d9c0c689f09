"""Benchmarks take turns and print what they measured; each command has its own options."""
import json
import sys

import pytest

from cli import BadInput
from conftest import run, write
from tools.bench import __main__ as bench
from tools.bench import vae
from tools.bench.timing import race


def test_contestants_take_turns_after_an_unmeasured_round():
    order = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert "".join(order) == "abababab" and [len(t) for t in times.values()] == [3, 3]


def test_a_benchmark_prints_and_writes_every_part(tmp_path):
    done = run("-m", "tools.bench", "vae", "--config", write(str(tmp_path)), "--seconds", "0.4",
               "--repeats", "1", "--json", f"{tmp_path}/b.json")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "b.json") as f:
        figures = json.load(f)
    assert set(figures) == {"encode", "decode", "stream decode", "training step"}
    assert set(figures["decode"]) == {"istft decoder", "conv decoder"}
    assert figures["decode"]["istft decoder"]["ratio"] == 1.0
    assert all(v["ms"] > 0 for part in figures.values() for v in part.values())


def test_the_feed_is_measured_from_every_format_and_from_latents(tmp_path):
    done = run("-m", "tools.bench", "feed", "--config", write(str(tmp_path)), "--seconds", "0.4",
               "--clips", "16", "--processes", "1", "--repeats", "1", "--need", "1000",
               "--latents", "10", "--json", f"{tmp_path}/b.json")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "b.json") as f:
        figures = json.load(f)
    assert list(figures) == ["wav", "flac", "ogg", "mp3", "latents"]
    for kind, need in (("wav", 1000), ("mp3", 1000), ("latents", 10)):
        row = figures[kind]["1"]
        assert row["rows per second"] > 0
        assert row["cores"] == pytest.approx(need * row["ms of CPU"] / 1000, abs=0.06 + need / 1e5)


@pytest.mark.parametrize("command, options, others", [
    ("feed", "--config --clips --seconds --processes --need --latents", "--peer --compile"),
    ("vae", "--config --peer --seconds --compile", "--prefix --domain --lengths"),
    ("heads", "--domain --fast", "--config --seconds --peer --compile"),
    ("sample", "--config --peer --prefix --seconds --fast --compile", "--domain --window"),
    ("audiocalm", "--config --seconds --lengths --window", "--peer --compile --prefix")])
def test_each_command_explains_its_options_and_no_others(command, options, others, capsys,
                                                        monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools.bench", command, "-h"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert end.value.code == 0
    for option in (*options.split(), "--repeats", "--threads", "--device", "--json"):
        assert f"[{option}" in usage
    for option in others.split():
        assert f"[{option}" not in usage


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    for package, module in (("moshi", "moshi"), ("pocket-tts", "pocket_tts")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.models", None)
        with pytest.raises(BadInput, match=f"is not installed: pip install {package}"):
            vae.peer_parts(package, 1.0)
