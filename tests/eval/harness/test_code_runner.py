"""Generated code has limits, and nothing of it is left."""

from __future__ import annotations

import sys
import time

import pytest
from processes import run_python
from repository import ROOT

from hf_depthattn.eval.harness import code_runner
from hf_depthattn.eval.harness.code_runner import passes


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError",
        "assert False",
        "this is no Python",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "x = '\\ud800'",
        "\ud800",
    ],
)
def test_program_that_does_not_reach_its_end_has_failed(source):
    # The escaped surrogate is a valid program; the raw one is none.
    assert passes(source) is (source == "x = '\\ud800'")


def test_endless_loop_is_killed():
    start = time.monotonic()
    assert not passes("while True: pass", timeout_seconds=1.0)
    assert time.monotonic() - start < 8


def test_child_processes_are_killed_too(tmp_path):
    trace = tmp_path / "trace"
    late = f"import time; time.sleep(2); open({str(trace)!r}, 'w')"
    source = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}]); import time; time.sleep(60)"
    assert not passes(source, timeout_seconds=1.0)
    time.sleep(2.5)
    assert not trace.exists()


def test_memory_is_limited():
    source = "x = bytearray(512 * 1024**2)"
    assert passes(source, memory_bytes=2 * 1024**3)
    assert not passes(source, memory_bytes=256 * 1024**2)


def test_written_files_are_limited_and_removed():
    assert not passes("open('big', 'wb').write(bytes(64 * 1024**2))")


def test_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert passes("import os; assert 'HF_TOKEN' not in os.environ")


@pytest.fixture(params=["namespaces", "no namespaces"])
def supervisor(request, monkeypatch, tmp_path):
    """Code is run with process numbers of its own, where the system allows that, and without."""
    if sys.platform != "linux":
        pytest.skip("other systems have process groups only")
    if request.param == "no namespaces":
        source = code_runner._SUPERVISOR.read_text(encoding="utf-8")
        without = source.replace("is_apart = _unshare(libc)", "is_apart = False")
        assert without != source
        (tmp_path / "supervisor.py").write_text(without, encoding="utf-8")
        monkeypatch.setattr(code_runner, "_SUPERVISOR", tmp_path / "supervisor.py")


# A grandchild in a session of its own.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1.5)
        open({trace!r}, "w")
    os._exit(0)
"""


@pytest.mark.parametrize("rest", ["", "time.sleep(60)"], ids=["ends", "is stopped"])
def test_processes_in_a_session_of_their_own_are_killed_too(supervisor, tmp_path, rest):
    trace = tmp_path / "trace"
    assert passes(DAEMON.format(trace=str(trace)) + rest, timeout_seconds=1.0) is (rest == "")
    time.sleep(2)
    assert not trace.exists()


def test_a_tree_of_processes_that_fork_on_is_killed(supervisor, tmp_path):
    # Each lives shortly and leaves the next one behind.
    trace = tmp_path / "trace"
    source = f"""
import os, time
if os.fork() == 0:
    end = time.time() + 3
    while time.time() < end:
        if os.fork():
            os._exit(0)
        os.setsid()
        time.sleep(0.01)
    open({str(trace)!r}, "w")
"""
    assert passes(source)
    time.sleep(3.5)
    assert not trace.exists()


# `/proc` shows the environment that a process was started with.
LOOKS_UP = """
import os
try:
    environment = open(f"/proc/{os.getppid()}/environ", "rb").read()
except OSError:
    environment = b""
assert b"HF_TOKEN" not in environment
"""


def test_the_environment_of_processes_above_is_not_ours(supervisor):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from hf_depthattn.eval.harness import code_runner
code_runner._SUPERVISOR = Path({str(code_runner._SUPERVISOR)!r})
assert code_runner.passes({LOOKS_UP!r})
assert not code_runner.passes("assert False")
"""
    result = run_python("-c", code, cwd=ROOT, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr


def test_a_program_sees_its_own_processes_only_where_the_system_has_namespaces():
    if sys.platform != "linux" or not passes("import os; assert os.getpid() < 10"):
        pytest.skip("no namespaces here")
    assert passes("import os; assert sum(name.isdigit() for name in os.listdir('/proc')) < 5")


def test_deeply_nested_folders_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(code_runner.tempfile, "tempdir", str(tmp_path))
    source = "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\nopen('file', 'w')\n"
    assert passes(source)
    assert not list(tmp_path.iterdir())


def test_folders_without_rights_and_links_are_removed(monkeypatch, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("x")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(code_runner.tempfile, "tempdir", str(tmp_path / "temporary"))
    source = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a/b', 0)\nos.mkfifo('pipe')\n"
    assert passes(source + f"os.symlink({str(outside)!r}, 'a/link')\n")
    assert not list((tmp_path / "temporary").iterdir()) and (outside / "mine").exists()
