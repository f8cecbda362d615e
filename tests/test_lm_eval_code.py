"""Generated code: nothing runs without lm-eval's flag, and what runs has limits."""

from __future__ import annotations

import sys
import time

import pytest
from processes import run_python
from repository import ROOT

pytest.importorskip("lm_eval")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness import code_runner
from hf_depthattn.eval.harness.code_runner import passes
from hf_depthattn.eval.harness.scoring import cmath_results, humaneval_results, mbpp_results
from hf_depthattn.eval.harness.suites import load_suite
from hf_depthattn.eval.harness.task_files import tasks_folder
from hf_depthattn.eval.harness.tasks import load_tasks

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
}


class ConstantLM(LM):
    """Always gives the same text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests):
        return [self.text for _ in requests]


@pytest.fixture
def data(monkeypatch):
    """Two benchmarks of one item."""

    def load_dataset(path, name=None, **_):
        if path == "openai/openai_humaneval":
            return {"test": datasets.Dataset.from_list([HUMANEVAL])}
        prompt = [{**MBPP, "task_id": i} for i in range(1, 11)]
        return {"test": datasets.Dataset.from_list([MBPP]), "prompt": datasets.Dataset.from_list(prompt)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def manager() -> TaskManager:
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False)


@pytest.mark.parametrize("task", ["humaneval_subprocess", "mbpp_subprocess"])
def test_nothing_runs_without_the_flag(data, tmp_path, task):
    trace = tmp_path / "trace"
    writer = ConstantLM(f"    open({str(trace)!r}, 'w')\n    return a + b\n")
    with pytest.raises(ValueError, match=f"{task} which is marked as unsafe"):
        simple_evaluate(model=writer, tasks=[task], task_manager=manager())
    assert not trace.exists()


@pytest.mark.slow
def test_our_command_refuses_before_anything_is_loaded():
    # No data are there: offline, loading them would be another error.
    with pytest.raises(UserError, match=r"humaneval_subprocess: runs code .* --confirm_run_unsafe_code"):
        load_tasks(None, ["humaneval_subprocess"])
    message = r"humaneval_subprocess, mbpp_subprocess: runs code .*--exclude humaneval_subprocess,mbpp_subprocess"
    with pytest.raises(UserError, match=message):
        load_tasks(load_suite("attnres", local=False), [])


@pytest.mark.parametrize(
    ("task", "completion", "expected"),
    [
        ("humaneval_subprocess", "    return a + b\n", 1.0),
        ("humaneval_subprocess", "    return a - b\n", 0.0),
        ("mbpp_subprocess", "def add(a, b):\n    return a + b\n", 1.0),
        ("mbpp_subprocess", "def add(a, b):\n    return 5\n", 0.0),
    ],
)
def test_with_the_flag_completions_are_scored(data, task, completion, expected):
    results = simple_evaluate(
        model=ConstantLM(completion), tasks=[task], task_manager=manager(), confirm_run_unsafe_code=True
    )
    assert results["results"][task]["pass_at_1,none"] == expected


def test_mbpp_shows_the_examples_of_its_paper(data):
    task = manager().load(["mbpp_subprocess"])["tasks"]["mbpp_subprocess"]
    assert [doc["task_id"] for doc in task.fewshot_docs()] == [2, 3, 4]


def test_scoring_functions():
    assert humaneval_results(HUMANEVAL, [HUMANEVAL["canonical_solution"]]) == {"pass_at_1": 1.0}
    assert humaneval_results(HUMANEVAL, [""]) == {"pass_at_1": 0.0}
    assert mbpp_results(MBPP, [MBPP["code"]]) == {"pass_at_1": 1.0}
    assert mbpp_results({**MBPP, "test_setup_code": "raise ValueError"}, [MBPP["code"]]) == {"pass_at_1": 0.0}


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


@pytest.mark.parametrize(
    ("golden", "answer", "expected"),
    [
        *(("8", "8.0", 1.0), ("1200", "1,200", 1.0), ("0.25", "25%", 1.0), ("0.5", "1/2", 1.0)),
        *(("8", "9", 0.0), ("8", "[invalid]", 0.0), ("8", "1/0", 0.0)),
    ],
)
def test_cmath_compares_numbers(golden, answer, expected):
    assert cmath_results({"golden": golden}, [answer]) == {"exact_match": expected}


def test_cmath_takes_the_last_number(monkeypatch):
    items = [{"question": "3加5是多少？", "golden": "8", "grade": 1, "reasoning_step": 1, "num_digits": 1}]
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"test": datasets.Dataset.from_list(items)})
    answer = ConstantLM("3加5等于8，3+5=8。答案是8")
    results = simple_evaluate(model=answer, tasks=["cmath"], task_manager=manager(), log_samples=True)
    assert results["results"]["cmath"]["exact_match,last-number"] == 1.0
    prompt = results["samples"]["cmath"][0]["arguments"][0][0]
    assert prompt.endswith("问题：3加5是多少？\n解答：") and prompt.count("答案是") == 3
