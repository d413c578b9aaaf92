"""One way to the Hub for adapters, discriminators and datasets, and one set of words for what can go wrong on it."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id


logger = logging.getLogger(__name__)

# The client repeats single requests, for half a minute, but neither the commit nor the creation of a repository.
# Repeating the whole costs little: what has arrived is not sent again.
ATTEMPTS = 3
WAIT = 2.0  # seconds before the second attempt, doubled before the third

# httpx's error, of whichever httpx the client is built on; also of connections that break
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

Result = TypeVar("Result")


def check_repo_id(option: str, repo_id: str | None) -> None:
    """Refuse what can't be the name of a repository."""
    if repo_id is None:
        return
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"`{option}` is {repo_id!r}, expected user/name: {error}") from error


def hub_id(name: str | None) -> str | None:
    """`name` where it can be that of a model or a dataset on the Hub, None for a path or a name of this package."""
    if not name or Path(name).exists() or name.count("/") != 1:
        return None
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def check_login(token: str | None = None) -> str:
    """
    The name of the account that uploads, asked of the Hub.

    Raises:
        `ValueError`: if nobody is logged in, or the Hub doesn't know the token.
    """
    try:
        return repeated(lambda: HfApi().whoami(token=token)["name"])
    except (HTTPError, OSError) as error:
        cause, remedy = _cause(error, "hub_model_id")
        raise ValueError(f"Nothing was pushed: {_without_token(cause, token)}. {remedy}.") from error


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    allow_patterns: Sequence[str],
    delete_patterns: Sequence[str] | None = None,
    repo_type: str = "model",
    option: str = "hub_model_id",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
    commit_message: str = "Upload with trl-diffusion-rank",
) -> CommitInfo:
    """
    Upload a folder, into a new repository where there is none. Nothing is lost when it fails: the folder stays, and
    files that have arrived are not sent again.

    Args:
        folder, path_in_repo: what is uploaded, and the folder it goes to; by default the repository itself.
        repo_id, repo_type: the repository, `user/name`, and `model` or `dataset`.
        allow_patterns, delete_patterns: which files are uploaded, and which of the repository's that aren't uploaded
            again are deleted.
        option: the user's option that names the repository, for errors.
        private: whether a new repository is private; the owner's default when None.
        token: by default the one of `hf auth login` or of HF_TOKEN.

    Raises:
        `ValueError`: what went wrong and what to do about it.
    """
    api = HfApi(token=token)

    def send() -> CommitInfo:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            path_in_repo=path_in_repo,
            allow_patterns=list(allow_patterns),
            delete_patterns=delete_patterns and list(delete_patterns),
            revision=revision,
            commit_message=commit_message,
        )

    try:
        return repeated(send)
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(refusal(error, f"The {repo_type} in {folder}", repo_id, option, token)) from error


def repeated(call: Callable[[], Result]) -> Result:
    """What `call` returns; it is called again where the cause of an error may pass by itself."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            if not _may_pass(error):
                raise
            wait = WAIT * 2 ** (attempt - 1)
            logger.warning(f"Upload: {_cause(error, '')[0]}. Again in {wait:g} s ({attempt} of {ATTEMPTS - 1}).")
            time.sleep(wait)
    return call()


def refusal(error: BaseException, what: str, repo_id: str, option: str, token: str | None = None) -> str:
    """One sentence on why `what` didn't come to `repo_id`, and one on what to do."""
    cause, remedy = _cause(error, option)
    return (
        f"{what} could not be pushed to {repo_id!r}: {_without_token(cause, token)}. {remedy}, and give the same "
        "command again; nothing is lost, and files that have arrived are not sent again."
    )


def _cause(error: BaseException, option: str) -> tuple[str, str]:
    """Why a request failed, and what to do."""
    login = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    if any(isinstance(link, LocalTokenNotFoundError) for link in _chain(error)):
        return "nobody is logged in to the Hub", login
    status = _status(error)
    if status == 401:
        return "the Hub doesn't accept the login (401)", login
    if status == 403:
        return (
            "this login may not write there (403)",
            f"Use a token that may write, and an account or an organisation of yours in `{option}`",
        )
    if status == 404:
        return (
            "there is no such repository, or it is hidden from this login (404)",
            f"Check `{option}` and the login (`hf auth whoami`)",
        )
    if status in (409, 412):
        return f"someone else is changing the repository at the same time ({status})", "Wait until they are done"
    if status == 429:
        return "the Hub has had too many requests from here (429)", "Wait some minutes"
    if status is not None and status >= 500:
        return f"the Hub has trouble of its own ({status})", "Wait some minutes (https://status.huggingface.co)"
    if status is None and (link := _broken_connection(error)) is not None:
        return f"the connection to the Hub broke ({type(link).__name__})", "Check the connection"
    return str(error).strip().splitlines()[0].rstrip("."), f"Check `{option}` and the login (`hf auth whoami`)"


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is None:
        return _broken_connection(error) is not None
    return status in (409, 412) or status >= 500


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, which may have been raised from another."""
    statuses = (link.response.status_code for link in _chain(error) if isinstance(link, HfHubHTTPError))
    return next(statuses, None)


def _broken_connection(error: BaseException) -> BaseException | None:
    return next((link for link in _chain(error) if isinstance(link, (HTTPError, ConnectionError))), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _without_token(text: str, token: str | None) -> str:
    """The Hub's answers don't repeat the token; should one do it, it isn't shown."""
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return text
