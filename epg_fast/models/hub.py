"""The hub: what makes networks its models, files from a repository, and a folder into one.

huggingface_hub is imported here and for model cards alone. Without it networks are what they are, but for its base.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:
        """Stands in its place, and takes what it is told for a model card."""

        def __init_subclass__(cls, **card):
            super().__init_subclass__()


log = logging.getLogger("epg_fast")

_LOG_IN = "`hf auth login`, or pass token="


def require(what: str) -> None:
    """Raise ValueError, which says that `what` needs it, unless huggingface_hub is installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ValueError(f"{what} needs `pip install huggingface_hub`") from None


class Repository:
    """Files of a repository, downloaded as they are asked for; options: of `hf_hub_download`.

    `unreached`: why the hub cannot be reached, once that is so; only files that are here already are found then.
    """

    def __init__(self, name: str, options: dict):
        require(f"{name}: no such file or folder, and loading it from the hub")
        self.name, self.options = name, options
        self.unreached = ""

    def get(self, file: str) -> Path | None:
        """Local path of a file; None if there is none. Raises ValueError when the hub refuses."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, **self.options))
        except LocalEntryNotFoundError as error:
            self.unreached = self.unreached or _answer(error.__cause__ or error)
            self.options = {**self.options, "local_files_only": True}  # not to wait again for each file
        except EntryNotFoundError:
            pass
        except Exception as error:
            raise ValueError(f"{self.name}: no such file or folder, and {_answer(error)}") from None
        return None


def upload(
    repo: str,
    folder: str | os.PathLike,
    commit_message: str,
    private: bool | None,
    token: str | None,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """Upload the files of `folder` in one commit to a repository, which is made if need be; returns its URL.

    A README.md that the repository has stays as it is. Raises ValueError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        kept = ["README.md"] if api.file_exists(repo, "README.md", revision=branch) else []
        if kept:
            log.info("%s: its README.md stays as it is; remove it to have the model card of this upload", repo)
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            ignore_patterns=kept,
        )
    except Exception as error:
        raise ValueError(f"{repo}: nothing was pushed, {_answer(error)}") from None


def _answer(error: Exception) -> str:
    """What the hub said, and what to do about it."""
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"the hub gives it to those only who asked on its page; do, then {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or a private one; correct the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision of it; correct revision="
    if status in (401, 403):
        return f"the hub refused ({status}); {_LOG_IN} of an account that may"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, HfHubHTTPError | HFValidationError):
        return f"the hub refused: {reason}"
    return f"the hub cannot be reached ({reason.rstrip('.')}); try again later"
