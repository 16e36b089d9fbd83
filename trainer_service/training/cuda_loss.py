"""Softmax cross-entropy on an NVIDIA GPU, in one kernel that reads the logits from memory once.

Shapes: N rows, C width, V vocabulary, P its padded size.
"""

import functools
from typing import Any

import mlx.core as mx

from shared.gpt import cuda
from shared.gpt.autograd import differentiable

# Matrix products are fast if their width is a multiple of this.
_MULTIPLE = 64
_THREADS = 1024
# Rows whose logits exist at a time: 3.3 GB with GPT-2's vocabulary.
_CHUNK = 32768

# One block for each row. It reads the row twice, the second time from the GPU's cache.
_SOURCE = """
  constexpr int VECTORS = PADDED / 8;
  const long long row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(logits + row * PADDED);
  uint4* to = reinterpret_cast<uint4*>(difference + row * PADDED);

  // The highest logit so far, and the sum of the exponentials relative to it.
  float highest = -1e30f;
  float sum = 0.0f;
  #pragma unroll 4
  for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
    float numbers[8];
    unpack(from[vector], numbers);
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (vector * 8 + j >= VOCABULARY) numbers[j] = -1e30f;
    }
    float local = numbers[0];
    #pragma unroll
    for (int j = 1; j < 8; ++j) local = fmaxf(local, numbers[j]);
    if (local > highest) {
      sum *= __expf(highest - local);
      highest = local;
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j) sum += __expf(numbers[j] - highest);
  }
  const float all_highest = over_block<THREADS>(highest, [](float a, float b) { return fmaxf(a, b); });
  const float all_sum =
      over_block<THREADS>(sum * __expf(highest - all_highest), [](float a, float b) { return a + b; });

  const int target = targets[row];
  const float log_sum = all_highest + __logf(all_sum);
  if (threadIdx.x == 0) losses[row] = log_sum - __bfloat162float(logits[row * PADDED + target]);
  #pragma unroll 4
  for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
    float numbers[8];
    unpack(from[vector], numbers);
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int token = vector * 8 + j;
      numbers[j] = token < VOCABULARY ? __expf(numbers[j] - log_sum) : 0.0f;
      if (token == target) numbers[j] -= 1.0f;
    }
    __stcs(to + vector, pack(numbers));
  }
"""

_HEADER = (
    cuda.VECTORS_HEADER
    + """
template <int THREADS, typename Combine>
__device__ float over_block(float value, Combine combine) {
  __shared__ float warps[32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[threadIdx.x % (THREADS / 32)];
  for (int offset = THREADS / 64; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  return value;
}
"""
)


@differentiable
def mean_cross_entropy(hidden: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the mean loss, in fp32, of (N, C) hidden states under a (V, C) head, both in bf16, given (N,) targets;
    and its gradients with respect to both, times N.

    The gradients are computed with the loss, while the logits exist. Only this function pads the vocabulary.
    """
    vocabulary_size = weight.shape[0]
    padded = mx.pad(weight, [(0, -vocabulary_size % _MULTIPLE), (0, 0)])  # (P, C)
    total = mx.zeros(())
    weight_gradient = mx.zeros(weight.shape)
    hidden_gradients = []
    for start in range(0, targets.size, _CHUNK):
        rows, wanted = hidden[start : start + _CHUNK], targets[start : start + _CHUNK]
        losses, difference = cross_entropy(rows @ padded.T, wanted, vocabulary_size)  # (n,), (n, P)
        total = total + losses.sum()
        hidden_gradients.append(difference @ padded)
        weight_gradient = weight_gradient + (difference.T @ rows)[:vocabulary_size]
    return total / targets.size, mx.concatenate(hidden_gradients), weight_gradient


@mean_cross_entropy.vjp  # type: ignore[untyped-decorator]
def _mean_cross_entropy_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    hidden, weight, targets = primals
    scale = cotangents[0] / targets.size
    return (
        (scale * outputs[1]).astype(hidden.dtype),
        (scale * outputs[2]).astype(weight.dtype),
        mx.zeros_like(targets),
    )


def cross_entropy(logits: mx.array, targets: mx.array, vocabulary_size: int) -> tuple[mx.array, mx.array]:
    """Returns the loss (N,) in fp32 of each row of (N, P) logits in bf16, and its gradient (N, P) in bf16.

    The softmax covers the first `vocabulary_size` columns; the gradient of the others is 0.
    """
    rows, columns = logits.shape
    losses, difference = _kernel()(
        inputs=[logits, targets.astype(mx.int32)],
        template=[("PADDED", columns), ("VOCABULARY", vocabulary_size), ("THREADS", _THREADS)],
        grid=(rows * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows,), (rows, columns)],
        output_dtypes=[mx.float32, mx.bfloat16],
    )
    return losses, difference


@functools.cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="cross_entropy",
        input_names=["logits", "targets"],
        output_names=["losses", "difference"],
        source=_SOURCE,
        header=_HEADER,
    )
