"""Fetch models, adapters, GGUF pairs and datasets by Hub id into the user's Hugging Face cache, and push them.

All requests use huggingface_hub, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have their usual meaning. Only
data is fetched: SafeTensors, GGUF, JSON, text and pictures, never pickles or code.
"""

import functools
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from orion_triage.errors import OrionError
from orion_triage.safe.proxies import proxy_for
from orion_triage.safe.reading import refuse_lfs_pointers

Kind = Literal["model", "adapter", "GGUF pair", "dataset"]

_TEXTS = ["*.json", "*.jinja", "*.txt", "*.md", "LICENSE*"]
_FILES: dict[Kind, list[str]] = {
    "model": ["*.safetensors", *_TEXTS],
    "adapter": ["adapter_model.safetensors", *_TEXTS],
    "GGUF pair": ["*.gguf", *_TEXTS],  # where the listing is known, only the pair: see `pair_among`
    "dataset": ["*.jsonl", "*.csv", "*.geojson", "*.png", "*.jpg", "*.jpeg", *_TEXTS],
}
_ID = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # a point begins the path of a folder


def locate(name: str, kind: Kind) -> Path:
    """The folder of `name`: a local folder, or the cached snapshot of "owner/name" or "owner/name@revision".

    The revision is a branch, a tag or a commit; without one, it is the newest commit of `main`, looked up once per
    process. Raises OrionError if `name` is invalid, cannot be reached, is gated, or has no such revision.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        refuse_lfs_pointers(folder)
        return folder
    if folder.is_file():
        raise OrionError(f"{kind} {name!r} is a file, not a folder.", f"Pass its folder: {folder.parent}.")
    match = _ID.fullmatch(name)
    if match is None:
        raise OrionError(
            f"{kind} {name!r} is neither a folder nor a Hub id.", "Pass a folder, or owner/name or owner/name@revision."
        )
    return _snapshot(match[1], match[2] or "main", kind)


def is_id(name: str) -> bool:
    """Whether the name is written like "owner/name" or "owner/name@revision"."""
    return bool(_ID.fullmatch(name))


def id_of(folder: Path) -> str | None:
    """The Hub id of a snapshot folder in the cache (models--owner--name/snapshots/commit); None for other folders."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or "--" not in repository:
        return None
    return repository.split("--", 1)[1].replace("--", "/")


def root_of(folder: Path) -> Path:
    """The folder that links in `folder` may point into; the files of a snapshot are links to the repository's blobs."""
    return folder.parent.parent if id_of(folder) else folder


def pair_among(names: Sequence[str], where: str, fix: str) -> tuple[str, str]:
    """The names of the backbone and the mmproj among the files of a folder or repository.

    Of several backbones, the one whose name contains Q4_K_M; of several mmproj files, the one whose name contains F16,
    the type that `orion quantize` writes. Importance matrices and files in folders below are not considered. Raises
    OrionError that lists the names if that does not leave one of each; `where` and `fix` are for its text.
    """
    files = sorted(name for name in names if name.endswith(".gguf") and "/" not in name)
    projectors = [name for name in files if "mmproj" in name.lower()]
    backbones = [name for name in files if name not in projectors and "imatrix" not in name.lower()]
    if len(backbones) > 1:
        backbones = [name for name in backbones if "q4_k_m" in name.lower()]
    if len(projectors) > 1:
        projectors = [name for name in projectors if re.search(r"(?<![a-z0-9])f16(?![0-9])", name.lower())]
    if len(projectors) != 1 or len(backbones) != 1:
        found = ", ".join(files) or "no *.gguf"
        raise OrionError(f"{where} has {found}, not one Q4_K_M backbone and one mmproj.", fix)
    return backbones[0], projectors[0]


