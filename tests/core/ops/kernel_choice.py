"""Runs the ops with a stand-in for the CUDA driver, which compiles for sm_90 and launches nothing.

Each launch asks Triton itself which compiled form it would take, and ends the process if ours is another one. Then
batches come after a warm-up, and none may compile anything.
"""

import itertools
import random

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from preft_core.ops import triton as ops
from preft_core.ops.warm import warm_up
from preft_core.pool.layout import Bucket, Layout, Site
from preft_core.rule.tokens import Segments


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        # module, function, registers, spills, and in later versions of Triton the most threads
        return (1, 2, 32, 0, 1024)[: 4 if triton.__version__ < "3.4" else 5]

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def unload_module(self, *args):
        pass


class _Driver:
    utils = _Utils()

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class _Checked(ops._Kernel):
    """Compares, for each launch, the form that a key finds with the one that Triton chooses."""

    num_found = 0

    def __call__(self, key, grid, arguments, num_warps, num_stages):
        chosen = self._function[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
        found = self._compiled.setdefault(key, chosen)
        assert found is chosen, f"another form than Triton's for {key}"
        _Checked.num_found += 1


def view(rows: int, columns: int, dtype: torch.dtype, offset: int, stride: int) -> torch.Tensor:
    """Returns (rows, columns) whose rows are stride apart and whose first element is offset into its memory."""
    return torch.zeros(rows * stride + offset + 1, dtype=dtype)[offset:].as_strided((rows, columns), (stride, 1))


def launch(lengths, dtype, width, widths, offsets, strides=(0, 0), rank=8, edits=False) -> None:
    """Runs one op. offsets: of x, output, A, B and bias, in elements; strides: what rows of x and output have more."""
    rows, total, parts = sum(lengths), sum(widths), len(widths)
    segments = Segments.of_lengths([i % 3 for i in range(len(lengths))], lengths)
    x = view(rows, width, dtype, offsets[0], width + strides[0])
    output = view(rows, total, dtype, offsets[1], total + strides[1])
    a = view(3, parts * rank * width, dtype, offsets[2], parts * rank * width)
    b = view(3, total * rank, dtype, offsets[3], total * rank).unflatten(1, (total, rank))
    if edits:
        bias = view(3, rank, dtype, offsets[4], rank)
        ops.add_direft_(x, a.unflatten(1, (rank, width)), b, bias, segments)
    else:
        ops.add_lora_(output, x, a.unflatten(1, (parts, rank, width)), b, widths, segments)


def num_forms() -> int:
    """Returns how many forms of the two kernels Triton has compiled in this process."""
    kernels = (ops.shrink_kernel, ops.expand_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def count_late_forms() -> None:
    """Ends the process if a batch compiles anything after `warm_up`."""
    ops._SHRINK, ops._EXPAND = ops._Kernel(ops.shrink_kernel), ops._Kernel(ops.expand_kernel)
    sites = [
        Site("qv", "linear", ("q", "v"), 512, (96, 32)),
        Site("same", "linear", ("q", "v"), 512, (96, 32)),
        Site("block", "block", ("block",), 64, (64,)),
    ]
    weights = {}
    for kind in ("linear", "block"):
        layout = Layout(sites, Bucket(kind, 8))
        weights |= layout.views(torch.zeros(4, layout.num_elements, dtype=torch.bfloat16))
    num_runs = warm_up(weights.values())
    # 3 sizes of tiles; the wide input cut in 2 or whole; the largest tiles also with long runs of columns
    assert num_runs == (2 + 2 + 3) + (1 + 1 + 2), num_runs
    before = num_forms()
    choose = random.Random(0)
    for _ in range(300):
        lengths = [choose.choice([1, 7, 16, 40, 64, 200, 3000]) for _ in range(choose.choice([1, 2, 9, 60]))]
        slots = [choose.randrange(-1, 4) for _ in lengths]
        segments = Segments.of_lengths(slots, lengths)
        one = weights[choose.choice(["qv", "block"])]
        x = torch.empty(segments.num_rows, one.a.shape[-1], dtype=torch.bfloat16)
        if one.bias is None:
            output = torch.empty(segments.num_rows, one.b.shape[1], dtype=torch.bfloat16)
            ops.add_lora_(output, x, one.a, one.b, one.widths, segments)
        else:
            ops.add_direft_(x, one.a[:, 0], one.b, one.bias, segments)
    assert num_forms() == before, f"{num_forms() - before} forms were compiled after the warm-up"
    print(f"{num_runs} ops warmed up")


def main() -> None:
    driver.set_active(_Driver())
    ops._SHRINK, ops._EXPAND = _Checked(ops.shrink_kernel), _Checked(ops.expand_kernel)
    half = torch.bfloat16
    for offsets in itertools.product((0, 1), repeat=4):
        launch([5, 40], half, 64, (64,), offsets)
        # another count of rows, of another alignment, and pointers that are odd in another way
        launch([64], half, 64, (64,), [8 * offset for offset in offsets])
        launch([3] * 9, half, 64, (64,), [2 * offset for offset in offsets])
    for offset in (0, 1):
        launch([5, 40], half, 64, (64,), (0, 0, 0, 0, offset), edits=True)
    for strides in ((1, 0), (16, 0), (0, 1), (0, 16)):
        launch([5, 40], half, 64, (64,), (0,) * 5, strides)
    for width, widths in ((60, (64,)), (64, (50,)), (64, (48, 16)), (64, (16, 48)), (64, (1,))):
        launch([5, 40], half, width, widths, (0,) * 5)
    launch([5, 40], torch.float32, 64, (64,), (0,) * 5)
    launch([5, 40], half, 64, (64,), (0,) * 5, rank=16)
    forms = [len({id(kernel) for kernel in one._compiled.values()}) for one in (ops._SHRINK, ops._EXPAND)]
    print(f"triton {triton.__version__}: {_Checked.num_found} launches, {forms} forms")
    assert min(forms) > 8
    count_late_forms()


if __name__ == "__main__":
    main()
