"""transformers' common model tests on the classes of this package (README.md beside this file).

Host: a tiny Llama of the sizes that upstream's own testers use.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import unittest
from unittest import mock

import pytest

HOME = os.environ.get("DEPTHATTN_UPSTREAM_TESTS")
if not HOME:
    pytest.skip("run them with `make test-upstream`, which fetches transformers' tests", allow_module_level=True)
# Also the path of the processes that the distributed tests start.
sys.path.insert(0, HOME)

import torch
from transformers import LlamaConfig
from transformers.testing_utils import torch_device
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForQuestionAnswering,
    DepthAttnForSequenceClassification,
    DepthAttnForTokenClassification,
    DepthAttnModel,
)

# The distributed tests run for listed model types only.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add(DepthAttnConfig.model_type)
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES.add(DepthAttnConfig.model_type)


class DepthAttnModelTester:
    """Sizes, config and inputs, under the names by which the mixins ask for them."""

    base_model_class = DepthAttnModel
    causal_lm_class = DepthAttnForCausalLM
    config_class = DepthAttnConfig
    all_model_classes = (
        DepthAttnModel,
        DepthAttnForCausalLM,
        DepthAttnForSequenceClassification,
        DepthAttnForTokenClassification,
        DepthAttnForQuestionAnswering,
    )

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 37
    num_hidden_layers = 2
    num_attention_heads = 2
    num_key_value_heads = 2
    head_dim = hidden_size // num_attention_heads
    max_position_embeddings = 512
    num_labels = 3
    type_sequence_label_size = 2
    pad_token_id = 0

    def __init__(self, parent: unittest.TestCase, connection_kwargs: dict):
        self.parent = parent
        self.connection_kwargs = connection_kwargs

    def get_host_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
            attention_dropout=0.0,
        )

    def get_config(self) -> DepthAttnConfig:
        return DepthAttnConfig(text_config=self.get_host_config(), **self.connection_kwargs)

    def prepare_config_and_inputs_for_common(self) -> tuple[DepthAttnConfig, dict]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.tril(torch.ones_like(input_ids).to(torch_device))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class DepthAttnUpstreamTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
    unittest.TestCase,
):
    """Block AttnRes as in the paper."""

    model_tester = None
    connection_kwargs = {"connection": "attn_res", "num_blocks": 2, "read_scale": "mean"}
    all_model_classes = DepthAttnModelTester.all_model_classes
    _torch_compile_train_cls = DepthAttnForCausalLM

    def setUp(self):
        self.model_tester = DepthAttnModelTester(self, self.connection_kwargs)
        # As it stands in a config.json: one of the tests compares the two.
        host = json.loads(self.model_tester.get_config().to_json_string())["text_config"]
        self.config_tester = ConfigTester(
            self,
            config_class=DepthAttnConfig,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
            text_config=host,
        )

    def test_config(self):
        # A saved config refers to the code beside it, which a config in memory does not.
        def without_code(config: DepthAttnConfig) -> dict:
            return {name: value for name, value in to_dict(config).items() if name != "auto_map"}

        to_dict = DepthAttnConfig.to_dict
        with mock.patch.object(DepthAttnConfig, "to_dict", without_code):
            # A host must be given, so that the config cannot be built without arguments.
            self.config_tester.run_common_tests(can_init_without_params=False)

    def test_model_main_input_name(self):
        # Upstream asks the class, whose forward is that of the host, which is known when a model is built.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertEqual(next(iter(inspect.signature(model.forward).parameters)), model_class.main_input_name)

    @unittest.skip("The list is of what any of our models may have; the sites of a connection or gates may be absent.")
    def test_keep_in_fp32_modules_exist(self):
        pass

    @unittest.skip(
        "Quantisers leave out what is in this list; MoDA's projections are in it and have the model's dtype."
    )
    def test_keep_in_fp32_modules(self):
        pass

    @unittest.skip("Names of older versions are read and never written, so no name in a model matches them.")
    def test_reverse_loading_mapping(self):
        pass

    def test_base_model_forward(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = DepthAttnModel(config).to(torch_device).eval()
        result = model(inputs["input_ids"])
        expected = (self.model_tester.batch_size, self.model_tester.seq_length, self.model_tester.hidden_size)
        self.assertEqual(result.last_hidden_state.shape, expected)

    def test_head_shapes(self):
        batch_size, seq_length = self.model_tester.batch_size, self.model_tester.seq_length
        for model_class, shapes in (
            (DepthAttnForSequenceClassification, {"logits": (batch_size, 3)}),
            (DepthAttnForTokenClassification, {"logits": (batch_size, seq_length, 3)}),
            (
                DepthAttnForQuestionAnswering,
                {"start_logits": (batch_size, seq_length), "end_logits": (batch_size, seq_length)},
            ),
        ):
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.num_labels = 3
            model = model_class(config).to(torch_device).eval()
            result = model(inputs["input_ids"], attention_mask=inputs["input_ids"].ne(1).to(torch_device))
            for name, shape in shapes.items():
                self.assertEqual(result[name].shape, shape, f"{model_class.__name__}: {name}")


# Whether a model has experts depends on its host, which these tests ask of the class; this host has none.
for _name in [name for name in dir(ModelTesterMixin) if name.startswith("test_eager_matches_batched_and_grouped")]:
    setattr(DepthAttnUpstreamTest, _name, unittest.skip("The host of these tests has no experts.")(lambda self: None))


class MoDAUpstreamTest(DepthAttnUpstreamTest):
    """MoDA alone, as in the paper."""

    connection_kwargs = {"connection": "residual", "depth_kv": "attention+mlp"}


class MoDAWithAttnResUpstreamTest(DepthAttnUpstreamTest):
    """Both mechanisms, with the gate of retrofitted checkpoints."""

    connection_kwargs = {
        "connection": "attn_res",
        "num_blocks": 2,
        "read_scale": "sum",
        "depth_kv": "attention+mlp",
        "depth_gate": "head",
    }
