"""What users can put right is one line and exit code 2, whatever library noticed it; a bug keeps its traceback."""

import errno
import json
import logging
import os
import sys
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError, safe_open

from hf_depthattn.checkpoints.devices import check_device
from hf_depthattn.cli.run_command import advice_after_interrupt, run_command
from hf_depthattn.errors import UserError
from hf_depthattn.utils.quiet_libraries import quiet_libraries


def deep_json():
    json.loads("[" * 200_000)


def broken_shard():
    raise SafetensorError("Error while deserializing header: InvalidHeader")


def wrong_field():
    raise StrictDataclassFieldValidationError(field="hidden_size", cause=TypeError("expected int\ngot 'big'"))


def huge_tensor():
    torch.empty(2**40, 2**40)


def raising(error):
    def raise_it():
        raise error

    return raise_it


# label -> what happens, words of the line
KNOWN = {
    "ours": (raising(UserError("field: 3\nis  bad")), ["error: field: 3 is bad"]),
    "file": (lambda: os.listdir("/nowhere/file"), ["/nowhere/file: No such file or directory"]),
    "disk full": (raising(OSError(errno.ENOSPC, "No space left on device", "out")), ["out: No space left"]),
    "deep JSON": (deep_json, ["nested too deeply"]),
    "broken JSON": (lambda: json.loads("{"), ["cannot be read", "property name"]),
    "not UTF-8": (lambda: b"\xff".decode(), ["cannot be read", "0xff"]),
    "safetensors": (broken_shard, ["weight file", "InvalidHeader"]),
    "safetensors, missing": (lambda: safe_open("/nowhere", "pt"), ["/nowhere"]),
    "strict config": (wrong_field, ["hidden_size", "expected int got 'big'"]),
    "memory": (raising(MemoryError()), ["out of memory"]),
    "torch's memory": (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to")), ["too large", "Tried to"]),
    "size overflow": (huge_tensor, ["too large"]),
    "control characters": (raising(UserError("a\x1b[2Jb\x00")), [r"a\x1b[2Jb\x00"]),
}


@pytest.mark.parametrize("action, words", KNOWN.values(), ids=KNOWN.keys())
def test_known_errors_are_one_line_and_exit_code_2(action, words, capsys):
    assert run_command(action) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("depthattn: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "bug", [TypeError("x"), KeyError("x"), ValueError("x"), RuntimeError("shape"), AssertionError()]
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_command(raising(bug))


def test_an_interrupt_is_exit_code_130(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "depthattn: interrupted; nothing was left behind\n"


def test_advice_takes_the_place_of_nothing_was_left_behind(capsys):
    def interrupted():
        with advice_after_interrupt("try again"):
            raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "depthattn: interrupted; try again\n"
    # Other errors pass as they are.
    with pytest.raises(ZeroDivisionError), advice_after_interrupt("try again"):
        raise ZeroDivisionError


def test_exit_codes_of_commands_pass():
    assert [run_command(lambda code=code: code) for code in (0, 1, 130)] == [0, 1, 130]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_report_that_cannot_be_printed_is_a_mistake(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command(lambda: print("report") or 0) == 2
        monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err


def test_cpu_is_a_device():
    check_device("cpu")


@pytest.mark.parametrize("device", ["meta", "banana", "", "cuda:99", "cpu:x", "mps:3", "xla", "hpu", "privateuseone"])
def test_devices_that_cannot_compute_are_refused(device):
    with pytest.raises(UserError) as error:
        check_device(device)
    assert "\n" not in str(error.value) and f"device: {device!r}" in str(error.value)


def test_other_libraries_do_not_warn_between_the_lines(capsys):
    with quiet_libraries(None):
        warnings.warn_explicit("is deprecated", FutureWarning, "torch/some.py", 1, module="torch.some")
        warnings.warn_explicit("is deprecated", FutureWarning, "model.py", 1, module="hf_depthattn.modeling_depthattn")
        assert capsys.readouterr().err == ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("mind", UserWarning, "hf_depthattn/x.py", 1, module="hf_depthattn.x")
        assert len(caught) == 1


@pytest.mark.parametrize("name", ["torchao", "torchao.kernels", "torch.utils._pytree"])
def test_other_libraries_do_not_log_between_the_lines(caplog, name):
    logger = logging.getLogger(name)
    with quiet_libraries(None):
        logger.warning("could not load a kernel")
        logger.error("could not load anything")
    logger.warning("later")
    assert [record.message for record in caplog.records] == ["could not load anything", "later"]
