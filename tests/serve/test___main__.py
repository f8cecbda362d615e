"""`python -m hf_depthattn.serve`, driven by OpenAI's client: chat, streaming and completions."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from model_checks import randomise_depth
from processes import run_python
from repository import ROOT
from tiny_checkpoints import load, save_tokenizer
from tiny_hosts import tiny_host_config
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.errors import UserError
from hf_depthattn.serve.__main__ import run

needs_server = pytest.mark.skipif(not is_serve_available(), reason="pip install 'hf-depthattn[serve]'")
# Messages, and the answer in the form of a message: without special tokens, as they are not in the text.
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
PROMPT = "once upon a time"
MESSAGES = [{"role": "user", "content": PROMPT}]
NUM_TOKENS = 8
GREEDY = {"temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    fields = {"num_blocks": 2, "depth_kv": "attention+mlp", "depth_gate": "head"}
    model = DepthAttnForCausalLM(DepthAttnConfig.attn_res(tiny_host_config("llama"), **fields))
    randomise_depth(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory) -> Iterator:
    openai = pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_depthattn.serve", checkpoint, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen([*command, "--device", "cpu"], env=environment, stderr=output) as server,
    ):
        try:
            while not is_ready(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.1)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()


def is_ready(address: str) -> bool:
    try:
        with urlopen(address, timeout=60) as answer:
            return answer.status == 200
    except URLError:
        return False


def generated(checkpoint: str, prompt: str, **options) -> str:
    """What `generate` answers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = load(checkpoint).generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@needs_server
def test_completions_are_those_of_generate(client, checkpoint):
    completion = client.completions.create(model=checkpoint, prompt=PROMPT, max_tokens=NUM_TOKENS, **GREEDY)
    assert completion.choices[0].text == generated(checkpoint, PROMPT)
    assert completion.usage.completion_tokens == NUM_TOKENS


@needs_server
def test_chat_answers_the_prompt_of_the_template(client, checkpoint):
    answer = client.chat.completions.create(model=checkpoint, messages=MESSAGES, max_tokens=NUM_TOKENS, **GREEDY)
    expected = generated(checkpoint, f"user: {PROMPT}\nassistant: ")
    assert answer.choices[0].message.content == expected != ""


@needs_server
def test_a_stream_is_the_answer_in_pieces(client, checkpoint):
    pieces = client.chat.completions.create(
        model=checkpoint, messages=MESSAGES, max_tokens=NUM_TOKENS, stream=True, **GREEDY
    )
    texts = [text for piece in pieces for choice in piece.choices if (text := choice.delta.content)]
    assert len(texts) > 1
    assert "".join(texts) == generated(checkpoint, f"user: {PROMPT}\nassistant: ")


@needs_server
@pytest.mark.parametrize("arguments", [["./nowhere"], ["--port", "1", "./nowhere"]], ids=["first", "after an option"])
def test_a_folder_that_does_not_exist_is_named(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    with pytest.raises(UserError, match=r"\./nowhere: no such folder"):
        run()


@pytest.mark.skipif(is_serve_available(), reason="the packages of the server are installed")
def test_missing_packages_are_named(tmp_path):
    result = run_python("-m", "hf_depthattn.serve", cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 2
    assert "pip install 'hf-depthattn[serve]'" in result.stderr
