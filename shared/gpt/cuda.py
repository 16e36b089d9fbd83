"""Kernels for an NVIDIA GPU, which access memory less often than MLX's own. All in bf16.

Shapes: N rows, C and F widths.
"""

import functools
from typing import Any

import mlx.core as mx

from shared.gpt.autograd import differentiable

_THREADS = 256
# Numbers of bf16 that a thread reads at a time, 16 bytes.
_VECTOR = 8
# Rows that one block of the column sums adds.
_STRIP = 256
# Rows of which one block adds the gradients of a LayerNorm's weights.
_NORM_STRIP = 128

# Converts vectors of 8 bf16 numbers in 16 bytes to fp32 and back.
VECTORS_HEADER = """
__device__ void unpack(uint4 held, float* numbers) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&held);
  #pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = __bfloat1622float2(pairs[j]);
    numbers[2 * j] = pair.x;
    numbers[2 * j + 1] = pair.y;
  }
}

__device__ uint4 pack(const float* numbers) {
  uint4 held;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&held);
  #pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(numbers[2 * j], numbers[2 * j + 1]);
  return held;
}
"""

_HEADER = (
    VECTORS_HEADER
    + """
__device__ float gate(float x) {
  return 1.0f / (1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

__device__ float over_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  return value;
}

template <int VECTORS, int PER_LANE>
__device__ void load(const __nv_bfloat16* row, int lane, float* numbers) {
  #pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (i * 32 + lane < VECTORS) unpack(reinterpret_cast<const uint4*>(row)[i * 32 + lane], numbers + i * 8);
  }
}

// Rounds the sum to bf16, as the next layer reads it.
template <int VECTORS, int PER_LANE>
__device__ void load_sum(const __nv_bfloat16* row, const __nv_bfloat16* other, int lane, float* numbers) {
  load<VECTORS, PER_LANE>(row, lane, numbers);
  #pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (i * 32 + lane < VECTORS) {
      float added[8];
      unpack(reinterpret_cast<const uint4*>(other)[i * 32 + lane], added);
      #pragma unroll
      for (int j = 0; j < 8; ++j) added[j] += numbers[i * 8 + j];
      unpack(pack(added), numbers + i * 8);
    }
  }
}

// The mean of a row, and one over its standard deviation.
template <int VECTORS, int PER_LANE>
__device__ void moments(const float* numbers, int lane, float* mean, float* scale) {
  float sum = 0.0f, squares = 0.0f;
  #pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (i * 32 + lane < VECTORS) {
      #pragma unroll
      for (int j = 0; j < 8; ++j) sum += numbers[i * 8 + j];
    }
  }
  *mean = over_warp(sum) / (VECTORS * 8);
  #pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (i * 32 + lane < VECTORS) {
      #pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float distance = numbers[i * 8 + j] - *mean;
        squares += distance * distance;
      }
    }
  }
  *scale = rsqrtf(over_warp(squares) / (VECTORS * 8) + 1e-5f);
}
"""
)

_GELU = """
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= VECTORS) return;
  float numbers[8];
  unpack(reinterpret_cast<const uint4*>(x)[i], numbers);
  #pragma unroll
  for (int j = 0; j < 8; ++j) numbers[j] *= gate(numbers[j]);
  reinterpret_cast<uint4*>(result)[i] = pack(numbers);
"""

_GELU_GRADIENT = """
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= VECTORS) return;
  float numbers[8], cotangents[8];
  unpack(reinterpret_cast<const uint4*>(x)[i], numbers);
  unpack(reinterpret_cast<const uint4*>(cotangent)[i], cotangents);
  #pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = gate(numbers[j]);
    const float slope = 1.5957691216f * (1.0f + 0.134145f * numbers[j] * numbers[j]);
    cotangents[j] *= g * (1.0f + numbers[j] * (1.0f - g) * slope);
  }
  reinterpret_cast<uint4*>(result)[i] = pack(cotangents);
"""

