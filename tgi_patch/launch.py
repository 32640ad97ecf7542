"""Starts TGI's server process with the seams in place: what `text-generation-server` becomes in the image."""

import os
import sys
from collections.abc import Sequence

from preft_core.seam import Applied, apply
from tgi_patch import patches
from tgi_patch.server.shard import Shard
from tgi_patch.settings import Settings, SettingsError, check_prefix_caching, read_settings


def server(arguments: Sequence[str] | None = None) -> None:
    """Runs TGI's command line. `serve` runs with the seams applied; other commands are unchanged.

    With PREFT_DISABLE=1 nothing is patched.

    Raises:
        SystemExit: invalid settings, or another TGI than the seams were made for.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["serve"]:
        try:
            settings = read_settings()
            if not settings.disabled:
                patch(settings)
        except (SettingsError, RuntimeError) as error:
            sys.exit(f"preft: {error}. PREFT_DISABLE=1 starts TGI without PreFT")
    from text_generation_server.cli import app  # pyright: ignore[reportMissingImports]

    app(arguments)


def patch(settings: Settings) -> Applied:
    """Applies the seams in this process, before TGI loads a model.

    Raises:
        PatchError: the installed TGI differs from 3.3.7; nothing is patched.
        SettingsError: PREFIX_CACHING is on.
    """
    if settings.active:
        check_prefix_caching(os.environ.get("PREFIX_CACHING", ""))
    return apply(patches.bound_to(Shard(settings)))
