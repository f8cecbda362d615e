"""Upload a checkpoint folder to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from ..errors.messages import user_error


def full_repository_id(repository: str) -> str:
    """Return `owner/name` of a repository, after checking that there is a valid token.

    Args:
        repository: the id; without an owner, that of the token is added.

    Raises:
        UserError: if the id is not valid, there is no valid token, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to: {repository!r} is not the id of a repository, NAME or OWNER/NAME.") from error
    with _hub_errors(f"push_to: {repository}: cannot upload"):
        owner = HfApi().whoami()["name"]
    return repository if "/" in repository else f"{owner}/{repository}"


def upload_checkpoint(folder: Path, repository: str, *, message: str, private: bool | None) -> str:
    """Upload all files of a folder to a model repository in one commit, which deletes other weights there.

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
    with _hub_errors(f"{folder}: is complete, but was not uploaded to {repository}"):
        url = HfApi().create_repo(repository, private=private, exist_ok=True)
        # transformers would load an older model.safetensors rather than shards with an index.
        HfApi().upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=message, delete_patterns="*.safetensors*"
        )
    return str(url)


@contextmanager
def _hub_errors(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # huggingface_hub has several kinds of errors for requests, tokens and connections.
        reason = user_error(error)
        if reason is None:
            raise
        raise UserError(f"{problem}: {reason}") from error