# A block adds a strip of rows: 32 threads with 8 columns each, in 8 lanes that share the rows.
_COLUMN_SUMS = """
  const int vector = blockIdx.x * 32 + threadIdx.x % 32;
  const int lane = threadIdx.x / 32;
  const long long first = (long long)blockIdx.y * STRIP;
  const long long end = first + STRIP < ROWS ? first + STRIP : ROWS;
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (vector < VECTORS) {
    #pragma unroll 4
    for (long long row = first + lane; row < end; row += 8) {
      float numbers[8];
      unpack(reinterpret_cast<const uint4*>(x)[row * VECTORS + vector], numbers);
      #pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += numbers[j];
    }
  }
  __shared__ float lanes[8][32][9];
  #pragma unroll
  for (int j = 0; j < 8; ++j) lanes[lane][threadIdx.x % 32][j] = sums[j];
  __syncthreads();
  const int column = threadIdx.x % 32;
  float total = 0.0f;
  #pragma unroll
  for (int i = 0; i < 8; ++i) total += lanes[i][column][lane];
  if (vector < VECTORS) partial[(long long)blockIdx.y * VECTORS * 8 + vector * 8 + lane] = total;
"""

# A warp computes a row at a time, each lane every 32nd vector of it.
_ADD_NORM = """
  const int lane = threadIdx.x % 32;
  const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= ROWS) return;
  float numbers[PER_LANE * 8];
  float mean, scale;
  load_sum<VECTORS, PER_LANE>(x + row * VECTORS * 8, delta + row * VECTORS * 8, lane, numbers);
  moments<VECTORS, PER_LANE>(numbers, lane, &mean, &scale);
  #pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int vector = i * 32 + lane;
    if (vector < VECTORS) {
      float weights[8], biases[8], result[8];
      unpack(reinterpret_cast<const uint4*>(weight)[vector], weights);
      unpack(reinterpret_cast<const uint4*>(bias)[vector], biases);
      #pragma unroll
      for (int j = 0; j < 8; ++j) result[j] = (numbers[i * 8 + j] - mean) * scale * weights[j] + biases[j];
      reinterpret_cast<uint4*>(sum)[row * VECTORS + vector] = pack(numbers + i * 8);
      reinterpret_cast<uint4*>(normed)[row * VECTORS + vector] = pack(result);
    }
  }
"""

# The warps of a block take turns at its strip of rows; each sums the gradients of the weight and the bias.
_ADD_NORM_GRADIENT = """
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long first = (long long)blockIdx.x * STRIP;
  const long long end = first + STRIP < ROWS ? first + STRIP : ROWS;
  float weight_sums[PER_LANE * 8], bias_sums[PER_LANE * 8];
  #pragma unroll
  for (int i = 0; i < PER_LANE * 8; ++i) weight_sums[i] = bias_sums[i] = 0.0f;
  for (long long row = first + warp; row < end; row += 8) {
    float numbers[PER_LANE * 8], slopes[PER_LANE * 8];
    float mean, scale, slope_mean = 0.0f, product_mean = 0.0f;
    load<VECTORS, PER_LANE>(sum + row * VECTORS * 8, lane, numbers);
    load<VECTORS, PER_LANE>(normed_cotangent + row * VECTORS * 8, lane, slopes);
    moments<VECTORS, PER_LANE>(numbers, lane, &mean, &scale);
    #pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int vector = i * 32 + lane;
      if (vector < VECTORS) {
        float weights[8];
        unpack(reinterpret_cast<const uint4*>(weight)[vector], weights);
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& number = numbers[i * 8 + j];
          float& slope = slopes[i * 8 + j];
          number = (number - mean) * scale;
          weight_sums[i * 8 + j] += slope * number;
          bias_sums[i * 8 + j] += slope;
          slope *= weights[j];
          slope_mean += slope;
          product_mean += slope * number;
        }
      }
    }
    slope_mean = over_warp(slope_mean) / (VECTORS * 8);
    product_mean = over_warp(product_mean) / (VECTORS * 8);
    #pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int vector = i * 32 + lane;
      if (vector < VECTORS) {
        float cotangents[8];
        unpack(reinterpret_cast<const uint4*>(sum_cotangent)[row * VECTORS + vector], cotangents);
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
          cotangents[j] += scale * (slopes[i * 8 + j] - slope_mean - numbers[i * 8 + j] * product_mean);
        }
        reinterpret_cast<uint4*>(gradient)[row * VECTORS + vector] = pack(cotangents);
      }
    }
  }
  __shared__ float warps[8][32 * 8 + 8];
  #pragma unroll
  for (int i = 0; i < 2 * PER_LANE; ++i) {
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      warps[warp][lane * 8 + j] = i < PER_LANE ? weight_sums[i * 8 + j] : bias_sums[(i - PER_LANE) * 8 + j];
    }
    __syncthreads();
    float total = 0.0f;
    #pragma unroll
    for (int other = 0; other < 8; ++other) total += warps[other][threadIdx.x];
    const int column = (i % PER_LANE) * 256 + threadIdx.x;
    if (column < VECTORS * 8) partial[((long long)blockIdx.x * 2 + i / PER_LANE) * VECTORS * 8 + column] = total;
  }
"""


