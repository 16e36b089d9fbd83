"""Muon: the momentum of a matrix is replaced by the nearest matrix with orthogonal rows or columns.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; for the polynomials, Amsel et
al. 2025, "The Polar Express" (greedy composition); for the size of an update, Liu et al. 2025, "Muon is Scalable for
LLM Training", section 2.2.
Shapes: N matrices of R rows and S columns, S at most R.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from shared.gpt import cuda

# The coefficients (a, b, c) of the polynomials x (a + b x^2 + c x^4), one after another: together they move singular
# values from 0.003 to 1 to between 0.76 and 1.2. Each leaves a margin of 2 % for rounding in bf16.
POLYNOMIALS = [
    (8.2193, -23.3375, 16.6266),
    (3.9641, -2.8377, 0.5158),
    (3.4368, -2.4752, 0.4762),
    (2.4901, -1.8343, 0.4368),
]
MOMENTUM = 0.95
# The root mean square of an update's numbers at a rate of 1: three times that of AdamW, which measured best at the
# rates that suit the other parameters (`tests/benchmarks/README.md`).
UPDATE_RMS = 0.6


def is_matrix(name: str) -> bool:
    """Returns whether Muon updates the parameter with this name: the matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def directions(momenta: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Returns the updates of matrices at a rate of 1, from their momenta, by their names.

    Matrices of one shape are orthogonalised together.
    """
    parts = {
        (name, number): part
        for name, momentum in momenta.items()
        for number, part in enumerate(mx.split(momentum, count(name)))
    }
    of_shape: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for key, part in parts.items():
        of_shape.setdefault(tuple(sorted(part.shape)), []).append(key)
    results: dict[tuple[str, int], mx.array] = {}
    for keys in of_shape.values():
        results |= zip(keys, _together([parts[key] for key in keys]), strict=True)
    return {name: mx.concatenate([results[name, number] for number in range(count(name))]) for name in momenta}


def count(name: str) -> int:
    """Returns how many matrices a parameter has, one below the other: those of queries, keys and values count apart."""
    return 3 if name.endswith("attention.qkv.weight") else 1


def _together(matrices: Sequence[mx.array]) -> list[mx.array]:
    """Returns the updates of matrices of one shape, or its transpose."""
    tall = [matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T for matrix in matrices]
    updates = orthogonalised(mx.stack(tall)) * (UPDATE_RMS * tall[0].shape[0] ** 0.5)  # (N, R, S)
    return [
        update if update.shape == matrix.shape else update.T for update, matrix in zip(updates, matrices, strict=True)
    ]


def orthogonalised(matrices: mx.array) -> mx.array:
    """Returns (N, R, S) matrices with the same singular vectors and singular values close to 1, in fp32, by
    Newton-Schulz iterations: in bf16 on an NVIDIA GPU, and else in fp32."""
    norms = mx.sqrt(mx.square(matrices).sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
    x = (matrices / (norms + 1e-7)).astype(mx.bfloat16 if cuda.is_default_device() else mx.float32)
    for a, b, c in POLYNOMIALS:
        square = x.swapaxes(1, 2) @ x  # (N, S, S)
        polynomial = mx.addmm(square, square, square, alpha=c, beta=b)  # (N, S, S)
        x = mx.addmm(x, x, polynomial, beta=a)
    return x.astype(mx.float32)
