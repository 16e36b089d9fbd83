// Embeddings, LayerNorms and products.

// Writes the LayerNorm (C,) of a row, by one warp.
__device__ void normalise(const Arguments& a, const float* from, Bf16* to) {
  constexpr int EACH = (WIDTH + 31) / 32;
  const int lane = threadIdx.x % 32;
  float values[EACH];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    values[i] = lane + 32 * i < WIDTH ? from[lane + 32 * i] : 0.0f;
    sum += values[i];
  }
  const float mean = sum_of_warp(sum) / WIDTH;
  sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const float apart = lane + 32 * i < WIDTH ? values[i] - mean : 0.0f;
    sum = fmaf(apart, apart, sum);
  }
  const float scale = rsqrtf(sum_of_warp(sum) / WIDTH + EPSILON);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int c = lane + 32 * i;
    if (c < WIDTH) to[c] = to_bf16(fmaf((values[i] - mean) * scale, a.norm_weight[c], a.norm_bias[c]));
  }
}

// Token and position embeddings.
extern "C" __global__ void embed_rows(Arguments a) {
  const Row row = a.rows[blockIdx.x];
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
    a.residual[blockIdx.x * WIDTH + c] =
        row.slot < 0 ? 0.0f : to_float(a.token_embedding[(long long)row.token * WIDTH + c]) + to_float(a.position_embedding[row.position * WIDTH + c]);
}

// LayerNorm of all rows, one for each warp.
extern "C" __global__ void normalise_rows(Arguments a) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  normalise(a, a.residual + row * WIDTH, a.normed + row * WIDTH_STRIDE);
}

// LayerNorm of the wanted rows.
extern "C" __global__ void normalise_wanted(Arguments a) {
  const int number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, row = a.wanted[number];
  if (row >= 0) normalise(a, a.residual + row * WIDTH, a.normed + number * WIDTH_STRIDE);
}

// The kinds of products: what comes in, and where the sums go.

struct Qkv {
  static constexpr int INPUTS = WIDTH, OUTPUTS = 3 * WIDTH;
  static constexpr bool NORMED = true, WANTED = false;
  // Stores queries in a buffer, keys and values in the page of the position.
  static __device__ void store(const Arguments& a, int row, int output, float value) {
    const Row at = a.rows[row];
    if (at.slot < 0) return;
    const int kind = output / WIDTH, c = output % WIDTH, d = c % HEAD_WIDTH;
    if (kind == 0) {
      a.queries[row * WIDTH + c] = value;
    } else {
      Bf16* page = reinterpret_cast<Bf16*>(a.pages[at.slot * PAGES + at.position / PAGE]);
      const int group = ((a.layer * 2 + kind - 1) * HEADS + c / HEAD_WIDTH) * HEAD_GROUPS + d / 8;
      page[(group * PAGE + at.position % PAGE) * 8 + d % 8] = to_bf16(value);
    }
  }
};

// Adds to the residual stream a product with the numbers of a buffer.
template <int K, Bf16* Arguments::*BUFFER>
struct ToResidual {
  static constexpr int INPUTS = K, OUTPUTS = WIDTH;
  static constexpr bool NORMED = false, WANTED = false;
  static __device__ const Bf16* from(const Arguments& a) { return a.*BUFFER; }
  static __device__ void store(const Arguments& a, int row, int output, float value) { a.residual[row * WIDTH + output] += value; }
};
using AttentionOutput = ToResidual<WIDTH, &Arguments::attended>;
using Down = ToResidual<HIDDEN, &Arguments::hidden>;

struct Up {
  static constexpr int INPUTS = WIDTH, OUTPUTS = HIDDEN;
  static constexpr bool NORMED = true, WANTED = false;
  // GELU in its tanh form, as in the model.
  static __device__ void store(const Arguments& a, int row, int output, float value) {
    const float inner = 0.7978845608028654f * fmaf(0.044715f * value * value, value, value);
    a.hidden[row * HIDDEN_STRIDE + output] = to_bf16(0.5f * value * (1.0f + tanhf(inner)));
  }
};

struct Head {
  static constexpr int INPUTS = WIDTH, OUTPUTS = VOCABULARY;
  static constexpr bool NORMED = true, WANTED = true;
  static __device__ void store(const Arguments& a, int row, int output, float value) {
    // A later launch of the same call has room for its wanted rows only.
    if (a.wanted[row] < 0) return;
    a.logits[(long long)row * VOCABULARY_STRIDE + output] = value;
  }
};

