"""`depthattn report`: what it writes, how it goes on after an interruption, and one line for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from report_checkpoints import SIZES, save_both
from repository import ROOT
from tiny_checkpoints import edit_config, save_stock, save_tokenizer

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.cli.main import main
from hf_depthattn.eval.metrics.probing.results import DepthMetric
from hf_depthattn.eval.metrics.registry import DEPTH_METRICS
from hf_depthattn.eval.report import drawing
from hf_depthattn.eval.report import run as report_run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_both(tmp_path_factory.mktemp("report"))


@pytest.fixture
def report(capfd, monkeypatch, tmp_path, checkpoints):
    """Run `depthattn report` without the images, which take longest; exit code, stdout and the lines of stderr."""
    monkeypatch.setattr(drawing, "save_images", lambda figures, folder: {})
    model, _, text = checkpoints

    def run(*more, source=model, out=tmp_path / "out", text=text) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        options = ["--out", str(out), "--text", str(text), *SIZES, *map(str, more), "--no-progress"]
        code = main(["report", str(source), *options])
        stdout, stderr = capfd.readouterr()
        return code, stdout, stderr.splitlines()

    return run


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The metrics that are run, by name; `stop_at` as the first entry interrupts that one."""
    names: list[str] = []

    def counted(name: str, metric: DepthMetric) -> DepthMetric:
        def run(probe, text, **options):
            if names and names[0] == f"stop at {name}":
                raise KeyboardInterrupt
            names.append(name)
            return metric.run(probe, text, **options)

        return DepthMetric(run, metric.num_forwards, metric.is_cheap, metric.applies)

    monkeypatch.setattr(
        report_run, "DEPTH_METRICS", {name: counted(name, metric) for name, metric in DEPTH_METRICS.items()}
    )
    return names


