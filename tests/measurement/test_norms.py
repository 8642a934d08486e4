"""Norms and counts against float64 and numpy, over the whole range of every format."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.measurement import norms as stats

SIZES = (1, 7, 511, 16384, 16385, 100_000, 65_536 * 2 + 513)
CASES = [
    *((torch.float32, scale) for scale in (1e-45, 1e-38, 1e-30, 1e-22, 1e-17, 1e-10, 1.0, 1e10, 1e17, 1e20, 1e36)),
    *((torch.bfloat16, scale) for scale in (1e-40, 1e-38, 1e-25, 1.0, 1e20, 1e36)),
    *((torch.float16, scale) for scale in (6e-8, 1e-5, 1.0, 1e4)),
    *((torch.float64, scale) for scale in (1e-310, 1e-300, 1e-160, 1e-100, 1e-20, 1.0, 1e100, 1e160, 1e200, 1e300)),
]


def exact(tensor):
    """Norm in numpy's float64 of entries brought near 1 by a power of two, so that no square leaves the range."""
    entries = tensor.detach().double().numpy().ravel()
    _, exponent = np.frexp(np.abs(entries).max(initial=0.0))
    return float(np.ldexp(np.sqrt(np.sum(np.square(np.ldexp(entries, -exponent)))), exponent))


def norm(tensor):
    return stats.norms([stats.plain(tensor)]).item()


def entries(size, dtype, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64).clamp(-4, 4) * scale).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_a_norm_is_right_over_the_range_of_its_format(dtype, scale, size):
    tensor = entries(size, dtype, scale)
    assert norm(tensor) == pytest.approx(exact(tensor), rel=1e-6, abs=0)


def test_a_vanished_gradient_is_not_read_as_zero():
    for size in SIZES:
        smallest = torch.zeros(size)
        smallest[-1] = 1e-45  # the smallest float32, 1.4e-45
        assert norm(smallest) == pytest.approx(2.0**-149, rel=1e-6, abs=0)


def test_small_entries_beside_a_large_one_are_not_lost():
    tensor = torch.full((1_000_001,), 1e-4)
    tensor[123_456] = 1.0
    small = float(np.float32(1e-4))
    assert norm(tensor) == pytest.approx(math.sqrt(1 + 1e6 * small * small), rel=1e-6)
    assert (
        abs(torch.linalg.vector_norm(tensor).item() / norm(tensor) - 1) > 1e-5
    )  # which is why this is not torch's own float32 norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_layout_in_memory_does_not_matter(dtype):
    tensor = entries(300 * 200, dtype, 1.0).view(300, 200)
    views = (
        tensor.t(),
        tensor[:, ::3],
        tensor[1:, 1:],
        tensor.view(30, 10, 200).permute(2, 0, 1),
        tensor.expand(3, 300, 200),
    )
    for view in views:
        assert not view.is_contiguous()
        assert norm(view) == pytest.approx(exact(view), rel=1e-6)


