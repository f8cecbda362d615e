"""Importing this skips a test file where torch has an older interface of pipeline stages, which is refused."""

import pytest
from torch.distributed.pipelining import PipelineStage

if not hasattr(PipelineStage, "_compute_input_grads"):
    pytest.skip("torch has an older interface of pipeline stages", allow_module_level=True)
