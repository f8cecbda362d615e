"""A whole model on the Triton kernels, without a GPU."""

from kernel_scripts import needs_loops_in_interpreter, needs_triton, run_checks


@needs_triton
@needs_loops_in_interpreter
def test_a_model_trains_and_generates_on_interpreted_kernels(tmp_path):
    run_checks("kernel_model_checks.py", "training", "generation", tmp_path=tmp_path, TRITON_INTERPRET="1")
