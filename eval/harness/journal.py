"""Journal of model responses, from which an interrupted run resumes.

lm-eval's own cache stores pickles in SQLite under a key that does not identify the model. Here each line of JSON
stores one response, and the file belongs to one run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ResponseJournal:
    """File with one JSON line `[key, response]` per request.

    Args:
        path: the file, created if it does not exist. An incomplete last line, as left by a killed process, is removed.
    """

    def __init__(self, path: Path) -> None:
        self._responses: dict[str, Any] = {}
        num_valid_bytes = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        key, response = json.loads(line)
                        response = _decoded(response)
                    except (ValueError, TypeError, KeyError):
                        break
                    if not line.endswith(b"\n"):
                        break
                    self._responses[key] = response
                    num_valid_bytes += len(line)
            os.truncate(path, num_valid_bytes)
        self.num_loaded = len(self._responses)
        #: Called after each added response.
        self.on_response: Callable[[], object] | None = None
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def get(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Return the response to a request, or None if it is not stored yet."""
        response = self._responses.get(_key(method, arguments))
        return tuple(response) if isinstance(response, list) else response

    def add_partial(self, method: str, arguments: tuple[Any, ...], response: Any) -> None:
        """Append a response. lm-eval's models call their cache hook by this name."""
        if self.on_response is not None:
            self.on_response()
        key = _key(method, arguments)
        if key in self._responses:
            return
        self._responses[key] = response
        with self._named_errors():
            self._file.write(json.dumps([key, _encoded(response)], allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._named_errors():
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Add the file name to write errors such as a full disk, which lack it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error


def _encoded(response: Any) -> Any:
    """Encode a response as JSON, which has no NaN or infinity for the log-likelihoods of a diverged model."""
    if isinstance(response, float) and not math.isfinite(response):
        return {"number": str(response)}
    return [_encoded(part) for part in response] if isinstance(response, list | tuple) else response


def _decoded(response: Any) -> Any:
    if isinstance(response, dict):
        return float(response["number"])
    return [_decoded(part) for part in response] if isinstance(response, list) else response


def answered(
    journal: ResponseJournal,
    method: str,
    run: Callable[[list[Any]], list[Any]],
    requests: list[Any],
    progress: bool | None = False,
) -> list[Any]:
    """Return the responses to requests, from the journal where available and otherwise from the model.

    Args:
        journal: stored responses.
        method: kind of request, i.e. the name of a method of lm-eval's models.
        run: that method; it adds finished responses to the journal itself (`add_partial`).
        requests: objects with `args`.
        progress: as in `utils.progress.progress_bar`.
    """
    # Sampled texts are always generated again: repeats of a request must be independent samples.
    missing = [r for r in requests if _is_sampled(method, r) or journal.get(method, r.args) is None]
    fresh = iter(_run_with_progress(journal, method, run, missing, progress) if missing else [])
    is_missing = {id(request) for request in missing}
    return [next(fresh) if id(r) in is_missing else journal.get(method, r.args) for r in requests]


def _run_with_progress(
    journal: ResponseJournal,
    method: str,
    run: Callable[[list[Any]], list[Any]],
    requests: list[Any],
    progress: bool | None,
) -> list[Any]:
    from ...utils.progress import progress_bar

    with progress_bar(len(requests), method, progress, unit="requests") as bar:
        journal.on_response = bar.update
        try:
            return run(requests)
        finally:
            journal.on_response = None


def _is_sampled(method: str, request: Any) -> bool:
    return method == "generate_until" and bool(request.args[1].get("do_sample"))


def _key(method: str, arguments: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([method, *arguments], default=str).encode()).hexdigest()[:32]
