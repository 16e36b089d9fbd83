"""Softmax cross-entropy on an NVIDIA GPU, in one kernel that reads the logits from memory once.

Shapes: N rows, C width, V vocabulary, P its padded size.
"""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from shared.gpt import cuda
from shared.gpt.autograd import differentiable

# Matrix products are fast if their width is a multiple of this.
_MULTIPLE = 64
_THREADS = 1024
# With teachers a thread needs more registers than 1024 of them have.
_TAUGHT_THREADS = 512
# Rows whose logits exist at a time, of the student and of each teacher: 0.8 GB with GPT-2's vocabulary.
_CHUNK = 8192

# One block for each row. It reads the row twice, the second time from the GPU's cache.
_SOURCE = """
  constexpr int VECTORS = PADDED / 8;
  const long long row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(logits + row * PADDED);
  uint4* to = reinterpret_cast<uint4*>(difference + row * PADDED);

  const float one = 1.0f;
  float log_sum;
  log_sums<THREADS, VECTORS, VOCABULARY, 1>(from, &one, &log_sum);

  const int target = targets[row];
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

# The same with weights of the rows and the logits of teachers, %(rows)s.
_TAUGHT_SOURCE = """
  constexpr int VECTORS = PADDED / 8;
  constexpr int TEACHERS = %(teachers)d;
  constexpr float EACH = 1.0f / (TEACHERS > 0 ? TEACHERS : 1);
  constexpr float KEPT = 1.0f - %(alpha)sf, PULL = %(alpha)sf * %(temperature)sf, INVERSE = 1.0f / %(temperature)sf;
  // The logits are divided by the temperatures 1 and T, if these differ.
  constexpr int SCALES = INVERSE == 1.0f ? 1 : 2;
  const float scales[2] = {1.0f, INVERSE};
  const long long row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(logits + row * PADDED);
  const uint4* teachers[TEACHERS + 1] = {%(rows)snullptr};
  uint4* to = reinterpret_cast<uint4*>(difference + row * PADDED);

  float own[SCALES], theirs[TEACHERS + 1];
  log_sums<THREADS, VECTORS, VOCABULARY, SCALES>(from, scales, own);
  #pragma unroll
  for (int k = 0; k < TEACHERS; ++k) {
    log_sums<THREADS, VECTORS, VOCABULARY, 1>(teachers[k], scales + 1, theirs + k);
  }

  const int target = targets[row];
  const float weight = weights[row];
  if (threadIdx.x == 0) losses[row] = weight * (own[0] - __bfloat162float(logits[row * PADDED + target]));
  #pragma unroll 2
  for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
    float numbers[8], taught[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    unpack(from[vector], numbers);
    #pragma unroll
    for (int k = 0; k < TEACHERS; ++k) {
      float others[8];
      unpack(teachers[k][vector], others);
      #pragma unroll
      for (int j = 0; j < 8; ++j) taught[j] += __expf(INVERSE * others[j] - theirs[k]);
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int token = vector * 8 + j;
      const float probability = __expf(numbers[j] - own[0]);
      const float cooled = SCALES == 1 ? probability : __expf(INVERSE * numbers[j] - own[SCALES - 1]);
      const float slope = KEPT * (token == target ? probability - 1.0f : probability);
      numbers[j] = token < VOCABULARY ? weight * (slope + PULL * (cooled - EACH * taught[j])) : 0.0f;
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

// For each scale, the logarithm of the sum of the exponentials of a row of logits times the scale.
template <int THREADS, int VECTORS, int VOCABULARY, int SCALES>
__device__ __forceinline__ void log_sums(const uint4* from, const float* scales, float* results) {
  // The highest logit so far, and the sums of the exponentials relative to it.
  float highest = -1e30f;
  float sums[SCALES];
  #pragma unroll
  for (int s = 0; s < SCALES; ++s) sums[s] = 0.0f;
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
      #pragma unroll
      for (int s = 0; s < SCALES; ++s) sums[s] *= __expf(scales[s] * (highest - local));
      highest = local;
    }
    #pragma unroll
    for (int s = 0; s < SCALES; ++s) {
      #pragma unroll
      for (int j = 0; j < 8; ++j) sums[s] += __expf(scales[s] * (numbers[j] - highest));
    }
  }
  const float all_highest = over_block<THREADS>(highest, [](float a, float b) { return fmaxf(a, b); });
  #pragma unroll
  for (int s = 0; s < SCALES; ++s) {
    const float part = sums[s] * __expf(scales[s] * (highest - all_highest));
    results[s] = scales[s] * all_highest + __logf(over_block<THREADS>(part, [](float a, float b) { return a + b; }));
  }
}
"""
)


@differentiable
def mean_cross_entropy(
    hidden: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array | None,
    teachers: Sequence[tuple[mx.array, mx.array]],
    alpha: float,
    temperature: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the mean loss, in fp32, of (N, C) hidden states under a (V, C) head, both in bf16, given (N,) targets;
    and the gradients with respect to both, times N, of the loss of `loss.Distillation`. The weights of the targets are
    (N,), and each teacher has hidden states and a head.

    The gradients are computed with the loss, while the logits exist. Only this function pads the vocabulary.
    """
    vocabulary_size = weight.shape[0]
    padding = [(0, -vocabulary_size % _MULTIPLE), (0, 0)]
    padded, *heads = [mx.pad(head, padding) for head in (weight, *(head for _, head in teachers))]  # each (P, C)
    total = mx.zeros(())
    weight_gradient = mx.zeros(weight.shape)
    hidden_gradients: list[mx.array] = []
    size = _CHUNK // (1 + len(teachers))
    for start in range(0, targets.size, size):
        chunk = slice(start, start + size)
        rows, wanted, states = hidden[chunk], targets[chunk], [states[chunk] for states, _ in teachers]
        if hidden_gradients:
            # Otherwise MLX may compute the logits of all chunks first.
            rows, *states = mx.depends([rows, *states], [hidden_gradients[-1], weight_gradient])
        logits = rows @ padded.T  # (n, P)
        if teachers or weights is not None:
            theirs = [each @ head.T for each, head in zip(states, heads, strict=True)]  # each (n, P)
            counted = mx.ones(wanted.shape) if weights is None else weights[chunk]
            losses, difference = taught_cross_entropy(
                logits, theirs, wanted, counted, vocabulary_size, alpha=alpha, temperature=temperature
            )
        else:
            losses, difference = cross_entropy(logits, wanted, vocabulary_size)  # (n,), (n, P)
        total = total + losses.sum()
        hidden_gradients.append(difference @ padded)
        weight_gradient = weight_gradient + (difference.T @ rows)[:vocabulary_size]
    return total / targets.size, mx.concatenate(hidden_gradients), weight_gradient


