# Markers that transformers' tests carry; ours are strict about names.
MARKERS = (
    "accelerate_tests",
    "executorch_export_test",
    "expert_parallel_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "fsdp_test",
    "generate",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "onnx_export_test",
    "openvino_export_test",
    "tensor_parallel_test",
    "timeout",
    "torch_compile_test",
    "torch_export_test",
    "training_test",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' tests")
