"""Unknown flags are answered with `--set`, and messages of configs name options as the command line does."""

import argparse

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.cli.depth_arguments import add_depth_flags, add_set, assigned, given_flags
from hf_depthattn.cli.main import main
from hf_depthattn.cli.options import Parser
from hf_depthattn.cli.set_advice import options_as_flags, parse_with_advice
from hf_depthattn.depth_options import DEPTH_OPTIONS
from hf_depthattn.errors import UserError
from hf_depthattn.errors.messages import one_line

HOST_FIELDS = ("hidden_size", "num_hidden_layers")


def parse(*words: str) -> argparse.Namespace:
    parser = Parser(prog="script", allow_abbrev=False)
    add_depth_flags(parser)
    add_set(parser, "set any field")
    return parse_with_advice(parser, lambda args: HOST_FIELDS, words)


def config_of(*words: str) -> DepthAttnConfig:
    args = parse(*words)
    with options_as_flags():
        try:
            options = {**given_flags(args), **assigned(args.set, DEPTH_OPTIONS)}
            return DepthAttnConfig(text_config=tiny_host_config("llama"), **options)
        except StrictDataclassError as error:
            raise UserError(one_line(error)) from error


@pytest.mark.parametrize(
    "words, advice",
    [
        (["--norm-position", "post"], "--set norm_position=post"),
        (["--num-streams=2"], "--set num_streams=2"),
        (["--num_streams", "2", "--static-mix"], "--set num_streams=2 --set static_mix=VALUE"),
        (["--hidden-size", "64", "--layers", "3"], "--set hidden_size=64"),
        (["--num_blocks", "4"], "--num-blocks 4"),
    ],
)
def test_an_unknown_flag_with_the_name_of_a_field_is_answered_with_what_to_use(words, advice):
    with pytest.raises(UserError) as raised:
        parse("--connection", "residual", *words)
    assert str(raised.value) == f"unrecognized arguments: {' '.join(words)}; use {advice} (see script --help)"


def test_other_flags_get_no_advice():
    with pytest.raises(UserError, match=r"^unrecognized arguments: --layers=3 value \(see script --help\)$"):
        parse("--layers=3", "value")


def test_options_of_depth_attention_are_known_without_a_host():
    def no_host(args):
        raise UserError("host: is missing.")

    parser = Parser(prog="script")
    add_set(parser, "set any field")
    with pytest.raises(UserError, match="use --set num_streams=2"):
        parse_with_advice(parser, no_host, ["--num-streams", "2", "--hidden-size", "3"])


@pytest.mark.parametrize(
    "words, advice, followed",
    [
        ("--connection=deepnorm", "--set norm_position=post", "--connection deepnorm --set norm_position=post"),
        ("--connection=mhc_lite --set num_streams=5", "--connection mhc", "--connection mhc --set num_streams=5"),
        ("--set norm_position=post", "--connection residual", "--connection residual --set norm_position=post"),
        ("--connection=mhc --set num_streams=1", "--connection residual", "--connection residual"),
        ("--depth-kv=attention --set depth_slots=[[],[],[]]", "--set depth_kv=null", "--set depth_kv=null"),
    ],
)
def test_what_a_message_says_to_use_can_be_typed(words, advice, followed):
    with pytest.raises(UserError, match=f" use {advice}[. ]"):
        config_of(*words.split())
    config_of(*followed.split())


def test_values_are_those_of_json_and_other_names_stay():
    message = "static_mix=True, depth_kv=None, clip_qkv=8.0, depth_norm_eps=1e-6. query='input'"
    with pytest.raises(UserError) as raised, options_as_flags():
        raise UserError(message)
    expected = "--set static_mix=true, --set depth_kv=null, clip_qkv=8.0, --set depth_norm_eps=1e-6. --set query=input"
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    "command, answer",
    [
        ("retrofit SOURCE OUT --depth-norm-eps 1e-6", "--depth-norm-eps 1e-6; use --set depth_norm_eps=1e-6"),
        ("retrofit SOURCE OUT --hidden-size 64", "--hidden-size 64"),
        ("verify SOURCE OUT --depth-norm-eps 1e-6", "--depth-norm-eps 1e-6"),
    ],
)
def test_only_commands_that_can_set_options_advise_it(command, answer, capsys):
    assert main(command.split()) == 2
    assert f"unrecognized arguments: {answer} (see" in capsys.readouterr().err
