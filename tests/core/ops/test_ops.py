import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_core.ops import direft_update, lora_update, loreft_update, orthonormal_rows

# float64 so that the tolerance is about the formula and not about rounding
TOLERANCE = 1e-10


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9), d=st.integers(1, 100), n=st.integers(1, 63), r=st.integers(1, 16), seed=st.integers(0, 9)
)
def test_updates_are_their_formulas(rows, d, n, r, seed):
    x, a, b, bias, w2 = tensors((rows, d), (r, d), (n, r), (r,), (r, d), seed=seed)
    lora = torch.stack([2.5 * (b @ (a @ row)) for row in x]) if rows else x.new_zeros(0, n)
    assert torch.allclose(lora_update(x, a, b, 2.5), lora, atol=TOLERANCE)
    direft = torch.stack([0.5 * (w2.T @ (a @ row + bias)) for row in x]) if rows else x.new_zeros(0, d)
    assert torch.allclose(direft_update(x, a, w2.T, bias, 0.5), direft, atol=TOLERANCE)


@pytest.mark.parametrize(("r", "d"), [(1, 1), (1, 63), (4, 4), (8, 100)])
def test_loreft_edits_in_the_subspace_of_r_only(r, d):
    h, a, rotation, bias = tensors((5, d), (r, d), (r, d), (r,))
    q = orthonormal_rows(rotation)
    assert torch.allclose(q @ q.T, torch.eye(r, dtype=q.dtype), atol=TOLERANCE)
    edited = h + loreft_update(h, a, rotation, bias)
    assert torch.allclose(edited @ q.T, h @ a.T + bias, atol=1e-9)
    rest = torch.eye(d, dtype=q.dtype) - q.T @ q
    assert torch.allclose(edited @ rest, h @ rest, atol=1e-9)


def test_orthonormal_rows_keep_what_is_orthonormal_and_span_what_is_not():
    (rotation,) = tensors((4, 20))
    q = orthonormal_rows(rotation)
    assert torch.allclose(orthonormal_rows(q), q, atol=TOLERANCE)
    assert torch.allclose(rotation @ q.T @ q, rotation, atol=TOLERANCE)
    assert (torch.diagonal(rotation @ q.T) > 0).all()


def test_updates_are_differentiable():
    h, a, rotation, bias = (t.requires_grad_() for t in tensors((3, 10), (2, 10), (2, 10), (2,)))
    assert torch.autograd.gradcheck(loreft_update, (h, a, rotation, bias))
