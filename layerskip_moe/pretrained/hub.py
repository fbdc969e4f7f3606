"""Checkpoints on the Hugging Face hub: brought into its cache here, and put there.

What was brought once is found in the cache when there is no network (huggingface_hub sees to that).
Knows nothing of what is in the files. Next: `checkpoint.py`, which reads and writes the folder.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.files import expanded
from layerskip_moe.nn import MoEDecoder
from layerskip_moe.nn.config import shown
from layerskip_moe.pretrained.model_card import CARD, is_ours, write_model_card
from layerskip_moe.pretrained.weights import HOW_TO_CONVERT, WEIGHT_FILES, weight_file_names

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from tokenizers import Tokenizer

# This leaves out consolidated.safetensors, which has the same weights once more, in other people's layout; and pickles.
CHECKPOINT_FILES = ("*.json", *WEIGHT_FILES)
_READ = {".json", ".jinja", ".model", ".safetensors"}  # suffixes of what a folder is read by


def local_folder(
    folder_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """The folder itself; or, of a checkpoint on the hub, where its files lie in the hub's cache, brought if need be.

    folder_or_id: "owner/name", where no such folder exists here, is an id on the hub; any other text, what begins with
        ".", "~" or "/", and a `Path` is a folder
    revision: branch, tag or commit on the hub (default: main)
    token: of an account that may read it (default: the one `hf auth login` left)
    patterns: of the files that are wanted

    Raises ValueError where there is no such folder, or a file in it is a link to elsewhere; and where the hub has no
    such checkpoint, has its weights (if these are wanted) only as pickles, does not let it be read, or cannot be
    reached while the cache does not have it.
    """
    folder = expanded(folder_or_id)
    exists = os.path.exists(folder)  # (which raises nothing, as `Path.exists` does for a name that is too long)
    if isinstance(folder_or_id, Path) or exists or _is_written_as_a_path(folder_or_id):
        if not os.path.isdir(folder):
            found = "is a file" if exists else "does not exist"
            told = shown(str(folder))[1:-1]
            raise ValueError(f"{told} {found}; give the folder that save_pretrained wrote, or an id on the hub.")
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} is for checkpoints on the hub; {folder} is a folder here.")
        _check_links(folder)
        return folder
    folder = _download(folder_or_id, revision, token, patterns)
    if set(WEIGHT_FILES) <= set(patterns) and not weight_file_names(folder):
        raise ValueError(
            f"'{folder_or_id}' has no {WEIGHT_FILES[0]} on the Hugging Face hub, or this could not be reached and its "
            "cache has none: check the connection; of pickles (pytorch_model.bin), which can run code when read and so "
            f"are not, {HOW_TO_CONVERT}."
        )
    _check_links(folder)
    return folder


def push(
    model: MoEDecoder,
    repo_id: str,
    *,
    tokenizer: "Tokenizer | str | Path | None" = None,
    recipe: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Save the model and put it on the hub, in one commit; the address of the repository.

    repo_id: "owner/name", or "name" for the account's own; the repository is made if need be. The weights and the
    tokenizer that it has already go; a README.md that somebody else wrote stays.
    tokenizer, recipe: as for `save_model`; report: as for `write_model_card`
    private: for a repository that is made (default: as the account's settings have it)
    token: of an account that may write there (default: the one `hf auth login` left)

    Raises ValueError where the hub cannot be reached or refuses, and for what `save_model` refuses.
    """
    from huggingface_hub import HfApi

    from layerskip_moe.pretrained.checkpoint import save_model
    from layerskip_moe.pretrained.tokenizer import ALL_TOKENIZER_FILES

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, tokenizer=tokenizer, recipe=recipe)
        write_model_card(folder, report)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            whole_id = address.repo_id  # with the account, which upload_folder needs
            api.upload_folder(
                repo_id=whole_id,
                folder_path=folder,
                commit_message="A checkpoint by layerskip_moe",
                ignore_patterns=[CARD] if _has_other_card(api, whole_id) else None,
                delete_patterns=[*WEIGHT_FILES, *ALL_TOKENIZER_FILES],  # but for those that are put there anew
            )
        # The hub's HTTP library, and with it the exceptions, changes from release to release.
        except Exception as error:
            raise ValueError(
                f"The model could not be put on the Hugging Face hub as '{repo_id}' ({_reason(error)}): check the "
                "name and the connection, and that the account of `hf auth login`, or of token=..., may write there."
            ) from None
    return str(address)


def _check_links(folder: Path) -> None:
    """Raise ValueError for a file of a checkpoint that is a link to elsewhere: what was unpacked from an archive must
    not choose what is read here. The hub's cache links from snapshots/<commit>/ to blobs/ beside it, and may."""
    inside = folder.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in _READ and not _real_path(path).is_relative_to(inside):
            raise ValueError(
                f"{path} is a link that leads out of the folder, to {_real_path(path)}; put a copy of the file in its "
                "place if it is meant."
            )


def _real_path(path: Path) -> Path:
    """Where links lead in the end; a circle of them leads nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return Path(path.anchor)


def _is_written_as_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text


def _download(repo_id: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(patterns))
    except errors.GatedRepoError:
        raise ValueError(
            f"'{repo_id}' on the Hugging Face hub is given only to those who accept its terms: accept them on its "
            "page, then log in with `hf auth login` or give token=..."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"No folder here is called '{repo_id}', and the Hugging Face hub has no public model of that name: check "
            "the spelling, or log in with `hf auth login` or give token=... if it is private."
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"'{repo_id}' on the Hugging Face hub has no revision '{revision}': give one of its branches, tags or "
            "commits."
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"'{repo_id}' is neither a folder here nor a possible id on the hub ({error}).") from None
    except Exception as error:
        raise ValueError(
            f"No folder here is called '{repo_id}', and it could not be brought from the Hugging Face hub "
            f"({_reason(error.__cause__ or error)}), nor is it whole in the hub's cache: check the spelling and the "
            "connection, or give a folder."
        ) from None
    return Path(found)


def _has_other_card(api: "HfApi", repo_id: str) -> bool:
    """Whether the repository has a README.md that is not of our writing."""
    if not api.file_exists(repo_id, CARD):
        return False
    return not is_ours(Path(api.hf_hub_download(repo_id, CARD)).read_text(encoding="utf-8"))


def _reason(error: BaseException) -> str:
    first = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
