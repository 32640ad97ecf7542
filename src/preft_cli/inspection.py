"""The facts that `preft inspect` shows of a saved adapter, read and checked by preft_core alone."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from preft_core.format.adapter import WEIGHTS_NAME, Adapter, AdapterConfig, check_header, load_adapter
from preft_core.format.header import TensorInfo, read_header
from preft_core.hub.source import find_adapter
from preft_core.orthonormal import orthonormal_rows

NUM_SHOWN = 12


def facts_of(directory: str | Path) -> dict[str, Any]:
    """Returns the facts of a saved adapter, as JSON values.

    `norms` has the Frobenius norm of each module's update matrix: s B A for lora and direft, Q^T (A - Q) for loreft.

    Raises:
        AdapterError: the adapter violates the format.
    """
    adapter = load_adapter(directory)
    header = read_header(Path(directory) / WEIGHTS_NAME)
    norms = {path: _norm(adapter, leaves) for path, leaves in sorted(adapter.modules().items())}
    return _facts(adapter.config, header) | {"fingerprint": adapter.fingerprint, "norms": norms}


def remote_facts_of(location: str, token: str | None = None) -> dict[str, Any]:
    """Returns the facts of an adapter on the Hub from its config and its weights' header, without its weights.

    The fingerprint is the one in the config, unchecked, and there are no norms.

    Raises:
        AdapterError: it is not available, or violates the format.
    """
    source = find_adapter(location, token=token)
    header = source.header()
    check_header(source.config, header)
    return {"location": source.location} | _facts(source.config, header) | {"fingerprint": source.config.fingerprint}


def _facts(config: AdapterConfig, header: dict[str, TensorInfo]) -> dict[str, Any]:
    return {
        "method": config.method,
        "rank": config.r,
        "scaling": config.scaling,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "num_modules": len({name.rpartition(".")[0] for name in header}),
        "num_parameters": sum(prod(info.shape) for info in header.values()),
        "num_bytes": sum(info.end - info.begin for info in header.values()),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in header.values()}),
        "target_modules": config.target_modules,
        "layers_to_transform": config.layers_to_transform,
        "base_model": config.base_model_name_or_path,
        "base_model_revision": config.revision,
        "format_version": config.format_version,
    }


def show_facts(facts: dict[str, Any], console: Console) -> None:
    """Prints the facts as tables: the adapter, then its modules with the largest updates."""
    table = Table(show_header=False, title="Prefill-only adapter")
    for name, value in facts.items():
        if name != "norms" and value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            table.add_row(name.replace("_", " "), f"{shown:,}" if type(shown) is int else str(shown))
    console.print(table)
    if "norms" not in facts:
        return
    norms = sorted(facts["norms"].items(), key=lambda item: -item[1])
    modules = Table(
        "module", "norm of the update", title=f"Largest updates, {min(NUM_SHOWN, len(norms))} of {len(norms)}"
    )
    for path, norm in norms[:NUM_SHOWN]:
        modules.add_row(path, f"{norm:.4g}")
    console.print(modules)


def _norm(adapter: Adapter, leaves: dict[str, Tensor]) -> float:
    a = leaves["preft_A"].double()
    if adapter.config.method == "loreft":
        return float((a - orthonormal_rows(leaves["preft_R"].double())).norm())
    b = leaves["preft_B"].double()
    # |B A| without the product: trace(A A^T B^T B)
    return adapter.config.scaling * float(torch.sqrt(((a @ a.T) * (b.T @ b)).sum().clamp(min=0)))
