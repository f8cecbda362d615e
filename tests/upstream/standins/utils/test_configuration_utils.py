"""Stands in for tests of transformers that its source distribution lacks."""

#: Arguments that every config takes.
config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "problem_type": "regression"}