def strict_json(path):
    """The content of a file that knows no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_report_json_says_what_was_measured_on_what(report, checkpoints, tmp_path):
    model, stock, text = checkpoints
    code, stdout, stderr = report("--compare", stock)
    assert code == 0 and f"report: {tmp_path / 'out' / 'report.html'}" in stdout
    assert [line.split(" metrics to measure, about ")[0] for line in stderr[1:]] == ["depth: 14", "stock: 11"]
    assert stderr[0] == "two models, one after the other: depth, then stock with its own estimate"
    content = strict_json(tmp_path / "out" / "report.json")
    assert content["text"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert content["text"]["name"] == "text.txt" and not content["full"]
    assert {"hf_depthattn", "torch", "transformers", "altair", "vl-convert-python"} <= content["versions"].keys()
    for part, source, family in (("model", model, "attn_res+moda"), ("compare", stock, "residual")):
        described = content[part]
        assert described["source"] == str(source) and described["info"]["family"] == family
        assert described["info"]["num_layers"] == 3 and described["info"]["num_key_value_heads"] == 2
        settings = described["settings"]
        assert (settings["num_sequences"], settings["sequence_length"], settings["dtype"]) == (4, 16, "float32")
        assert described["failed"] == {}
        assert described["metrics"].keys() == described["costs"].keys()
        for name, result in described["metrics"].items():
            assert DEPTH_METRICS[name].is_cheap
            assert result["text"]["sha256"] == settings["tokens_sha256"]
            cost = described["costs"][name]
            assert cost["num_forwards"] >= 1 and cost["seconds"] > 0 and cost["estimated_seconds"] > 0
    assert content["model"]["seeds"] == {"source_drop_old": 0}
    assert content["model"]["settings"]["tokens_sha256"] == content["compare"]["settings"]["tokens_sha256"]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_interrupted_report_goes_on(report, measured, tmp_path):
    measured.append("stop at logit_lens")
    code, _, stderr = report()
    assert code == 130 and stderr[-1] == "depthattn: interrupted; the same command continues the report"
    done = measured[1:]
    assert done[:3] == ["depth_weights", "depth_mixing", "slot_mass"] and "logit_lens" not in done
    assert not (tmp_path / "out" / "report.html").exists()
    measured.clear()
    code, _, stderr = report()
    assert code == 0 and stderr[0].startswith("depth: 6 of 14 metrics to measure")
    assert measured[0] == "logit_lens" and not set(measured) & set(done)
    names = strict_json(tmp_path / "out" / "report.json")["model"]["metrics"].keys()
    assert names == {*done, *measured}


def test_what_is_measured_is_not_measured_again(report, measured, checkpoints, monkeypatch):
    assert report()[0] == 0
    measured.clear()
    with monkeypatch.context() as patched:
        # A complete report needs no model.
        patched.setattr(report_run, "load_probe", lambda *arguments: pytest.fail("the model was loaded"))
        assert report()[0] == 0
        assert not measured
    assert report("--compare", checkpoints[1])[0] == 0
    assert len(measured) == 11
    measured.clear()
    assert report("--full")[0] == 0
    assert measured == ["jacobian_gap", "slot_drop", "source_drop_matrix", "causal_scores_sublayer", "permutation_all"]


@pytest.mark.slow
def test_a_killed_report_goes_on(checkpoints, tmp_path):
    model, _, text = checkpoints
    command = [
        sys.executable,
        "-m",
        "hf_depthattn.cli.main",
        "report",
        str(model),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--text", str(text), "--num-sequences", "4", "--sequence-length", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    stored = tmp_path / "out" / "metrics" / "model"
    deadline = time.monotonic() + 60
    while not (stored / "output_magnitude.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in stored.glob("*.json")}
    assert "output_magnitude.json" in before and not (tmp_path / "out" / "report.json").exists()
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    kept = {name: (stored / name).stat().st_mtime_ns for name in before if name not in ("settings.json", "about.json")}
    assert kept == {name: before[name] for name in kept}
    assert (tmp_path / "out" / "report.html").exists()


def test_a_metric_that_a_model_does_not_allow_is_named(report, monkeypatch, tmp_path):
    def fails(probe, text):
        raise RuntimeError("no such attention")

    line = DEPTH_METRICS["angular_distance"]
    broken = DepthMetric(fails, line.num_forwards, line.is_cheap, line.applies)
    monkeypatch.setattr(report_run, "DEPTH_METRICS", {**DEPTH_METRICS, "angular_distance": broken})
    code, _, stderr = report()
    assert code == 0 and "depth: angular_distance is omitted: no such attention" in stderr
    assert strict_json(tmp_path / "out" / "report.json")["model"]["failed"] == {
        "angular_distance": "no such attention"
    }
    assert "no such attention" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_report_with_other_settings_is_refused(report, checkpoints, tmp_path):
    assert report()[0] == 0
    for more, said in (
        (("--batch-size", "2"), "has batch_size 4, not 2"),
        (("--num-sequences", "5"), "has tokens_sha256 "),
        (("--dtype", "bfloat16"), "has dtype float32, not bfloat16"),
    ):
        code, stdout, stderr = report(*more)
        assert code == 2 and stdout == "" and len(stderr) == 1
        assert said in stderr[0] and stderr[0].endswith("choose another folder (--out), or --overwrite.")
    code, _, stderr = report(source=checkpoints[1])
    assert code == 2 and "whose model has fingerprint " in stderr[0]
    assert report("--batch-size", "2", "--overwrite")[0] == 0
    assert strict_json(tmp_path / "out" / "report.json")["model"]["settings"]["batch_size"] == 2


def test_mistakes_are_one_line(report, checkpoints, tmp_path):
    text = checkpoints[2]
    short, foreign = tmp_path / "short.txt", tmp_path / "foreign"
    short.write_text("Too short.")
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    no_layers = save_stock(tmp_path / "no_layers", num_hidden_layers=0)
    damaged = save_stock(tmp_path / "damaged")
    edit_config(damaged, intermediate_size=41)
    for arguments, said in (
        ({"text": tmp_path / "absent.txt"}, "absent.txt: No such file or directory."),
        ({"text": short}, "short.txt: text has 10 tokens, shorter than one window of 16."),
        ({"source": no_layers}, "has no decoder layers"),
        ({"source": tmp_path / "absent"}, "absent: no such folder."),
        ({"source": damaged}, "damaged: "),
        ({"out": foreign}, "foreign: is not empty and holds no report; choose another folder (--out)."),
        ({"out": text}, "text.txt: exists and is not a folder."),
        ({"more": ("--dtype", "float8")}, "--dtype float8: must be one of float32, bfloat16, float16."),
        ({"more": ("--num-sequences", "1")}, "--num-sequences 1: must be at least 2."),
        ({"more": ("--sequence-length", "129")}, "/depth, 128 tokens."),
        ({"more": ("--num-sequences", "900")}, "but the text has "),
        ({"more": ("--device", "nowhere")}, "device: 'nowhere' cannot be used"),
        ({"more": ("--compare", tmp_path / "absent")}, "absent: no such folder."),
    ):
        code, stdout, stderr = report(*arguments.pop("more", ()), **arguments)
        assert code == 2 and stdout == "" and len(stderr) == 1, (said, stderr)
        assert stderr[0].startswith("depthattn: error: ") and said in stderr[0], stderr
    assert (foreign / "notes.txt").read_text() == "mine" and len(list(foreign.iterdir())) == 1


def test_the_built_in_passage_is_read_without_a_text(capfd, monkeypatch, tmp_path, checkpoints):
    monkeypatch.setattr(drawing, "save_images", lambda figures, folder: {})
    assert main(["report", str(checkpoints[1]), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["page"] == str(tmp_path / "out" / "report.html")
    assert printed["summary"]["layers × width"] == {"stock": "3 × 32"}
    content = strict_json(tmp_path / "out" / "report.json")
    assert content["text"]["name"] == "built-in passage" and content["compare"] is None


def test_a_model_beside_itself_has_readable_names(report, checkpoints):
    code, stdout, _ = report("--compare", checkpoints[0])
    assert code == 0 and "depth (1)" in stdout and "//" not in stdout.splitlines()[0]


def test_an_adapter_is_measured_on_top_of_its_base(report, checkpoints, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_depthattn import lora_config
    from hf_depthattn.checkpoints.model_loading import load_model

    torch.manual_seed(5)
    base = load_model(checkpoints[0])
    adapted = peft.get_peft_model(base, lora_config(base, r=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    tuned, merged = tmp_path / "tuned", tmp_path / "merged"
    adapted.save_pretrained(tuned)
    adapted.merge_and_unload().save_pretrained(merged)
    save_tokenizer(merged)
    code, _, stderr = report("--peft", tuned, "--compare", merged)
    assert code == 0 and stderr[0].startswith("two models, one after the other: depth + tuned, then merged")
    content = strict_json(tmp_path / "out" / "report.json")
    assert content["model"]["peft"] == str(tuned) and content["compare"]["peft"] is None
    ours, theirs = (content[part]["metrics"]["logit_lens"]["cross_entropy"] for part in ("model", "compare"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    # Other numbers than without the adapter, and a report of its own.
    code, _, stderr = report()
    assert code == 2 and "has peft_fingerprint " in stderr[0]
    assert report(out=tmp_path / "plain")[0] == 0
    plain = strict_json(tmp_path / "plain" / "report.json")["model"]["metrics"]["logit_lens"]["cross_entropy"]
    assert abs(plain[-1] - ours[-1]) > 1e-3
    code, _, stderr = report("--peft", tuned, source=checkpoints[1], out=tmp_path / "other")
    assert code == 2 and "LlamaForCausalLM does not have" in stderr[-1]
    code, _, stderr = report("--peft", tmp_path / "nowhere", out=tmp_path / "other")
    assert code == 2 and len(stderr) == 1 and "no such folder" in stderr[0]
