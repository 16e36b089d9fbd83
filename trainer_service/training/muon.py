"""Muon: the momentum of a matrix is replaced by the nearest matrix with orthogonal rows or columns.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; for the size of an update,
Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
Shapes: N matrices of R rows and S columns, S at most R.
"""

from collections.abc import Mapping

import mlx.core as mx

# The coefficients of the polynomial x (a + b x^2 + c x^4), which moves every singular value close to 1 in five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
MOMENTUM = 0.95
# The root mean square of an update's numbers at a rate of 1: about that of AdamW, so that both take the same rate.
_UPDATE_RMS = 0.2
# The matrices that lie side by side in one array: queries, keys and values.
_JOINED = {"attention.qkv.weight": 3}


def is_matrix(name: str) -> bool:
    """Returns whether Muon updates the parameter with this name: the matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def directions(momenta: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Returns the updates of matrices at a rate of 1, from their momenta, by their names.

    Matrices of one shape are orthogonalised together, in bf16 on an NVIDIA GPU and else in fp32.
    """
    groups: dict[tuple[int, int], list[tuple[str, int, mx.array]]] = {}
    for name, momentum in momenta.items():
        count = next((count for end, count in _JOINED.items() if name.endswith(end)), 1)
        for number, part in enumerate(mx.split(momentum, count)):
            tall = part if part.shape[0] >= part.shape[1] else part.T
            groups.setdefault(tuple(tall.shape), []).append((name, number, tall))
    parts: dict[str, dict[int, mx.array]] = {name: {} for name in momenta}
    for (rows, _), group in groups.items():
        stacked = orthogonalised(mx.stack([matrix for _, _, matrix in group])) * (_UPDATE_RMS * rows**0.5)
        for (name, number, _), matrix in zip(group, stacked, strict=True):
            parts[name][number] = matrix
    result = {}
    for name, momentum in momenta.items():
        pieces = [parts[name][number] for number in range(len(parts[name]))]
        if momentum.shape[0] < momentum.shape[1]:
            pieces = [piece.T for piece in pieces]
        result[name] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
    return result


def orthogonalised(matrices: mx.array) -> mx.array:
    """Returns (N, R, S) matrices with the same singular vectors and singular values close to 1, in fp32, by
    Newton-Schulz iterations."""
    norms = mx.sqrt(mx.square(matrices).sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
    x = (matrices / (norms + 1e-7)).astype(mx.bfloat16 if mx.cuda.is_available() else mx.float32)
    for _ in range(_ITERATIONS):
        square = x.swapaxes(1, 2) @ x  # (N, S, S)
        polynomial = mx.addmm(square, square, square, alpha=_C, beta=_B)  # (N, S, S)
        x = mx.addmm(x, x, polynomial, beta=_A)
    return x.astype(mx.float32)