// Multiplies 16 outputs with 8 * TILES rows: each warp sums over its groups of 32 inputs, and the block adds the sums of the
// warps in their order. With few rows, a block computes the LayerNorm of its rows itself.
template <class Kind, int TILES>
__device__ void multiply(const Arguments& a) {
  constexpr int K = Kind::INPUTS, GROUPS = up_to(32, K) / 32, WARPS = K == WIDTH ? WIDTH_WARPS : HIDDEN_WARPS;
  constexpr bool NORMS = Kind::NORMED && 8 * TILES <= NORMED_ROWS && K <= NORMED_WIDTH;
  // Eight lanes read two rows at a time, which lie in different banks with this stride.
  constexpr int STRIDE = NORMS ? GROUPS * 32 + (GROUPS % 2 == 0 ? 32 : 0) : GROUPS * 32;
  alignas(16) __shared__ Bf16 own[NORMS ? 8 * TILES * STRIDE : 8];
  __shared__ float sums[WARPS][16 * 8 * TILES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * 8 * TILES;
  const uint4* weights = a.weight + (long long)blockIdx.x * GROUPS * 64 + lane;
  const Bf16* rows;
  if constexpr (NORMS) {
    for (int row = warp; row < 8 * TILES; row += WARPS) {
      for (int c = K + lane; c < STRIDE; c += 32) own[row * STRIDE + c] = to_bf16(0.0f);
      const int from = Kind::WANTED ? a.wanted[first + row] : first + row;
      if (from >= 0) {
        normalise(a, a.residual + from * WIDTH, own + row * STRIDE);
      } else {
        for (int c = lane; c < K; c += 32) own[row * STRIDE + c] = to_bf16(0.0f);
      }
    }
    synchronise();
    rows = own;
  } else {
    if constexpr (Kind::NORMED) rows = a.normed + (long long)first * STRIDE;
    else rows = Kind::from(a) + (long long)first * STRIDE;
  }
  const uint4* inputs = reinterpret_cast<const uint4*>(rows + lane / 4 * STRIDE) + lane % 4;

  float partial[TILES][4] = {};
#pragma unroll
  for (int i = 0; i < (GROUPS + WARPS - 1) / WARPS; ++i) {
    const int group = i * WARPS + warp;
    if (group >= GROUPS) break;
    const uint4 low = weights[group * 64], high = weights[group * 64 + 32];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const uint4 input = inputs[tile * STRIDE + group * 4];
      mma(partial[tile], low, input.x, input.y);
      mma(partial[tile], high, input.z, input.w);
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[warp][(tile * 8 + lane % 4 * 2 + i % 2) * 16 + lane / 4 + i / 2 * 8] = partial[tile][i];
  synchronise();
  for (int i = threadIdx.x; i < 16 * 8 * TILES; i += 32 * WARPS) {
    const int output = blockIdx.x * 16 + i % 16;
    if (output >= Kind::OUTPUTS) continue;
    float sum = sums[0][i];
    for (int each = 1; each < WARPS; ++each) sum += sums[each][i];
    Kind::store(a, first + i / 16, output, a.bias ? sum + a.bias[output] : sum);
  }
}

// The same sums for the head with many rows: each of four warps has 16 outputs of its own, and 64 rows.
__device__ void multiply_wide(const Arguments& a) {
  constexpr int GROUPS = WIDTH_STRIDE / 32, PARTS = WIDTH_WARPS, TILES = 8;
  const int lane = threadIdx.x % 32, first = blockIdx.y * 8 * TILES, block = blockIdx.x * 4 + threadIdx.x / 32;
  if (a.wanted[first] < 0 || block * 16 >= VOCABULARY) return;
  const uint4* weights = a.weight + (long long)block * GROUPS * 64 + lane;
  const uint4* inputs = reinterpret_cast<const uint4*>(a.normed + (long long)(first + lane / 4) * WIDTH_STRIDE) + lane % 4;
  float sums[TILES][4];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    float partial[TILES][4] = {};
#pragma unroll
    for (int group = part; group < GROUPS; group += PARTS) {
      const uint4 low = weights[group * 64], high = weights[group * 64 + 32];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const uint4 input = inputs[tile * WIDTH_STRIDE + group * 4];
        mma(partial[tile], low, input.x, input.y);
        mma(partial[tile], high, input.z, input.w);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = part == 0 ? partial[tile][i] : sums[tile][i] + partial[tile][i];
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int output = block * 16 + lane / 4 + i / 2 * 8;
      if (output < VOCABULARY) Head::store(a, first + tile * 8 + lane % 4 * 2 + i % 2, output, sums[tile][i]);
    }
}

#define PRODUCT(kind, name)                                            \
  extern "C" __global__ void name##_8(Arguments a) { multiply<kind, 1>(a); }  \
  extern "C" __global__ void name##_16(Arguments a) { multiply<kind, 2>(a); } \
  extern "C" __global__ void name##_32(Arguments a) { multiply<kind, 4>(a); } \
  extern "C" __global__ void name##_64(Arguments a) { multiply<kind, 8>(a); }

PRODUCT(Qkv, qkv)
PRODUCT(AttentionOutput, attention_output)
PRODUCT(Up, up)
PRODUCT(Down, down)
extern "C" __global__ void head_8(Arguments a) { multiply<Head, 1>(a); }
extern "C" __global__ void head_16(Arguments a) { multiply<Head, 2>(a); }
extern "C" __global__ void head_32(Arguments a) { multiply<Head, 4>(a); }
extern "C" __global__ void head_64(Arguments a) { multiply_wide(a); }
