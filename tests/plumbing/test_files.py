"""The one writer of cli.py: whole or not at all, nothing left, nothing replaced that is no file."""
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import cli
from cli import BadInput, append_line, atomic, check_writable, clean_temps, write_file
from config import save_checkpoint
from conftest import ROOT


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          **options)


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "old")
    with pytest.raises(ZeroDivisionError):
        with atomic(path) as temp, open(temp, "w") as f:
            f.write("half")
            1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    """Fault: the link was replaced by a file, and the file it named stayed old."""
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere/log"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "log"
    link.symlink_to(target)
    check_writable(link)
    write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_to_come_survives_the_check_of_it(tmp_path):
    """Fault: check_writable removed the link."""
    link = tmp_path / "link.wav"
    link.symlink_to(tmp_path / "later.wav")
    check_writable(link)
    assert link.is_symlink() and not (tmp_path / "later.wav").exists()


def test_a_device_and_a_fifo_are_written_through(tmp_path):
    """Fault: root's /dev/null became a file, a FIFO vanished under its reader."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    heard = []
    reader = threading.Thread(target=lambda: heard.append(fifo.read_bytes()))
    reader.start()
    check_writable(null)
    for path in (fifo, null):
        write_file(path, "text")
    reader.join()
    assert heard == [b"text"] and fifo.is_fifo() and os.path.realpath(null) == "/dev/null"
    assert sorted(os.listdir(tmp_path)) == ["fifo", "null"]


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f"vae.pt.{gone.pid}.calm.tmp", f"lm.pt.{os.getppid()}.calm.tmp", "x.1.tmp"):
        (tmp_path / name).touch()
    with atomic(tmp_path / "mine") as temp:
        clean_temps(tmp_path)
        left = set(os.listdir(tmp_path))
        assert left == {f"lm.pt.{os.getppid()}.calm.tmp", "x.1.tmp", os.path.basename(temp)}


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "vae.pt"
    write_file(path, "old")
    child = python(f"import cli, os, signal\nwith cli.atomic({str(path)!r}) as temp:\n"
                   "    open(temp, 'w').write('half'); os.kill(os.getpid(), signal.SIGKILL)")
    assert child.returncode == -signal.SIGKILL and path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    cli.cleaned.discard(str(tmp_path))
    write_file(path, "new")
    assert os.listdir(tmp_path) == ["vae.pt"] and path.read_text() == "new"


@pytest.mark.parametrize("code", cli.ADVICE)
def test_an_error_of_the_storage_is_one_line_with_what_to_do(tmp_path, monkeypatch, code):
    path = tmp_path / "figures.json"
    write_file(path, "old")

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(BadInput) as e:
        write_file(path, "new")
    assert str(e.value) == (f"{path}: cannot be written ({os.strerror(code)}); {cli.ADVICE[code]}; "
                            "the old file is untouched")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]


def test_what_torch_makes_of_a_full_disk_is_the_same_line():
    """Fault: RuntimeError: unexpected pos 704 vs 598."""
    with pytest.raises(BadInput, match="full: cannot be written .No space left on device.; make"):
        save_checkpoint("/dev/full", {"model": torch.zeros(1000)})


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        with atomic(tmp_path / "a.json"):
            open(tmp_path / "missing.wav")


def test_a_name_that_is_too_long_is_refused_at_the_start_and_a_long_one_is_not(tmp_path):
    with pytest.raises(BadInput, match="choose a shorter name"):
        check_writable(tmp_path / ("ä" * 128))
    write_file(tmp_path / ("a" * 255), "x")
    assert [len(name) for name in os.listdir(tmp_path)] == [255]


def test_on_a_full_disk_no_half_line_is_appended(tmp_path):
    path = tmp_path / "log.jsonl"
    child = python(f"import cli, resource\npath = {str(path)!r}\ncli.append_line(path, 'x' * 50)\n"
                   "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
                   "try: cli.append_line(path, 'y' * 80)\nexcept cli.BadInput as e: print(e)")
    assert "log.jsonl: cannot be written (File too large)" in child.stdout, child.stderr
    assert path.read_text() == "x" * 50 + "\n"


FOR_A_WHILE = """
import sys, time
from cli import cli
def main():
    for i in range(30):
        print(i, flush=True); print(i, file=sys.stderr, flush=True); time.sleep(0.01)
    open(sys.argv[1], "w").write("to the end")
cli(main, outlives_screen={})
"""


@pytest.mark.parametrize("lasting", [True, False])
def test_a_closed_stdout_ends_a_command_in_one_line_but_not_a_training(tmp_path, lasting):
    done = tmp_path / "done"
    child = subprocess.Popen([sys.executable, "-c", FOR_A_WHILE.format(lasting), done], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.readline()
    child.stdout.close()
    errors = child.stderr.read().splitlines()
    assert child.wait() == (0 if lasting else 1)
    assert done.exists() == lasting
    assert lasting or errors[-1] == "error: nobody reads the output any more; stopped"
    assert not any("Traceback" in line for line in errors)


def test_streams_closed_before_the_start_get_nobody_elses_files(tmp_path):
    """Fault: AttributeError: 'NoneType' object has no attribute 'reconfigure'."""
    done = tmp_path / "done"
    child = subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&-', sys.executable, "-c",
                            FOR_A_WHILE.format(True), done], cwd=ROOT)
    assert child.returncode == 0 and done.read_text() == "to the end"