def test_nothing_zero_and_a_single_number_have_their_norms():
    shapes = [
        torch.zeros(0),
        torch.zeros(3, 0),
        torch.tensor(-3.0),
        torch.zeros(7),
        torch.zeros(50_000),
        torch.zeros(5, dtype=torch.float64),
    ]
    assert stats.norms(shapes).tolist() == [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert stats.norms([]).shape == (0,)
    assert stats.norms([torch.zeros(0, dtype=torch.float64)]).tolist() == [0.0]


@pytest.mark.parametrize("size", [5, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_are_shown_as_they_are(dtype, size):
    nan, infinite, both = (entries(size, dtype, 1.0) for _ in range(3))
    nan[3] = math.nan
    infinite[3] = -math.inf
    both[2], both[3] = math.inf, math.nan
    read = stats.norms([nan, infinite, both]).tolist()
    assert math.isnan(read[0])
    assert read[1] == math.inf
    assert math.isnan(read[2])


def test_formats_and_sizes_mix_in_one_call():
    tensors = [entries(size, dtype, scale, seed=i) for i, (dtype, scale) in enumerate(CASES) for size in (3, 20_000)]
    assert stats.norms(tensors).tolist() == pytest.approx([exact(t) for t in tensors], rel=1e-6, abs=0)


def test_repeated_indices_of_a_sparse_gradient_are_added_up_first():
    values = entries((4, 5), torch.float32, 1.0)
    sparse = torch.sparse_coo_tensor([[2, 0, 2, 7]], values, (10, 5), check_invariants=True)
    assert not sparse.is_coalesced()
    assert norm(sparse) == pytest.approx(exact(sparse.to_dense()), rel=1e-6)
    assert norm(sparse) != pytest.approx(exact(values), rel=1e-3)  # what the stored values alone would give


@pytest.mark.filterwarnings("ignore:Sparse.*:UserWarning")  # torch calls its CSR layout a beta
def test_a_compressed_sparse_gradient_has_the_norm_of_the_dense_one():
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    assert norm(dense.to_sparse_csr()) == pytest.approx(5.0)


def test_a_complex_gradient_has_the_norm_of_its_magnitudes():
    tensor = torch.tensor([3 + 4j, 0 - 12j], dtype=torch.complex64)
    assert norm(tensor) == pytest.approx(13.0)
    assert norm(tensor.conj()) == pytest.approx(13.0)
    assert norm(tensor.to(torch.complex128) * 1e-200) == pytest.approx(13e-200, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("size", [3, 20_000])
def test_a_float8_gradient_is_read(dtype, size):
    tensor = entries(size, torch.float32, 1.0).to(dtype)
    assert norm(tensor) == pytest.approx(exact(tensor.float()), rel=1e-6)


RANGES = {torch.float32: (-45, 37), torch.bfloat16: (-40, 37), torch.float16: (-7, 4), torch.float64: (-320, 305)}


@settings(deadline=None, max_examples=150, database=None)
@given(
    dtype=st.sampled_from(list(RANGES)),
    exponent=st.floats(0, 1),
    spread=st.floats(0, 12),
    size=st.integers(0, 40_000),
    step=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_any_gradient_has_the_norm_that_float64_gives(dtype, exponent, spread, size, step, seed):
    low, high = RANGES[dtype]
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over many powers of ten at once, as gradients have them.
    powers = low + exponent * (high - low) - spread * torch.rand(size, generator=generator, dtype=torch.float64)
    signs = torch.rand(size, generator=generator).sub(0.5).sign().double()
    tensor = (signs * 10.0**powers).to(dtype)[::step]
    assert norm(tensor) == pytest.approx(exact(tensor), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_counts_are_those_of_numpy(dtype):
    limit = torch.finfo(dtype).smallest_normal
    tensor = entries((50, 60), dtype, 4 * limit)  # about a fifth of the entries below the limit
    tensor[:, 0] = 0.0
    tensor[0, 1:4] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    tensor[1, 1] = limit  # the smallest normal number is not subnormal
    sound = torch.ones(7, dtype=dtype)
    array = tensor.double().numpy()
    assert stats.nonfinite(tensor).item() == np.count_nonzero(~np.isfinite(array)) == 3
    small = np.count_nonzero((array != 0) & (np.abs(array) < limit))
    assert 100 < small < 1500
    nonzero, tiny = stats.small([tensor.t(), sound, torch.zeros(0, dtype=dtype)], [limit, limit, limit])
    assert nonzero == [np.count_nonzero(array), 7, 0]
    assert tiny == [small, 0, 0]


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-21, 1.0, 1e19, 1e36])
@pytest.mark.parametrize(
    "shape",
    [
        (63, 300),
        (300, 63),
        (64, 64),
        (40, 64),
        (300, 512),
        (20, 1024),
        (20, 1025),
        (3, 5, 7, 64),
        (1, 20_000),
        (20_000, 1),
    ],
    ids=str,
)
def test_many_tensors_of_one_shape_are_told_apart(shape, scale):
    tensors = [entries(shape, torch.float32, scale * (i + 1) / 6, seed=i) for i in range(5)]
    tensors.insert(2, entries(shape, torch.float32, 1.0).transpose(0, -1).contiguous().transpose(0, -1))
    tensors.insert(4, entries((3,), torch.float32, scale))
    assert stats.norms(tensors).tolist() == pytest.approx([exact(t) for t in tensors], rel=1e-6, abs=0)


@pytest.mark.parametrize("width", [512, 768, 1000, 1024, 3000])
def test_the_roundings_of_equal_entries_do_not_add_up(width):
    # The same rounding in every sum is the worst case of float32: nothing cancels.
    for value in np.geomspace(1, 10, 100, dtype=np.float32).tolist():
        tensor = torch.full((40, width), value)
        views = [
            tensor,
            torch.full((width, 40), value).t(),
            torch.full((80, width), value)[::2],
            torch.full((40 * width, 2), value)[:, 0],
        ]
        truth = math.sqrt(40 * width) * float(np.float32(value))
        assert stats.norms(views).tolist() == pytest.approx([truth] * len(views), rel=1e-6)


def test_thousands_of_small_tensors_keep_their_order():
    tensors = [torch.full(((1, 3, 500)[i % 3],), float(i)) for i in range(3000)] + [torch.tensor(-7.0)] * 40
    assert stats.norms(tensors).tolist() == pytest.approx(
        [i * math.sqrt((1, 3, 500)[i % 3]) for i in range(3000)] + [7.0] * 40, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_measured_is_left_as_it_was_and_may_have_a_graph(dtype):
    leaf = entries((300, 200), dtype, 1.0).requires_grad_()
    tensor = leaf.square().t()  # as a gradient that was made with create_graph=True
    before = tensor.detach().clone()
    with torch.no_grad():
        stats.norms([tensor])
        stats.nonfinite(tensor)
        stats.small([tensor], [1e-20])
    assert torch.equal(tensor, before)
    assert tensor.requires_grad


@pytest.mark.parametrize("size", [7, 600, 20_000])
def test_memory_that_is_read_can_still_be_resized(size):  # as FSDP does with what it gathers; Tensor.numpy forbids it
    tensor = torch.ones(size)
    stats.norms([tensor])
    stats.small([tensor], [1e-30])
    assert tensor.untyped_storage().resizable()


@pytest.mark.parametrize("scale", [1e-45, 1e-20, 1.0, 1e30])
def test_many_small_tensors_are_told_apart_and_counted(scale):
    tensors = [entries(1 + i % 300, torch.float32, scale, seed=i) for i in range(200)]
    tensors[3:3] = [torch.zeros(0), torch.zeros(5), entries((40, 50), torch.float32, scale), torch.zeros(())]
    tensors.append(entries(7, torch.bfloat16, 1.0))
    assert stats.norms(tensors).tolist() == pytest.approx([exact(t) for t in tensors], rel=1e-6, abs=0)

    limit = torch.finfo(torch.float32).smallest_normal
    small = [t for t in tensors if t.dtype is torch.float32 and t.numel() <= 300]
    nonzero, tiny = stats.small(small, [limit] * len(small))
    assert nonzero == [np.count_nonzero(t.numpy()) for t in small]
    assert tiny == [np.count_nonzero((t.numpy() != 0) & (np.abs(t.numpy()) < limit)) for t in small]


def test_equal_entries_add_up():  # to which float32 adds the same again and again, in the same direction
    for value in (0.1, 1 / 3, 0.7):
        for size in (500, 1000, 1024, 5000, 100_000, 2**20, 5_000_000):
            tensor = torch.full((size,), value)
            assert norm(tensor) == pytest.approx(float(tensor[0]) * math.sqrt(size), rel=1e-6)
