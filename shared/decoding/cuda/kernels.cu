// Computes rows of a GPT-2 on an NVIDIA GPU: weights, keys and values in bf16, sums and the residual stream in fp32.
//
// A row is a token at a position of a slot. Nothing that is computed for a row depends on the rows beside it, nor on how many
// there are: a product sums over its inputs in an order that follows from their number alone, attention in one that follows from
// the positions. Prompts and decoding rows take the same way.
//
// The defined constants are WIDTH, HEADS, HIDDEN, VOCABULARY, POSITIONS and EPSILON. `primitives.cuh` comes before this file.
// Shapes: R rows, K inputs of a product, N outputs, C width, H heads, D head width, F hidden width, V vocabulary.

constexpr int HEAD_WIDTH = WIDTH / HEADS;
// The positions of a page, which holds keys and values of all layers.
constexpr int PAGE = 64;
constexpr int PAGES = (POSITIONS + PAGE - 1) / PAGE;
// Numbers are loaded and multiplied in groups of 8 and 32; buffers and weights are padded with zeros to whole groups.
__device__ constexpr int up_to(int multiple, int size) { return (size + multiple - 1) / multiple * multiple; }
constexpr int HEAD_GROUPS = up_to(8, HEAD_WIDTH) / 8;
constexpr int WIDTH_STRIDE = up_to(32, WIDTH);
constexpr int HIDDEN_STRIDE = up_to(32, HIDDEN);
constexpr int VOCABULARY_STRIDE = up_to(16, VOCABULARY);

// `step` counts the tokens that were drawn for the row while the host waited.
struct Row {
  int token, slot, position, step;
};

// `row` is one of the rows of logits; `token` is the masked one, or the target of a loss; -1: none.
struct Draw {
  int row, token;
  float inverse, uniform;
};

// The argument of every kernel; each uses some of it. Rows without a slot have -1, and so have places of `wanted` without a row.
struct Arguments {
  Row* rows;                       // (R,)
  const int* wanted;               // (R,): rows whose logits are wanted
  const unsigned long long* pages; // (slots, PAGES): addresses
  const Half* tokens;              // (V, C)
  const Half* places;              // (POSITIONS, C)
  const float* norm_weight;        // (C,)
  const float* norm_bias;          // (C,)
  const uint4* weight;             // (N, K), packed for `mma`
  const float* bias;               // (N,)
  float* stream;                   // (R, C): the residual stream
  Half* normed;                    // (R, WIDTH_STRIDE)
  float* queries;                  // (R, C)
  Half* attended;                  // (R, WIDTH_STRIDE)
  Half* hidden;                    // (R, HIDDEN_STRIDE)
  float* logits;                   // (R, VOCABULARY_STRIDE)
  const Draw* draws;
  int* drawn;
  float* losses;
  int layer, unused;
};

// The number of warps among which a product divides its inputs.
__device__ constexpr int warps_for(int K) { return K > 1024 || up_to(32, K) / 32 % 8 == 0 ? 8 : 4; }

__device__ float sum_of_warp(float value) {
  for (int apart = 16; apart > 0; apart /= 2) value += shuffle_xor(value, apart);
  return value;
}

__device__ float max_of_warp(float value) {
  for (int apart = 16; apart > 0; apart /= 2) value = fmaxf(value, shuffle_xor(value, apart));
  return value;
}

// Writes the LayerNorm (C,) of a row, by one warp.
__device__ void normalise(const Arguments& a, const float* from, Half* to) {
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
    if (c < WIDTH) to[c] = to_half(fmaf((values[i] - mean) * scale, a.norm_weight[c], a.norm_bias[c]));
  }
}

// Token and position embeddings.
extern "C" __global__ void embed_rows(Arguments a) {
  const Row row = a.rows[blockIdx.x];
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
    a.stream[blockIdx.x * WIDTH + c] =
        row.slot < 0 ? 0.0f : to_float(a.tokens[(long long)row.token * WIDTH + c]) + to_float(a.places[row.position * WIDTH + c]);
}

// LayerNorm of all rows, one for each warp.
extern "C" __global__ void normalise_rows(Arguments a) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  normalise(a, a.stream + row * WIDTH, a.normed + row * WIDTH_STRIDE);
}

// LayerNorm of the wanted rows.
extern "C" __global__ void normalise_wanted(Arguments a) {
  const int place = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, row = a.wanted[place];
  if (row >= 0) normalise(a, a.stream + row * WIDTH, a.normed + place * WIDTH_STRIDE);
}

// The kinds of products: what comes in, and where the sums go.

struct Queries {
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
      Half* page = reinterpret_cast<Half*>(a.pages[at.slot * PAGES + at.position / PAGE]);
      const int group = ((a.layer * 2 + kind - 1) * HEADS + c / HEAD_WIDTH) * HEAD_GROUPS + d / 8;
      page[(group * PAGE + at.position % PAGE) * 8 + d % 8] = to_half(value);
    }
  }
};

