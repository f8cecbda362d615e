"""A call when a module is imported, for tables of other libraries: importing those for an entry would cost seconds."""

# `sys.modules` and `sys.meta_path` are the only places that tell what has been imported, and when something is.
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def call_after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function once a module has been imported, which is now if it is already.

    Args:
        name: the module.
        function: what to call. A second function of the same name for the same module replaces the first, so that
            repeating this call, or loading this code twice, leaves one.
    """
    if name in sys.modules:
        function()
        return
    for finder in list(sys.meta_path):
        if getattr(finder, "depthattn_call", None) == (name, function.__name__):
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _CallAfterImport(name, function))


class _CallAfterImport:
    """Finds one module as others do, with a call behind its code, and is gone then."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name = name
        self.function = function
        self.depthattn_call = (name, function.__name__)
        self._is_searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The usual spec of the module, with the call behind the execution of its code."""
        if name != self.name or self._is_searching:
            return None
        self._is_searching = True
        try:
            spec = find_spec(name)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: Any) -> None:
            execute(module)
            # Not sooner: who only asks for the spec does not import.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.function()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign] # of this one loader
        return spec