@mean_cross_entropy.vjp  # type: ignore[untyped-decorator]
def _mean_cross_entropy_vjp(primals: list[Any], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[Any, ...]:
    hidden, weight, targets, *_ = primals
    scale = cotangents[0] / targets.size
    constant = tree_map(lambda leaf: mx.zeros_like(leaf) if isinstance(leaf, mx.array) else None, primals[2:])
    return (scale * outputs[1]).astype(hidden.dtype), (scale * outputs[2]).astype(weight.dtype), *constant


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


def taught_cross_entropy(
    logits: mx.array,
    teachers: Sequence[mx.array],
    targets: mx.array,
    weights: mx.array,
    vocabulary_size: int,
    *,
    alpha: float,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """Returns what `cross_entropy` does, but each row is multiplied by its weight (N,), and the gradient is that of the
    loss of `loss.Distillation`; the teachers' logits are (N, P) in bf16."""
    rows, columns = logits.shape
    losses, difference = _taught_kernel(len(teachers), alpha, temperature)(
        inputs=[logits, targets.astype(mx.int32), weights, *teachers],
        template=[("PADDED", columns), ("VOCABULARY", vocabulary_size), ("THREADS", _TAUGHT_THREADS)],
        grid=(rows * _TAUGHT_THREADS, 1, 1),
        threadgroup=(_TAUGHT_THREADS, 1, 1),
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


def taught_name(teachers: int, alpha: float, temperature: float) -> str:
    """Returns the name of a kernel, because MLX finds compiled kernels by their names: another one for other values."""
    values = "_".join(f"{float(each)!r}".replace(".", "p").replace("-", "m") for each in (alpha, temperature))
    return f"taught_cross_entropy_{teachers}_{values}".replace("+", "")


@functools.cache
def _taught_kernel(teachers: int, alpha: float, temperature: float) -> Any:
    names = [f"teacher{number}" for number in range(teachers)]
    rows = "".join(f"reinterpret_cast<const uint4*>({name} + row * PADDED), " for name in names)
    values = {"teachers": teachers, "alpha": float(alpha), "temperature": float(temperature), "rows": rows}
    return mx.fast.cuda_kernel(
        name=taught_name(teachers, alpha, temperature),
        input_names=["logits", "targets", "weights", *names],
        output_names=["losses", "difference"],
        source=_TAUGHT_SOURCE % values,
        header=_HEADER,
    )
