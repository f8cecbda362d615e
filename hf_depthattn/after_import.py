"""Run a function when a module is imported: to register with other libraries without importing them, which is slow."""

# Only `sys.modules` and `sys.meta_path` tell what has been imported and what is being imported.
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def call_after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function as soon as a module has been imported: immediately if it already is.

    Args:
        name: name of the module.
        function: the function to call. A later function of the same name for the same module replaces it, so that
            repeated calls of `call_after_import`, or a second copy of this code, register it only once.
    """
    if name in sys.modules:
        function()
        return
    for finder in list(sys.meta_path):
        if getattr(finder, "depthattn_call", None) == (name, function.__name__):
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _CallAfterImport(name, function))


class _CallAfterImport:
    """A meta path finder for one module that calls a function after the module's code and then removes itself."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name = name
        self.function = function
        self.depthattn_call = (name, function.__name__)
        self._is_searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the usual spec of the module, with the call added after the execution of its code."""
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
            # Removed here and not in `find_spec`: a caller may ask for the spec without importing the module.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.function()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