struct Projection {
  static constexpr int INPUTS = WIDTH, OUTPUTS = WIDTH;
  static constexpr bool NORMED = false, WANTED = false;
  static __device__ const Half* from(const Arguments& a) { return a.attended; }
  static __device__ void store(const Arguments& a, int row, int output, float value) { a.stream[row * WIDTH + output] += value; }
};

struct Up {
  static constexpr int INPUTS = WIDTH, OUTPUTS = HIDDEN;
  static constexpr bool NORMED = true, WANTED = false;
  // GELU in its tanh form, as in the model.
  static __device__ void store(const Arguments& a, int row, int output, float value) {
    const float inner = 0.7978845608028654f * fmaf(0.044715f * value * value, value, value);
    a.hidden[row * HIDDEN_STRIDE + output] = to_half(0.5f * value * (1.0f + tanhf(inner)));
  }
};

struct Down {
  static constexpr int INPUTS = HIDDEN, OUTPUTS = WIDTH;
  static constexpr bool NORMED = false, WANTED = false;
  static __device__ const Half* from(const Arguments& a) { return a.hidden; }
  static __device__ void store(const Arguments& a, int row, int output, float value) { a.stream[row * WIDTH + output] += value; }
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
  constexpr int K = Kind::INPUTS, GROUPS = up_to(32, K) / 32, WARPS = warps_for(K);
  constexpr bool NORMS = Kind::NORMED && TILES <= 2 && K <= 1024;
  // Eight lanes read two rows at a time, which lie in different banks with this stride.
  constexpr int STRIDE = NORMS ? GROUPS * 32 + (GROUPS % 2 == 0 ? 32 : 0) : GROUPS * 32;
  alignas(16) __shared__ Half own[NORMS ? 8 * TILES * STRIDE : 8];
  __shared__ float sums[WARPS][16 * 8 * TILES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * 8 * TILES;
  const uint4* weights = a.weight + (long long)blockIdx.x * GROUPS * 64 + lane;
  const Half* rows;
  if constexpr (NORMS) {
    for (int row = warp; row < 8 * TILES; row += WARPS) {
      for (int c = K + lane; c < STRIDE; c += 32) own[row * STRIDE + c] = to_half(0.0f);
      const int from = Kind::WANTED ? a.wanted[first + row] : first + row;
      if (from >= 0) {
        normalise(a, a.stream + from * WIDTH, own + row * STRIDE);
      } else {
        for (int c = lane; c < K; c += 32) own[row * STRIDE + c] = to_half(0.0f);
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
  constexpr int GROUPS = WIDTH_STRIDE / 32, PARTS = warps_for(WIDTH), TILES = 8;
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

PRODUCT(Queries, queries)
PRODUCT(Projection, projection)
PRODUCT(Up, up)
PRODUCT(Down, down)
extern "C" __global__ void head_8(Arguments a) { multiply<Head, 1>(a); }
extern "C" __global__ void head_16(Arguments a) { multiply<Head, 2>(a); }
extern "C" __global__ void head_32(Arguments a) { multiply<Head, 4>(a); }
extern "C" __global__ void head_64(Arguments a) { multiply_wide(a); }

// Attention of a row in a head, by a block of four warps; a thread has each 128th position.
extern "C" __global__ void attend_rows(Arguments a) {
  constexpr int THREADS = 128, GROUPS = HEAD_GROUPS, KEPT = 8;
  alignas(16) __shared__ float query[GROUPS * 8];
  __shared__ float scores[PAGES * PAGE];
  __shared__ float parts[THREADS / 32][KEPT][GROUPS * 8];
  __shared__ float totals[2][THREADS / 32];
  const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Row at = a.rows[row];
  if (at.slot < 0) return;
  const unsigned long long* pages = a.pages + at.slot * PAGES;
  const int length = at.position + 1;
  // The first vector of the keys and of the values of this head in a page.
  const int keys = (a.layer * 2 * HEADS + head) * GROUPS * PAGE, values = keys + HEADS * GROUPS * PAGE;
  if (threadIdx.x < GROUPS * 8)
    query[threadIdx.x] = threadIdx.x < HEAD_WIDTH ? a.queries[row * WIDTH + head * HEAD_WIDTH + threadIdx.x] : 0.0f;
  synchronise();

  const float scale = rsqrtf((float)HEAD_WIDTH);
  float highest = -INFINITY;
  for (int position = threadIdx.x; position < length; position += THREADS) {
    const uint4* vectors = reinterpret_cast<const uint4*>(pages[position / PAGE]) + keys + position % PAGE;
    float sum = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const uint4 vector = vectors[group * PAGE];
      const float* q = query + group * 8;
      sum = fmaf(low_half(vector.x), q[0], sum);
      sum = fmaf(high_half(vector.x), q[1], sum);
      sum = fmaf(low_half(vector.y), q[2], sum);
      sum = fmaf(high_half(vector.y), q[3], sum);
      sum = fmaf(low_half(vector.z), q[4], sum);
      sum = fmaf(high_half(vector.z), q[5], sum);
      sum = fmaf(low_half(vector.w), q[6], sum);
      sum = fmaf(high_half(vector.w), q[7], sum);
    }
    scores[position] = sum * scale;
    // fmaxf ignores NaN; the sum of the weights will be NaN.
    highest = fmaxf(highest, sum * scale);
  }
  highest = max_of_warp(highest);
  if (lane == 0) totals[0][warp] = highest;
  synchronise();
  for (int each = 0; each < THREADS / 32; ++each) highest = fmaxf(highest, totals[0][each]);

  float weights = 0, sums[GROUPS * 8] = {};
  for (int position = threadIdx.x; position < length; position += THREADS) {
    const uint4* vectors = reinterpret_cast<const uint4*>(pages[position / PAGE]) + values + position % PAGE;
    const float weight = expf(scores[position] - highest);
    weights += weight;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const uint4 vector = vectors[group * PAGE];
      float* s = sums + group * 8;
      s[0] = fmaf(weight, low_half(vector.x), s[0]);
      s[1] = fmaf(weight, high_half(vector.x), s[1]);
      s[2] = fmaf(weight, low_half(vector.y), s[2]);
      s[3] = fmaf(weight, high_half(vector.y), s[3]);
      s[4] = fmaf(weight, low_half(vector.z), s[4]);
      s[5] = fmaf(weight, high_half(vector.z), s[5]);
      s[6] = fmaf(weight, low_half(vector.w), s[6]);
      s[7] = fmaf(weight, high_half(vector.w), s[7]);
    }
  }
  weights = sum_of_warp(weights);
  if (lane == 0) totals[1][warp] = weights;
#pragma unroll
  for (int d = 0; d < GROUPS * 8; ++d) {
    sums[d] += shuffle_xor(sums[d], 16);
    sums[d] += shuffle_xor(sums[d], 8);
    if (lane < KEPT) parts[warp][lane][d] = sums[d];
  }
  synchronise();
  if (threadIdx.x < HEAD_WIDTH) {
    float total = 0, sum = 0;
    for (int each = 0; each < THREADS / 32; ++each) total += totals[1][each];
    for (int each = 0; each < THREADS / 32; ++each)
      for (int kept = 0; kept < KEPT; ++kept) sum += parts[each][kept][threadIdx.x];
    a.attended[row * WIDTH_STRIDE + head * HEAD_WIDTH + threadIdx.x] = to_half(sum / total);
  }
}

// Drawing and scoring: a block of 16 warps for each draw.
constexpr int DRAW_WARPS = 16;

// The place where the sums of some weights pass a share of the sum of all, and the share of the weight there that is needed.
struct Place {
  int index;
  float left;
};

// Finds it among (count,) weights, by one warp; all lanes return it. No place with a weight of 0 is found.
template <class Weight>
__device__ Place find_place(int count, float share, Weight weight) {
  const int lane = threadIdx.x % 32, each = (count + 31) / 32, first = lane * each;
  const int last = first + each < count ? first + each : count;
  float own = 0;
  for (int i = first; i < last; ++i) own += weight(i);
  float before = own;  // the sum up to this lane
  for (int apart = 1; apart < 32; apart *= 2) {
    const float lower = shuffle_up(before, apart);
    if (lane >= apart) before += lower;
  }
  const float sum = shuffle(before, 31);
  const float target = fminf(share * sum, sum * (1.0f - 0x1p-23f));
  // The last weight above 0 of this lane at or before the target, if none passes it.
  Place place{-1, 0};
  float reached = before - own;
  bool passed = false;
  for (int i = first; i < last; ++i) {
    const float w = weight(i);
    if (w <= 0 || passed) continue;
    passed = reached + w > target;
    place = Place{i, fminf(fmaxf((target - reached) / w, 0.0f), 1.0f)};
    reached += w;
  }
  // The first lane that passes the target; rounding can leave none, and then the last weight above 0 counts.
  const unsigned passing = ballot(passed), holding = ballot(place.index >= 0);
  const int from = passing ? first_bit(passing) : holding ? last_bit(holding) : 0;
  return Place{shuffle(place.index, from), shuffle(place.left, from)};
}

struct Highest {
  float value;
  int token;
  bool finite;
};

// Returns the highest logit that may be drawn, the first of equal ones, and whether all logits are finite, to all threads.
__device__ Highest find_highest(const float* logits, int masked) {
  __shared__ float values[DRAW_WARPS];
  __shared__ int tokens[DRAW_WARPS], sound[DRAW_WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Highest mine{-INFINITY, VOCABULARY, true};
  for (int token = threadIdx.x; token < VOCABULARY; token += 32 * DRAW_WARPS) {
    const float value = logits[token];
    mine.finite &= is_finite(value);
    if (token != masked && value > mine.value) mine = Highest{value, token, mine.finite};
  }
  for (int apart = 16; apart > 0; apart /= 2) {
    const float value = shuffle_xor(mine.value, apart);
    const int token = shuffle_xor(mine.token, apart);
    if (value > mine.value || (value == mine.value && token < mine.token)) mine = Highest{value, token, mine.finite};
  }
  const bool finite = ballot(mine.finite) == 0xffffffffu;
  if (lane == 0) values[warp] = mine.value, tokens[warp] = mine.token, sound[warp] = finite;
  synchronise();
  Highest best{values[0], tokens[0], true};
  for (int each = 0; each < DRAW_WARPS; ++each) {
    best.finite &= sound[each] != 0;
    if (values[each] > best.value || (values[each] == best.value && tokens[each] < best.token))
      best = Highest{values[each], tokens[each], best.finite};
  }
  return best;
}

// Draws a token at a temperature: first a range of the vocabulary by its sum, then the token in it. Thread 0 returns it; -1 if
// a logit is not finite.
__device__ int draw_token(const float* logits, const Draw& wanted) {
  constexpr int RANGE = up_to(32, (VOCABULARY + 1023) / 1024 > 256 ? (VOCABULARY + 1023) / 1024 : 256);
  constexpr int RANGES = (VOCABULARY + RANGE - 1) / RANGE;
  __shared__ float sums[RANGES];
  const Highest highest = find_highest(logits, wanted.token);
  if (!highest.finite || wanted.inverse == 0) return highest.finite ? highest.token : -1;
  const int masked = wanted.token;
  const float inverse = wanted.inverse, most = highest.value;
  auto weight = [=](int token) {
    return token == masked || token >= VOCABULARY ? 0.0f : expf((logits[token] - most) * inverse);
  };
  const int lane = threadIdx.x % 32;
  for (int range = threadIdx.x / 32; range < RANGES; range += DRAW_WARPS) {
    float sum = 0;
    for (int i = lane; i < RANGE; i += 32) sum += weight(range * RANGE + i);
    sum = sum_of_warp(sum);
    if (lane == 0) sums[range] = sum;
  }
  synchronise();
  if (threadIdx.x >= 32) return -1;
  const float* totals = sums;
  const Place range = find_place(RANGES, wanted.uniform, [=](int i) { return totals[i]; });
  const Place token = find_place(RANGE, range.left, [=](int i) { return weight(range.index * RANGE + i); });
  return range.index * RANGE + token.index;
}

extern "C" __global__ void draw_tokens(Arguments a) {
  const Draw wanted = a.draws[blockIdx.x];
  const int token = draw_token(a.logits + (long long)wanted.row * VOCABULARY_STRIDE, wanted);
  if (threadIdx.x == 0) a.drawn[blockIdx.x] = token;
}

// Draws the next token of each row, and makes it the row's token. The draws, and what is drawn, are (steps, R).
extern "C" __global__ void draw_next(Arguments a) {
  const int row = blockIdx.x;
  const Row at = a.rows[row];
  if (at.slot < 0) return;
  const int place = at.step * gridDim.x + row;
  const int token = draw_token(a.logits + (long long)row * VOCABULARY_STRIDE, a.draws[place]);
  // The other threads may still read the row.
  synchronise();
  if (threadIdx.x > 0) return;
  a.drawn[place] = token;
  // A row ends where its context does.
  a.rows[row] = Row{token < 0 ? 0 : token, at.position + 1 < POSITIONS ? at.slot : -1, at.position + 1, at.step + 1};
}

// The losses in nats of given tokens; NaN if a logit is not finite.
extern "C" __global__ void score_tokens(Arguments a) {
  __shared__ float sums[DRAW_WARPS];
  const Draw wanted = a.draws[blockIdx.x];
  const float* logits = a.logits + (long long)wanted.row * VOCABULARY_STRIDE;
  const Highest highest = find_highest(logits, -1);
  float sum = 0;
  for (int token = threadIdx.x; token < VOCABULARY; token += 32 * DRAW_WARPS) sum += expf(logits[token] - highest.value);
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  synchronise();
  if (threadIdx.x > 0) return;
  for (int each = 1; each < DRAW_WARPS; ++each) sum += sums[each];
  a.losses[blockIdx.x] = highest.finite ? logf(sum) + highest.value - logits[wanted.token] : NAN;
}
