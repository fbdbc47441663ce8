"""Upload an exported text encoder to the Hugging Face hub, or whatever HF_ENDPOINT names."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from textcraftor.errors import UserError, first_line
from textcraftor.exporting.card import PICTURE


def check_access(repo: str) -> None:
    """Raise UserError unless the hub can be reached and knows the user. Quick: called before anything is written."""
    try:
        HfApi().whoami()
    except Exception as problem:
        raise UserError(_explain(repo, problem)) from problem


def upload(repo: str, output: Path, card: str, run: Path | None, private: bool) -> str:
    """Upload a file or folder with its model card, and the run's pictures, in one commit -> the repository's address.

    The repository is made if there is none. Raises UserError if the hub refuses.
    """
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    root = output.parent if output.is_file() else output
    operations = [CommitOperationAdd(path.relative_to(root).as_posix(), path) for path in files]
    operations += [CommitOperationAdd("README.md", card.encode())]
    if run and (run / PICTURE).is_file():
        operations += [CommitOperationAdd(PICTURE, run / PICTURE)]
    try:
        address = HfApi().create_repo(repo, private=private or None, exist_ok=True)
        HfApi().create_commit(repo, operations, commit_message="A text encoder tuned with TextCraftor")
    except Exception as problem:
        raise UserError(f"{_explain(repo, problem)}; to try again, remove {output}") from problem
    return str(address)


def _explain(repo, problem):
    """One line for the many kinds of errors of the hub's client."""
    if isinstance(problem, LocalTokenNotFoundError):
        return f"--push_to_hub {repo}: not logged in; run `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, HfHubHTTPError) and status in (401, 403):
        return (
            f"--push_to_hub {repo}: refused ({status}); the token needs write access to {repo.split('/')[0]}: "
            "run `hf auth login` or set HF_TOKEN"
        )
    return f"--push_to_hub {repo}: {constants.ENDPOINT} cannot be used ({first_line(problem)})"
