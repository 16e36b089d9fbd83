// Embeddings, LayerNorms and products.

// Writes the LayerNorm of `from` (C,) to a row of packed inputs, by one warp.
__device__ void normalise(const Arguments& a, const float* from, Bf16* to, int row) {
  constexpr int EACH = WIDTH_GROUPS;
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
    to[packed<WIDTH_GROUPS>(row, c)] = to_bf16(c < WIDTH ? fmaf((values[i] - mean) * scale, a.norm_weight[c], a.norm_bias[c]) : 0.0f);
  }
}

// Token and position embeddings.
extern "C" __global__ void embed_rows(Arguments a) {
  wait_for_previous_kernel();
  const Row row = a.rows[blockIdx.x];
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
    a.residual[blockIdx.x * WIDTH + c] =
        row.slot < 0 ? 0.0f : to_float(a.token_embedding[(long long)row.token * WIDTH + c]) + to_float(a.position_embedding[row.position * WIDTH + c]);
}

// LayerNorm of the wanted rows, one for each block of one warp.
extern "C" __global__ void normalise_wanted(Arguments a) {
  const int row = a.wanted[blockIdx.x];
  wait_for_previous_kernel();
  if (row >= 0) normalise(a, a.residual + row * WIDTH, a.normed, blockIdx.x);
}

// The kinds of products: what comes in, and where the sums go. A place is found before the sum is known, except in wide blocks.

struct Qkv {
  static constexpr int INPUTS = WIDTH, OUTPUTS = 3 * WIDTH;
  static constexpr bool NORMED = true;
  // Queries go to a buffer, keys and values to the page of the position.
  float* query = nullptr;
  Bf16* cached = nullptr;
  __device__ Qkv() {}
  __device__ Qkv(const Arguments& a, int row, int output) {
    const Row at = a.rows[row];
    if (at.slot < 0) return;
    const int kind = output / WIDTH, c = output % WIDTH, d = c % HEAD_WIDTH, place = at.position % PAGE;
    if (kind == 0) {
      query = a.queries + row * WIDTH + c;
    } else {
      const int head = (a.layer * 2 + kind - 1) * HEADS + c / HEAD_WIDTH;
      const int vector = head * HEAD_GROUPS * PAGE + (kind == 1 ? d / 8 * PAGE + place : place * HEAD_GROUPS + d / 8);
      cached = reinterpret_cast<Bf16*>(a.pages[at.slot * PAGES + at.position / PAGE]) + vector * 8 + d % 8;
    }
  }
  __device__ void store(float value) const {
    if (query) *query = value;
    if (cached) *cached = to_bf16(value);
  }
};

// Adds to the residual stream a product with the numbers of a buffer.
template <int K, Bf16* Arguments::*BUFFER>
struct ToResidual {
  static constexpr int INPUTS = K, OUTPUTS = WIDTH;
  static constexpr bool NORMED = false;
  static __device__ const Bf16* from(const Arguments& a) { return a.*BUFFER; }
  float* place;
  float before;
  __device__ ToResidual() {}
  __device__ ToResidual(const Arguments& a, int row, int output) : place(a.residual + row * WIDTH + output), before(*place) {}
  __device__ void store(float value) const { *place = before + value; }
};
using AttentionOutput = ToResidual<WIDTH, &Arguments::attended>;
using Down = ToResidual<HIDDEN, &Arguments::hidden>;

struct Up {
  static constexpr int INPUTS = WIDTH, OUTPUTS = HIDDEN;
  static constexpr bool NORMED = true;
  Bf16* place;
  __device__ Up() {}
  __device__ Up(const Arguments& a, int row, int output) : place(a.hidden + packed<HIDDEN_GROUPS>(row, output)) {}
  // GELU in its tanh form, as in the model.
  __device__ void store(float value) const {
    const float inner = 0.7978845608028654f * fmaf(0.044715f * value * value, value, value);
    *place = to_bf16(0.5f * value * (1.0f + tanhf(inner)));
  }
};

// A product of a layer sums its groups of 32 inputs in an order that follows from their number alone: every SUMS-th one, and then
// these sums. The head sums its groups one after the other.
template <class Kind>
struct Order {
  static constexpr int GROUPS = up_to(32, Kind::INPUTS) / 32, SUMS = Kind::INPUTS == WIDTH ? WIDTH_WARPS : HIDDEN_WARPS;
  static constexpr int EACH = (GROUPS + SUMS - 1) / SUMS;
};

// The row, and the output, of one of the four sums of a lane in `mma`.
__device__ int row_of(int i) { return threadIdx.x % 4 * 2 + i % 2; }
__device__ int output_of(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }

// The weights of 16 outputs for a group of 32 inputs.
__device__ void load_weights(const uint4* from, uint4 (&weights)[2]) { weights[0] = from[0], weights[1] = from[32]; }

// Adds the products of 16 outputs and 8 * TILES rows for a group of inputs; those of 8 rows are `apart` from those of the 8 before.
template <int TILES>
__device__ void add_products(float (&sums)[TILES][4], const uint4 (&weights)[2], const uint4* inputs, int apart) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const uint4 input = inputs[tile * apart];
    mma(sums[tile], weights[0], input.x, input.y);
    mma(sums[tile], weights[1], input.z, input.w);
  }
}

// Multiplies 16 outputs with 8 * TILES rows, of which it computes the LayerNorm if the product has one. Each warp has one of the
// sums, and the block adds them.
template <class Kind, int TILES>
__device__ void multiply(const Arguments& a) {
  constexpr int GROUPS = Order<Kind>::GROUPS, EACH = Order<Kind>::EACH, WARPS = Order<Kind>::SUMS;
  constexpr int SUMS = 16 * 8 * TILES, EACH_SUMS = (SUMS + 32 * WARPS - 1) / (32 * WARPS);
  // Weights are loaded before the previous kernel ends if they fit in registers.
  constexpr bool EARLY = EACH <= 6;
  constexpr int NORMED_BYTES = Kind::NORMED ? 8 * TILES * GROUPS * 32 * (int)sizeof(Bf16) : 0, SUMS_BYTES = WARPS * SUMS * (int)sizeof(float);
  // A block may share this much; wide rows with a LayerNorm are multiplied with fewer TILES.
  if constexpr (NORMED_BYTES <= SHARED_BYTES) {
    alignas(16) __shared__ char memory[NORMED_BYTES > SUMS_BYTES ? NORMED_BYTES : SUMS_BYTES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 8 * TILES;
    const uint4* weights = a.weight + (long long)blockIdx.y * GROUPS * 64 + lane;
    uint4 early[EARLY ? EACH : 1][2];
    if constexpr (EARLY) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int group = i * WARPS + warp;
        if (group < GROUPS) load_weights(weights + group * 64, early[i]);
      }
    }
    // The sums of a thread are all of one output.
    const int output = blockIdx.y * 16 + threadIdx.x % 16;
    const float bias = output < Kind::OUTPUTS ? a.bias[output] : 0.0f;
    wait_for_previous_kernel();

    Kind places[EACH_SUMS];
#pragma unroll
    for (int number = 0; number < EACH_SUMS; ++number) {
      const int i = number * 32 * WARPS + threadIdx.x;
      if (i < SUMS && output < Kind::OUTPUTS) places[number] = Kind(a, first + i / 16, output);
    }
    const uint4* inputs;
    if constexpr (Kind::NORMED) {
      for (int row = warp; row < 8 * TILES; row += WARPS) normalise(a, a.residual + (first + row) * WIDTH, reinterpret_cast<Bf16*>(memory), row);
      synchronise();
      inputs = reinterpret_cast<const uint4*>(memory) + lane;
    } else {
      inputs = reinterpret_cast<const uint4*>(Kind::from(a)) + first * GROUPS * 4 + lane;
    }

    float partial[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int group = i * WARPS + warp;
      if (group >= GROUPS) break;
      if constexpr (!EARLY) load_weights(weights + group * 64, early[0]);
      add_products(partial, early[EARLY ? i : 0], inputs + group * 32, GROUPS * 32);
    }
    // The sums take the place of the LayerNorm.
    if constexpr (Kind::NORMED) synchronise();
    float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp * SUMS + (tile * 8 + row_of(i)) * 16 + output_of(i)] = partial[tile][i];
    synchronise();
    if (output >= Kind::OUTPUTS) return;
#pragma unroll
    for (int number = 0; number < EACH_SUMS; ++number) {
      const int i = number * 32 * WARPS + threadIdx.x;
      if (i >= SUMS) return;
      float sum = sums[i];
#pragma unroll
      for (int each = 1; each < WARPS; ++each) sum += sums[each * SUMS + i];
      places[number].store(sum + bias);
    }
  }
}