def is_default_device() -> bool:
    """Returns whether MLX's default device is an NVIDIA GPU."""
    return mx.cuda.is_available() and bool(mx.default_device().type == mx.DeviceType.gpu)


def usable(x: mx.array) -> bool:
    """Returns whether these kernels fit an array: on an NVIDIA GPU, in bf16, with a width that is a multiple of 8."""
    return is_default_device() and x.dtype == mx.bfloat16 and x.shape[-1] % _VECTOR == 0


@differentiable
def gelu(x: mx.array) -> mx.array:
    """Computes GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), element by element."""
    return _elementwise("gelu", _GELU, ("x",), x)


@gelu.vjp  # type: ignore[untyped-decorator]
def _gelu_vjp(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    return _elementwise("gelu_gradient", _GELU_GRADIENT, ("x", "cotangent"), x, cotangent)


@differentiable
def add_norm(x: mx.array, delta: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Returns x + delta and its LayerNorm with a weight and a bias (C,), each (..., C)."""
    rows, width = x.size // x.shape[-1], x.shape[-1]
    total, normed = _kernel("add_norm", ("x", "delta", "weight", "bias"), ("sum", "normed"), _ADD_NORM)(
        inputs=[x, delta, weight, bias],
        template=_row_template(rows, width),
        grid=(-(-rows // 8) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[mx.bfloat16, mx.bfloat16],
    )
    return total, normed


@add_norm.vjp  # type: ignore[untyped-decorator]
def _add_norm_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
    x, _, weight, bias = primals
    rows, width = x.size // x.shape[-1], x.shape[-1]
    strips = -(-rows // _NORM_STRIP)
    gradient, partial = _kernel(
        "add_norm_gradient",
        ("sum", "weight", "sum_cotangent", "normed_cotangent"),
        ("gradient", "partial"),
        _ADD_NORM_GRADIENT,
    )(
        inputs=[outputs[0], weight, *cotangents],
        template=[*_row_template(rows, width), ("STRIP", _NORM_STRIP)],
        grid=(strips * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[x.shape, (strips, 2, width)],
        output_dtypes=[mx.bfloat16, mx.float32],
    )
    sums = partial.sum(axis=0)  # (2, C)
    return gradient, gradient, sums[0].astype(weight.dtype), sums[1].astype(bias.dtype)


def _row_template(rows: int, width: int) -> list[tuple[str, int]]:
    return [("ROWS", rows), ("VECTORS", width // _VECTOR), ("PER_LANE", -(-width // (32 * _VECTOR)))]


def column_sums(x: mx.array) -> mx.array:
    """Returns the sums (F,) in fp32 of (N, F) over its rows."""
    rows, width = x.shape
    strips = -(-rows // _STRIP)
    (partial,) = _kernel("column_sums", ("x",), ("partial",), _COLUMN_SUMS)(
        inputs=[x],
        template=[("ROWS", rows), ("VECTORS", width // _VECTOR), ("STRIP", _STRIP)],
        grid=(-(-width // _THREADS) * _THREADS, strips, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(strips, width)],
        output_dtypes=[mx.float32],
    )
    sums: mx.array = partial.sum(axis=0)
    return sums


def _elementwise(name: str, source: str, inputs: tuple[str, ...], *arrays: mx.array) -> mx.array:
    vectors = arrays[0].size // _VECTOR
    (result,) = _kernel(name, inputs, ("result",), source)(
        inputs=list(arrays),
        template=[("VECTORS", vectors)],
        grid=(-(-vectors // _THREADS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[arrays[0].shape],
        output_dtypes=[mx.bfloat16],
    )
    return result  # type: ignore[no-any-return]


@functools.cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    return mx.fast.cuda_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=_HEADER
    )
