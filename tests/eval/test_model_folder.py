"""The fingerprint of a checkpoint."""

from __future__ import annotations

from hf_depthattn.eval.model_folder import fingerprint


def test_fingerprint_follows_config_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xy")
    seen = {first, second, fingerprint(tmp_path)}
    # A checkpoint's own code, and an adapter in the older format.
    for name in ("modeling_x.py", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"x")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 5