// The same for products with a LayerNorm and many rows: each of WIDE_WARPS warps multiplies 16 outputs of its own with 8 * TILES rows,
// over all inputs. Blocks with the same outputs follow each other.
template <class Kind, int TILES>
__device__ void multiply_wide(const Arguments& a) {
  constexpr int GROUPS = Order<Kind>::GROUPS, EACH = Order<Kind>::EACH, SUMS = Order<Kind>::SUMS, ROWS = 8 * TILES;
  // Weights are loaded before the previous kernel ends if they fit in registers, of which a thread has 128.
  constexpr bool EARLY = GROUPS <= 12;
  constexpr int SHARED = ROWS * GROUPS * 32;
  if constexpr (SHARED * sizeof(Bf16) <= SHARED_BYTES) {
    alignas(16) __shared__ Bf16 normed[SHARED];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * ROWS, block = blockIdx.y * WIDE_WARPS + warp;
    const bool needed = block * 16 < Kind::OUTPUTS;
    const uint4* weights = a.weight + (long long)block * GROUPS * 64;
    uint4 early[EARLY ? GROUPS : 1][2];
    if constexpr (EARLY) {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group)
        if (needed) load_weights(weights + group * 64 + lane, early[group]);
    } else if (needed) {
      for (int line = lane; line < GROUPS * 8; line += 32) prefetch(weights + line * 8);
    }
    wait_for_previous_kernel();
    for (int row = warp; row < ROWS; row += WIDE_WARPS) normalise(a, a.residual + (first + row) * WIDTH, normed, row);
    synchronise();
    if (!needed) return;
    const uint4* inputs = reinterpret_cast<const uint4*>(normed) + lane;
    float sums[TILES][4];
#pragma unroll
    for (int number = 0; number < SUMS; ++number) {
      float partial[TILES][4] = {};
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int group = i * SUMS + number;
        if (group >= GROUPS) break;
        if constexpr (!EARLY) load_weights(weights + group * 64 + lane, early[0]);
        add_products(partial, early[EARLY ? group : 0], inputs + group * 32, GROUPS * 32);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] = number == 0 ? partial[tile][i] : sums[tile][i] + partial[tile][i];
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = block * 16 + output_of(i);
        if (output < Kind::OUTPUTS) Kind(a, first + tile * 8 + row_of(i), output).store(sums[tile][i] + a.bias[output]);
      }
  }
}

constexpr int HEAD_BLOCKS = VOCABULARY_STRIDE / 16;

// Writes sums of 16 outputs and 8 * TILES rows to the logits.
template <int TILES>
__device__ void store_logits(const Arguments& a, const float (&sums)[TILES][4], int first, int block) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + tile * 8 + row_of(i), output = block * 16 + output_of(i);
      // A later launch of the same call has room for its wanted rows only.
      if (output < VOCABULARY && a.wanted[row] >= 0) a.logits[(long long)row * VOCABULARY_STRIDE + output] = sums[tile][i];
    }
}

// Each warp multiplies 16 outputs with 8 * TILES rows.
template <int TILES>
__device__ void multiply_head(const Arguments& a) {
  constexpr int GROUPS = WIDTH_GROUPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 8 * TILES, block = blockIdx.y * WIDE_WARPS + warp;
  if (block >= HEAD_BLOCKS || a.wanted[first] < 0) return;
  const uint4* weights = a.weight + (long long)block * GROUPS * 64;
  for (int line = lane; line < GROUPS * 8; line += 32) prefetch(weights + line * 8);
  wait_for_previous_kernel();
  const uint4* inputs = reinterpret_cast<const uint4*>(a.normed) + first * GROUPS * 4 + lane;
  float sums[TILES][4] = {};
#pragma unroll(TILES > 2 ? 8 : 16)
  for (int group = 0; group < GROUPS; ++group) {
    uint4 loaded[2];
    load_weights(weights + group * 64 + lane, loaded);
    add_products(sums, loaded, inputs + group * 32, GROUPS * 32);
  }
  store_logits(a, sums, first, block);
}

// Writes sums of 32 outputs and 8 * TILES rows to the logits, through shared memory (8, STRIDE) of the warp, so that stores are
// coalesced; STRIDE avoids conflicts of banks. What it writes beyond the vocabulary is not drawn.
constexpr int STRIDE = 36;
template <int TILES>
__device__ void store_logits_coalesced(const Arguments& a, const float (&sums)[2][TILES][4], float* memory, int first, int outputs) {
  const int lane = threadIdx.x % 32, output = lane % 8 * 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) memory[row_of(i) * STRIDE + half * 16 + output_of(i)] = sums[half][tile][i];
    synchronise_warp();
#pragma unroll
    for (int r = lane / 8; r < 8; r += 4) {
      const int row = first + tile * 8 + r;
      if (outputs + output < VOCABULARY_STRIDE && a.wanted[row] >= 0)
        *reinterpret_cast<float4*>(a.logits + (long long)row * VOCABULARY_STRIDE + outputs + output) =
            *reinterpret_cast<const float4*>(memory + r * STRIDE + output);
    }
    synchronise_warp();
  }
}