@functools.cache
def _snapshot(repository: str, revision: str, kind: Kind) -> Path:
    from huggingface_hub import snapshot_download

    repo_type = "dataset" if kind == "dataset" else "model"
    # A model's folders (onnx, checkpoint-100) are not read; a dataset's have the pictures.
    ignored = None if kind == "dataset" else ["*/*"]
    patterns = _FILES[kind]
    with _explained(repository, revision, kind):
        if kind == "GGUF pair" and (listed := _listed(repository, revision)):
            fix = f"Run 'hf download {repository} FILE FILE --local-dir FOLDER' for the two files, and pass FOLDER."
            patterns = [*map(glob.escape, pair_among(listed, repository, fix)), *_TEXTS]
        folder = snapshot_download(
            repository, revision=revision, repo_type=repo_type, allow_patterns=patterns, ignore_patterns=ignored
        )
    return Path(folder)


def _listed(repository: str, revision: str) -> list[str]:
    """The names of a repository's GGUF files; without a network, of those in the cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    try:
        # Not list_repo_files, which tries five times before it says that there is no network.
        names = [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or []]
    except errors.HfHubHTTPError:
        raise
    except (http_error, ConnectionError, errors.OfflineModeIsEnabled):
        cached = snapshot_download(
            repository, revision=revision, allow_patterns=_TEXTS, ignore_patterns=["*/*"], local_files_only=True
        )
        names = [path.name for path in Path(cached).iterdir()]
    return [name for name in names if name.endswith(".gguf")]


def push(
    files: dict[str, Path | bytes], repository: str, *, message: str, private: bool = True, kind: Kind = "model"
) -> str:
    """Upload {name in the repository: a file, or its bytes} as one commit; returns the commit's URL.

    Creates the repository if it does not exist, by default private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi()
    repo_type = "dataset" if kind == "dataset" else "model"
    with _explained(repository, "main", kind):
        api.create_repo(repository, private=private, exist_ok=True, repo_type=repo_type)
        return str(api.create_commit(repository, operations, commit_message=message, repo_type=repo_type).commit_url)


@contextmanager
def _explained(repository: str, revision: str, kind: Kind) -> Iterator[None]:
    """Convert huggingface_hub's errors to an OrionError with a fix."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    proxy = None if constants.HF_HUB_OFFLINE else proxy_for(constants.ENDPOINT)
    if not sys.stderr.isatty():
        disable_progress_bars()
    # The error class of the HTTP library, which depends on huggingface_hub's version.
    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    endpoint = constants.ENDPOINT
    what = f"{kind} {repository!r}"
    elsewhere = f"Or run 'hf download {repository} --local-dir FOLDER' on a connected machine, and pass FOLDER."
    through, check = (f" through the proxy {proxy}", proxy.variable) if proxy else ("", "HF_ENDPOINT")
    unreachable = OrionError(
        f"{what}: {endpoint} cannot be reached{through}.", f"Check the network and {check}. {elsewhere}"
    )
    try:
        yield
    except errors.HFValidationError:
        raise OrionError(f"{what} is not a valid Hub id.", "Pass owner/name, or a folder.") from None
    except errors.GatedRepoError:
        raise OrionError(
            f"{what} is gated, and this account has no access to it.",
            f"Accept its terms at {endpoint}/{repository}, then run 'hf auth login' or set HF_TOKEN.",
        ) from None
    except errors.RevisionNotFoundError:
        raise OrionError(
            f"{what} has no revision {revision!r}.", f"Choose one from {endpoint}/{repository}/commits/main."
        ) from None
    except errors.RepositoryNotFoundError:
        raise OrionError(
            f"{what} is neither a local folder nor a repository at {endpoint} that this account can access.",
            "Check the spelling. For a private repository, run 'hf auth login' or set HF_TOKEN.",
        ) from None
    except errors.LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise OrionError(
                f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set.",
                f"Unset HF_HUB_OFFLINE. {elsewhere}",
            ) from None
        raise unreachable from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = {
            401: "Run 'hf auth login' or set HF_TOKEN: the token is not valid.",
            403: "Use a token with write access to that account.",
        }.get(status, "Try again later.")
        reason = (error.server_message or "no reason given").splitlines()[0]
        raise OrionError(f"{what}: {endpoint} answered {status} ({reason}).", fix) from None
    except errors.OfflineModeIsEnabled:
        raise OrionError(f"{what}: HF_HUB_OFFLINE is set.", "Unset HF_HUB_OFFLINE.") from None
    except (http_error, ConnectionError):  # the upload library raises ConnectionError
        raise unreachable from None
