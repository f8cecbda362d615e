"""Read the config of a checkpoint field by field, so that no field is overlooked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...errors import UserError
from ...errors.messages import one_line

# Fields of every config of transformers, present and past; none changes what a model computes.
_OF_EVERY_CONFIG = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Fields of rotary embeddings before transformers 5, which config classes still read.
_OLD_ROPE = ("rope_theta", "rope_scaling")


class ConfigFields:
    """The fields of a config; `finish` raises if one that has a value was not read.

    Args:
        folder: the checkpoint, for messages.
        values: the fields.
        path: names of the parts that contain these fields, with a dot after each.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], path: str = ""):
        self.folder = folder
        self.path = path
        self._values = values
        self._read: set[str] = {name for name in values if name.startswith("_")}

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field; the default if it is missing or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def value(self, name: str, default: Any) -> Any:
        """Return the value of a field, which may be null; the default if it is missing."""
        self._read.add(name)
        return self._values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            UserError: if it is something else, or missing without a default.
        """
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number.

        Raises:
            UserError: if it is something else, or missing without a default.
        """
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def part(self, name: str) -> ConfigFields:
        """Return the fields of a part; without fields if it is missing or null.

        Raises:
            UserError: if it is something else than a part.
        """
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return ConfigFields(self.folder, value, f"{self.path}{name}.")

    def items(self) -> list[tuple[str, Any]]:
        """Return all names and values, as read."""
        self._read.update(self._values)
        return list(self._values.items())

    def only(self, name: str, *allowed: Any) -> None:
        """Check that a field has one of these values, or none.

        Raises:
            UserError: if it has another one.
        """
        value = self.get(name)
        if value is not None and value not in allowed:
            shown = " or ".join(map(repr, allowed)) or "null"
            raise self.error(name, value, shown)

    def ignore(self, *names: str) -> None:
        """Note fields that do not change what a model computes."""
        self._read.update(names)

    def ignore_fields_of_every_config(self) -> None:
        """Note the fields that every config of transformers has."""
        self._read |= _OF_EVERY_CONFIG

    def finish(self) -> None:
        """Check that every field that has a value was read.

        Raises:
            UserError: if one was not; a field of a newer version may change what the model computes.
        """
        for name, value in self._values.items():
            if name not in self._read and value not in (None, False):
                raise UserError(
                    f"{self.folder}: {self.path}{name}={value!r} in config.json cannot be imported: no supported "
                    "host has it, or it is not known here what it does."
                )

    def error(self, name: str, value: Any, allowed: str) -> UserError:
        """Return the error for a field that has another value than those that can be imported."""
        return UserError(
            f"{self.folder}: {self.path}{name} is {value!r} in config.json; it can only be imported with {allowed}."
        )

    def host(self, model_type: str, *more: str) -> PreTrainedConfig:
        """Return the config of a host of transformers from the fields that its class has.

        Args:
            model_type: the host's model type.
            *more: fields that the class reads without declaring them.

        Raises:
            UserError: if the installed transformers has no such host, or it does not accept the values.
        """
        config_class = host_config_class(self.folder, model_type)
        other_names: Mapping[str, str] = getattr(config_class, "attribute_map", {})
        names = {field.name for field in dataclasses.fields(config_class)}
        names |= {*other_names, *other_names.values(), *_OLD_ROPE, *more}
        own = {
            name: value
            for name, value in self._values.items()
            if name in names and name not in self._read and name not in ("auto_map", "architectures", "model_type")
        }
        self._read |= own.keys()
        return build_host(self.folder, model_type, own)


def host_config_class(folder: Path, model_type: str) -> Any:
    """Return the config class of a host.

    Args:
        folder: the checkpoint, for messages.
        model_type: the host's model type.

    Raises:
        UserError: if the installed transformers has no such host.
    """
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{folder}: needs the host {model_type!r}, which the installed transformers does not have.")
    return CONFIG_MAPPING[model_type]


def build_host(folder: Path, model_type: str, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of a host.

    Args:
        folder: the checkpoint, for messages.
        model_type: the host's model type.
        fields: its fields.

    Raises:
        UserError: if the installed transformers has no such host, or it does not accept the values.
    """
    config_class = host_config_class(folder, model_type)
    try:
        config: PreTrainedConfig = config_class(**fields)
    except Exception as error:
        # transformers, huggingface_hub and the model's config class each raise errors of their own.
        raise UserError(f"{folder}: {one_line(error)}") from error
    return config
