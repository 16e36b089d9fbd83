"""AdamW on an NVIDIA GPU: a few kernels update the whole model, instead of several kernels for each array."""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx

Item = TypeVar("Item")

_THREADS = 256
# Numbers that a block updates.
_CHUNK = 4096
# The arguments of a CUDA kernel take at most 4 KiB, and each array needs up to seven pointers.
_ARRAYS = 64

# A block looks up the array of its chunk and the position of the chunk in that array.
_FIND = """
  const int start = table[2 * blockIdx.x + 1];
  int size = 0;
  bool narrow = false;
  const void* g = nullptr;
%(variables)s
  switch (table[2 * blockIdx.x]) {
%(cases)s
  }
  const int first = start + threadIdx.x, end = min(start + CHUNK, size);
"""

_HEADER = """
__device__ bool is_narrow(const float*) { return false; }
__device__ bool is_narrow(const __nv_bfloat16*) { return true; }
"""

_SQUARES_HEADER = (
    _HEADER
    + """
template <typename G>
__device__ float squares(const G* __restrict__ g, int first, int end) {
  float sum = 0.0f;
  #pragma unroll 4
  for (int i = first; i < end; i += 256) {
    const float value = static_cast<float>(g[i]);
    sum += value * value;
  }
  return sum;
}
"""
)

_SQUARES = """
  float sum = narrow ? squares((const __nv_bfloat16*)g, first, end) : squares((const float*)g, first, end);
  __shared__ float warps[8];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 8; ++i) sum += warps[i];
    partial[blockIdx.x] = sum;
  }
"""

_UPDATE_HEADER = (
    _HEADER
    + """
template <typename G>
__device__ void update(
    const float* __restrict__ p, const G* __restrict__ g, const float* __restrict__ m, const float* __restrict__ v,
    float* __restrict__ new_p, float* __restrict__ new_m, float* __restrict__ new_v,
    int first, int end, const float* scalars, float beta1, float beta2, float epsilon, float decay) {
  const float rate = scalars[0], scale = scalars[1], correction1 = scalars[2], correction2 = scalars[3];
  #pragma unroll 4
  for (int i = first; i < end; i += 256) {
    const float gradient = static_cast<float>(g[i]) * scale;
    const float mean = beta1 * m[i] + (1.0f - beta1) * gradient;
    const float square = beta2 * v[i] + (1.0f - beta2) * gradient * gradient;
    new_m[i] = mean;
    new_v[i] = square;
    new_p[i] = p[i] * (1.0f - rate * decay) - rate * (mean / correction1) / (sqrtf(square / correction2) + epsilon);
  }
}
"""
)

_UPDATE_VARIABLES = """
  const float *p = nullptr, *m = nullptr, *v = nullptr;
  float *new_p = nullptr, *new_m = nullptr, *new_v = nullptr;
  float decay = 0.0f;
"""

_UPDATE = """
  if (narrow) {
    update(p, (const __nv_bfloat16*)g, m, v, new_p, new_m, new_v, first, end, scalars, BETA1, BETA2, EPSILON, decay);
  } else {
    update(p, (const float*)g, m, v, new_p, new_m, new_v, first, end, scalars, BETA1, BETA2, EPSILON, decay);
  }
"""


def squared_norm(arrays: Sequence[mx.array]) -> mx.array:
    """Returns the sum of the squares of all numbers in all arrays, in fp32."""
    sums = []
    for group in _groups(arrays):
        (partial,) = _squares_kernel(tuple(array.size for array in group))(
            inputs=[_table(tuple(array.size for array in group)), *group],
            grid=(_blocks(group) * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(_blocks(group),)],
            output_dtypes=[mx.float32],
        )
        sums.append(partial.sum())
    total: mx.array = sum(sums[1:], sums[0])
    return total


def update(
    parameters: Sequence[mx.array],
    gradients: Sequence[mx.array],
    first: Sequence[mx.array],
    second: Sequence[mx.array],
    scalars: mx.array,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """Returns new parameters and moments; weight decay applies to arrays of two or more axes.

    `scalars` are the learning rate, the factor that clips the gradients, and the bias corrections of both moments.
    Gradients may be of any type; everything else is fp32.
    """
    results: tuple[list[mx.array], list[mx.array], list[mx.array]] = ([], [], [])
    for group in _groups(list(zip(parameters, gradients, first, second, strict=True))):
        shapes = [p.shape for p, *_ in group]
        kernel = _update_kernel(
            tuple(p.size for p, *_ in group),
            tuple(weight_decay if p.ndim >= 2 else 0.0 for p, *_ in group),
            beta1,
            beta2,
            epsilon,
        )
        arrays = [p for p, *_ in group]
        table = _table(tuple(array.size for array in arrays))
        outputs = kernel(
            inputs=[table, scalars, *(array for column in zip(*group, strict=True) for array in column)],
            grid=(_blocks(arrays) * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=shapes * 3,
            output_dtypes=[mx.float32] * (3 * len(group)),
        )
        for number, result in enumerate(results):
            result += outputs[number * len(group) : (number + 1) * len(group)]
    return results


def _groups(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + _ARRAYS] for start in range(0, len(items), _ARRAYS)]


def _blocks(arrays: Sequence[mx.array]) -> int:
    return sum(-(-array.size // _CHUNK) for array in arrays)


def _table(sizes: tuple[int, ...]) -> mx.array:
    """For each block, the number of its array and the position of its chunk in that array, (blocks, 2)."""
    chunks = [(number, start) for number, size in enumerate(sizes) for start in range(0, size, _CHUNK)]
    return mx.array(chunks, dtype=mx.int32)


def _find(sizes: tuple[int, ...], variables: str = "", more: Sequence[str] = ()) -> str:
    cases = [
        f"    case {n}: size = {size}; g = g{n}; narrow = is_narrow(g{n}); {more[n] if more else ''} break;"
        for n, size in enumerate(sizes)
    ]
    return (_FIND % {"variables": variables, "cases": "\n".join(cases)}).replace("CHUNK", str(_CHUNK))


@functools.cache
def _squares_kernel(sizes: tuple[int, ...]) -> Any:
    return mx.fast.cuda_kernel(
        name="squared_norm",
        input_names=["table", *(f"g{n}" for n in range(len(sizes)))],
        output_names=["partial"],
        source=_find(sizes) + _SQUARES,
        header=_SQUARES_HEADER,
    )


@functools.cache
def _update_kernel(
    sizes: tuple[int, ...], decays: tuple[float, ...], beta1: float, beta2: float, epsilon: float
) -> Any:
    kinds = ("p", "m", "v", "new_p", "new_m", "new_v")
    more = [
        " ".join(f"{kind} = {kind}{n};" for kind in kinds) + f" decay = {decay}f;" for n, decay in enumerate(decays)
    ]
    constants = f"  constexpr float BETA1 = {beta1}f, BETA2 = {beta2}f, EPSILON = {epsilon:.9f}f;\n"
    return mx.fast.cuda_kernel(
        name="adamw",
        input_names=["table", "scalars", *(f"{kind}{n}" for kind in "pgmv" for n in range(len(sizes)))],
        output_names=[f"new_{kind}{n}" for kind in "pmv" for n in range(len(sizes))],
        source=constants + _find(sizes, _UPDATE_VARIABLES, more) + _UPDATE,
        header=_UPDATE_HEADER,
    )
