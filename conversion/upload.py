"""Upload a checkpoint folder to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.carried_files import EVAL_RESULTS_FOLDER
from ..errors import UserError
from ..errors.messages import user_error

#: Files of a repository that would belong to other weights: transformers would load an older model.safetensors rather
#: than shards with an index, and would take a checkpoint with the config of an adapter for that adapter.
REPLACED = ("*.safetensors*", "adapter_config.json", f"{EVAL_RESULTS_FOLDER}/*")


def full_repository_id(repository: str, *, private: bool | None = None) -> str:
    """Return `owner/name` of a repository, after checking that there is a valid token.

    Args:
        repository: the id; without an owner, that of the token is added.
        private: whether the upload must not be public.

    Raises:
        UserError: if the id is not valid, there is no valid token, the Hub cannot be reached, or the repository is
            public although `private` is true.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to: {repository!r} is not the id of a repository, NAME or OWNER/NAME.") from error
    with _hub_errors(f"push_to: {repository}: cannot upload"):
        owner = HfApi().whoami()["name"]
        full = repository if "/" in repository else f"{owner}/{repository}"
        is_public = bool(private) and _is_public(full)
    if is_public:
        raise UserError(
            f"private: {full} exists and is public; make it private on the Hub, name another repository, or push "
            "without `private` (--private)."
        )
    return full


def upload_checkpoint(folder: Path, repository: str, *, message: str, private: bool | None) -> str:
    """Upload all files of a folder to a model repository, and delete `REPLACED` files that are not in the folder.

    huggingface_hub makes one commit, but several for a long upload with the Xet protocol: until the last of them, the
    repository is not complete.

    Args:
        folder: the checkpoint.
        repository: the id of the repository, which is created if necessary.
        message: title of the commit.
        private: whether a new repository is private; `None` leaves it to the Hub.

    Returns:
        The address of the repository.

    Raises:
        UserError: if the upload fails.
    """
    again = upload_command(str(folder), repository, private=private)
    with _hub_errors(f"{folder}: is complete, but was not uploaded to {repository}", f" To upload it: {again}"):
        url = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=message, delete_patterns=list(REPLACED)
        )
    return str(url)


def upload_command(folder: str, repository: str, *, private: bool | None) -> str:
    """Return the command of huggingface_hub that does what `upload_checkpoint` does.

    Args:
        folder: the checkpoint.
        repository: the id of the repository.
        private: whether a new repository is private.
    """
    deletions = [word for pattern in REPLACED for word in ("--delete", pattern)]
    return shlex.join(["hf", "upload", repository, folder, ".", *deletions, *(["--private"] if private else ())])


def _is_public(repository: str) -> bool:
    try:
        return not HfApi().model_info(repository).private
    except RepositoryNotFoundError:
        return False


@contextmanager
def _hub_errors(problem: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # huggingface_hub has several kinds of errors for requests, tokens and connections.
        reason = user_error(error)
        if reason is None:
            raise
        raise UserError(f"{problem}: {reason.rstrip('.')}.{advice}") from error