// The same for many rows, with fewer reads of inputs and weights: each warp multiplies 32 outputs with all rows of the block. Inputs
// are copied to shared memory STAGES - 1 groups ahead, weights are loaded into registers one group ahead.
template <int TILES>
__device__ void multiply_head_staged(const Arguments& a) {
  constexpr int GROUPS = WIDTH_GROUPS, STAGES = 4, VECTORS = TILES * 32;
  __shared__ uint4 staged[STAGES][VECTORS];
  static_assert(WIDE_WARPS * 8 * STRIDE * sizeof(float) <= sizeof(staged), "The logits take the place of the inputs.");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 8 * TILES;
  if (a.wanted[first] < 0) return;
  const int block = (blockIdx.y * WIDE_WARPS + warp) * 2;
  const uint4* weights[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // A warp beyond the vocabulary repeats its last outputs, and does not write them.
    weights[half] = a.weight + (long long)(block + half < HEAD_BLOCKS ? block + half : HEAD_BLOCKS - 1) * GROUPS * 64;
    for (int line = lane; line < GROUPS * 8; line += 32) prefetch(weights[half] + line * 8);
  }
  uint4 next[2][2];
  load_weights(weights[0] + lane, next[0]);
  load_weights(weights[1] + lane, next[1]);
  wait_for_previous_kernel();
  const uint4* inputs = reinterpret_cast<const uint4*>(a.normed) + first * GROUPS * 4;
  auto stage = [&](int group) {
    if (group < GROUPS)
      for (int i = threadIdx.x; i < VECTORS; i += 32 * WIDE_WARPS)
        copy_to_shared(&staged[group % STAGES][i], inputs + (i / 32 * GROUPS + group) * 32 + i % 32);
    commit_copies();
  };
#pragma unroll
  for (int group = 0; group < STAGES - 1; ++group) stage(group);
  float sums[2][TILES][4] = {};
#pragma unroll 2
  for (int group = 0; group < GROUPS; ++group) {
    const uint4 now[2][2] = {{next[0][0], next[0][1]}, {next[1][0], next[1][1]}};
    if (group + 1 < GROUPS) {
      load_weights(weights[0] + (group + 1) * 64 + lane, next[0]);
      load_weights(weights[1] + (group + 1) * 64 + lane, next[1]);
    }
    wait_for_copies<STAGES - 2>();
    // Now all threads see this group, and have read the one before, whose stage is used again.
    synchronise();
    stage(group + STAGES - 1);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const uint4 input = staged[group % STAGES][tile * 32 + lane];
      mma(sums[0][tile], now[0][0], input.x, input.y);
      mma(sums[1][tile], now[1][0], input.x, input.y);
      mma(sums[0][tile], now[0][1], input.z, input.w);
      mma(sums[1][tile], now[1][1], input.z, input.w);
    }
  }
  synchronise();
  store_logits_coalesced(a, sums, reinterpret_cast<float*>(staged) + warp * 8 * STRIDE, first, block * 16);
}

// With the number of threads, and of blocks on a multiprocessor, the compiler knows how many registers each thread can have.
#define PRODUCT(kind, name, tiles) \
  extern "C" __global__ void __launch_bounds__(32 * Order<kind>::SUMS) name(Arguments a) { multiply<kind, tiles>(a); }
#define WIDE_PRODUCT(kind, name, tiles) \
  extern "C" __global__ void __launch_bounds__(32 * WIDE_WARPS, 2) name(Arguments a) { multiply_wide<kind, tiles>(a); }
#define HEAD(name, function) \
  extern "C" __global__ void __launch_bounds__(32 * WIDE_WARPS, 2) name(Arguments a) { function(a); }

PRODUCT(Qkv, qkv_8, 1)
PRODUCT(Qkv, qkv_16, 2)
PRODUCT(AttentionOutput, attention_output_8, 1)
PRODUCT(AttentionOutput, attention_output_16, 2)
PRODUCT(Up, up_8, 1)
PRODUCT(Up, up_16, 2)
PRODUCT(Down, down_8, 1)
PRODUCT(Down, down_16, 2)
WIDE_PRODUCT(Qkv, qkv_wide_8, 1)
WIDE_PRODUCT(Qkv, qkv_wide_16, 2)
WIDE_PRODUCT(Up, up_wide_8, 1)
WIDE_PRODUCT(Up, up_wide_16, 2)
HEAD(head_wide_8, multiply_head<1>)
HEAD(head_wide_16, multiply_head<2>)
HEAD(head_wide_32, multiply_head<4>)
HEAD(head_staged_64, multiply_head_staged<8>)
