"""`--compare` of two perplexity runs: paired differences against direct computations, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from damaged_checkpoints import edit_tensors
from tiny_checkpoints import save_stock

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.compare import compare_results
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT
from hf_depthattn.utils.result_files import json_text


def document(nats: float, tokens: int, num_bytes: int, pieces=()) -> dict:
    return {"nats": nats, "tokens": tokens, "bytes": num_bytes, "pieces": list(pieces)}


def save_report(path: Path, domains: dict[str, list[dict]], *, window: int = 64, sha256: str = "x") -> Path:
    values = {}
    for name, documents in domains.items():
        nats, tokens, num_bytes = (sum(d[what] for d in documents) for what in ("nats", "tokens", "bytes"))
        means = {
            "perplexity": 1.0,
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "loss_nats_per_token": nats / tokens,
        }
        counts = {"num_tokens": tokens, "num_bytes": num_bytes, "num_documents": len(documents)}
        others = {"num_skipped_documents": 0, "num_documents_without_loss": 0, "sha256": sha256}
        values[name] = {**means, **counts, **others, "documents": documents}
    report = {"settings": {"window": window, "stride": 32}, "domains": values, "mean": {}}
    path.write_text(json_text(report))
    return path


def test_documents_are_paired(tmp_path):
    nats_a, nats_b, tokens, num_bytes = [30.0, 41.0, 22.0], [29.0, 40.5, 22.5], [10, 13, 7], [41, 50, 30]
    runs = [
        save_report(tmp_path / name, {"web": list(map(document, nats, tokens, num_bytes))})
        for name, nats in (("a.json", nats_a), ("b.json", nats_b))
    ]
    comparison = compare_results(*runs)
    bits, loss = comparison.rows
    assert (bits.metric, bits.items, bits.num_items) == ("bits_per_byte", "documents", 3)
    assert (loss.metric, loss.items, loss.num_items) == ("nats_per_token", "documents", 3)
    assert (loss.value_a, loss.value_b) == pytest.approx((93 / 30, 92 / 30))
    for row, weights, unit in ((loss, tokens, 1.0), (bits, num_bytes, math.log(2))):
        ratio = -1.0 / sum(weights)
        assert row.difference == pytest.approx(ratio / unit)
        residuals = [b - a - ratio * w for a, b, w in zip(nats_a, nats_b, weights, strict=True)]
        error = math.sqrt(1.5 * sum(r * r for r in residuals)) / sum(weights) / unit
        assert row.standard_error == pytest.approx(error)
    assert comparison.mean == () and "3 documents" in str(comparison)


def test_equal_documents_give_the_error_of_a_mean(tmp_path):
    differences = [0.5, -0.25, 1.0, 0.0]
    runs = [
        save_report(tmp_path / f"{k}.json", {"d": [document(40 + k * x, 10, 50) for x in differences]}) for k in (0, 1)
    ]
    row = next(row for row in compare_results(*runs).rows if row.metric == "nats_per_token")
    assert row.difference == pytest.approx(statistics.mean(differences) / 10)
    assert row.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(4) / 10)


def test_one_document_is_paired_by_its_pieces(tmp_path):
    pieces = [[[30.0, 10], [41.0, 10], [10.0, 4]], [[29.0, 10], [41.0, 10], [11.0, 4]]]
    runs = [save_report(tmp_path / f"{k}.json", {"book": [document(81.0, 24, 100, pieces[k])]}) for k in (0, 1)]
    comparison = compare_results(*runs)
    assert {(row.items, row.num_items) for row in comparison.rows} == {("pieces", 3)}
    assert all(row.standard_error > 0 for row in comparison.rows) and "a lower bound" in str(comparison)
    # Another tokenizer: no pieces, no nats per token, and no error for a single item.
    other = save_report(tmp_path / "other.json", {"book": [document(80.0, 20, 100, [[50.0, 10], [30.0, 10]])]})
    (row,) = compare_results(runs[0], other).rows
    assert (row.metric, row.items, row.num_items) == ("bits_per_byte", "documents", 1)
    assert math.isnan(row.standard_error) and "-" in str(compare_results(runs[0], other))
    assert json.loads(json_text(compare_results(runs[0], other).to_dict()))["rows"][0]["standard_error"] is None


def test_domains_have_a_plain_mean(tmp_path):
    domains = [
        {
            "web": [document(30 + k, 10, 40), document(30, 10, 40)],
            "code": [document(20, 5, 20), document(22 - k, 5, 20)],
        }
        for k in (0, 1)
    ]
    runs = [save_report(tmp_path / f"{k}.json", domains[k]) for k in (0, 1)]
    comparison = compare_results(*runs)
    bits, _ = comparison.mean
    rows = [row for row in comparison.rows if row.metric == "bits_per_byte"]
    assert (bits.domain, bits.num_items) == ("mean of the domains", 2)
    assert bits.difference == pytest.approx(statistics.mean(row.difference for row in rows))
    assert bits.standard_error == pytest.approx(math.hypot(*(row.standard_error for row in rows)) / 2)


def test_a_document_without_a_loss_makes_no_number(tmp_path):
    runs = [
        save_report(tmp_path / f"{k}.json", {"d": [document(x, 10, 50), document(40.0, 10, 50)]})
        for k, x in enumerate((40.0, math.nan))
    ]
    row = compare_results(*runs).rows[0]
    assert math.isnan(row.difference) and math.isnan(row.standard_error) and "nan" in str(compare_results(*runs))


def test_what_cannot_be_paired_is_refused(tmp_path):
    good = save_report(tmp_path / "good.json", {"d": [document(40.0, 10, 50)]})
    other_text = save_report(tmp_path / "text.json", {"d": [document(40.0, 10, 50)]}, sha256="y")
    other_domain = save_report(tmp_path / "domain.json", {"e": [document(40.0, 10, 50)]})
    old = json.loads(good.read_text())
    del old["domains"]["d"]["documents"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "results_1.json").write_text("{}")
    for run, message in {
        other_text: "d: .* scored different texts under this name",
        other_domain: "no domain in common",
        tmp_path / "old.json": r"old.json: contains no per-document losses; score it again \(--overwrite\)",
        tmp_path / "config.json": "config.json: is not a result file of --perplexity",
        tasks: r"good.json: is a run of --perplexity, .*tasks is not",
        tmp_path / "nowhere": "nowhere: no such folder or file",
    }.items():
        with pytest.raises(UserError, match=message):
            compare_results(good, run)


def test_other_contexts_are_named(tmp_path):
    runs = [save_report(tmp_path / f"{w}.json", {"d": [document(40.0, 10, 50)]}, window=w) for w in (64, 128)]
    assert "A has window 64, B 128." in str(compare_results(*runs))
    assert "A has" not in str(compare_results(runs[0], runs[0]))


def test_runs_of_the_command_are_compared(command):
    save_stock(Path("other"))
    edit_tensors(Path("other"), lambda t: t["lm_head.weight"].mul_(1.5))
    Path("texts").mkdir()
    for number in range(3):
        Path("texts", f"{number}.txt").write_text(DEFAULT_TEXT[300 * number : 300 * (number + 1)])
    for model in ("model", "other"):
        arguments = ["--perplexity", "text.txt", "texts", "--window", 32, "--out", f"of {model}"]
        assert command(model, *arguments)[0] == 0
    code, printed, errors = command("--compare", "of model", "of other")
    assert (code, errors) == (0, [])
    assert "700 " not in printed and "3 documents" in printed and "22 pieces" in printed
    code, printed, _ = command("--compare", "of model", "of other", "--json")
    comparison = json.loads(printed)
    reports = [json.loads(Path(f"of {model}", "perplexity.json").read_text()) for model in ("model", "other")]
    for row in comparison["rows"]:
        name = {"nats_per_token": "loss_nats_per_token"}.get(row["metric"], row["metric"])
        before, after = (report["domains"][row["domain"]][name] for report in reports)
        assert (row["value_a"], row["value_b"]) == pytest.approx((before, after))
        assert row["difference"] == pytest.approx(after - before) and row["standard_error"] > 0
    means = [report["mean"]["bits_per_byte"] for report in reports]
    assert comparison["mean"][0]["difference"] == pytest.approx(means[1] - means[0])
    rows = json.loads(command("--compare", "of model", "of model", "--json")[1])["rows"]
    assert {(row["difference"], row["standard_error"]) for row in rows} == {(0.0, 0.0)}
