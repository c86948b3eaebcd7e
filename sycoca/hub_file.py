"""Files of repositories of the hub; where no network leads there, that is found at once, and the cache is all there is.

huggingface_hub asks for every file several times, with pauses, before it turns to its cache.
"""

import os
import socket
from functools import cache
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

# A proxy knows names that this machine cannot resolve.
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@cache
def reachable() -> bool:
    """Whether the hub's name leads anywhere from here."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    try:
        socket.getaddrinfo(_host(), None)
    except OSError:
        return False
    return True


def download(repository: str, name: str, *, revision: str | None = None) -> str:
    """Path of a file of a repository in the cache of huggingface_hub, which has it or gets it.

    Args:
        repository: owner/name.
        name: of the file.
        revision: branch, tag or commit.

    Raises:
        EntryNotFoundError: the repository has no such file, or the cache, with no network.
        HfHubHTTPError, OSError, ValueError: as huggingface_hub says.
    """
    here = not reachable()
    try:
        return huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=here)
    except LocalEntryNotFoundError:
        if here:
            raise LocalEntryNotFoundError(f"{_host()} cannot be reached, and {name} is not in the cache") from None
        raise


def _host() -> str:
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
