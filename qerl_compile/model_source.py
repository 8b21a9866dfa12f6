"""From what a user typed to a local model directory: a path stays a path, a hub id is fetched.

Only what is needed leaves the hub: JSON, safetensors, tokenizer text and templates at the top of the repository. Never
a pickle, never Python. Network access happens only here, and only when the argument is no local directory.
"""

import os
import re
from os import PathLike
from pathlib import Path

from qerl_compile.wording import refuse_checkpoint, shown

WEIGHT_PATTERN = "*.safetensors"
ALLOWED_PATTERNS = ("*.json", WEIGHT_PATTERN, "*.txt", "*.model", "*.jinja")
# A star crosses slashes in the hub's patterns. Sub-directories hold other formats, consolidated* a second copy.
IGNORED_PATTERNS = ("*/*", "consolidated*")

_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(?:/[\w-][\w.-]{0,95})?", re.ASCII)


def resolve_model(path_or_id: str | PathLike[str], *, weights: bool = True) -> Path:
    """The local directory of a model.

    Args:
        path_or_id: a directory, or the id of a Hugging Face repository such as `Qwen/Qwen2.5-7B-Instruct`.
        weights: whether to fetch them too, or only what says what the model is. Unused for a directory.

    Returns:
        The directory itself, or the snapshot in the hub's cache.

    Raises:
        CheckpointError: neither a directory nor an id, no such repository, no permission, or no network.
    """
    path, text = Path(path_or_id), str(path_or_id)
    if text and os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name of 5000 characters
        return path
    if os.path.isfile(path):  # noqa: PTH113  # likewise
        refuse_checkpoint(
            text, "a model directory or a hub id", "a file", do="Pass the directory that holds config.json."
        )
    if isinstance(path_or_id, PathLike) or not _HUB_ID.fullmatch(text) or ".." in text:
        refuse_checkpoint(
            shown(text),
            "an existing model directory, or a hub id such as Qwen/Qwen2.5-7B-Instruct",
            "no directory of that name",
            do="Check the path.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                text,
                allow_patterns=[each for each in ALLOWED_PATTERNS if weights or each != WEIGHT_PATTERN],
                ignore_patterns=list(IGNORED_PATTERNS),
            )
        )
    except GatedRepoError:
        got, do = "a gated repository", f"Accept its terms at https://huggingface.co/{text} and run `hf auth login`."
    except LocalEntryNotFoundError:
        got = "no such directory here, not in the hub's cache, and the hub cannot be reached"
        do = "Check the spelling; else fetch it where there is a network with `hf download` and pass the directory."
    except (HfHubHTTPError, HFValidationError) as fault:
        got = f"no such directory here, and from the hub: {shown(str(fault).strip().splitlines()[0])}"
        do = "Check the spelling of the path or id."
    except OSError as fault:  # connection resets and full disks
        got, do = shown(str(fault)), "Check the network and the space in the hub's cache."
    refuse_checkpoint(text, "a model directory or the id of a repository on the hub", got, do=do)
