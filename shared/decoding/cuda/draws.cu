// Drawing and scoring: a block of DRAW_WARPS warps for each draw.

struct CdfPoint {
  int index;
  float fraction;
};

// Inverse-CDF sampling by one warp: returns to all lanes the index at which the cumulative sum of (count,) weights passes a share
// of the whole sum, and how far into that weight, from 0 to 1. The weight there is never 0.
template <class Weight>
__device__ CdfPoint find_in_cdf(int count, float share, Weight weight) {
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
  CdfPoint point{-1, 0};
  float reached = before - own;
  bool passed = false;
  for (int i = first; i < last; ++i) {
    const float w = weight(i);
    if (w <= 0 || passed) continue;
    passed = reached + w > target;
    point = CdfPoint{i, fminf(fmaxf((target - reached) / w, 0.0f), 1.0f)};
    reached += w;
  }
  // The first lane that passes the target; rounding can leave none, and then the last weight above 0 counts.
  const unsigned passing = ballot(passed), holding = ballot(point.index >= 0);
  const int from = passing ? first_bit(passing) : holding ? last_bit(holding) : 0;
  return CdfPoint{shuffle(point.index, from), shuffle(point.fraction, from)};
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
__device__ int draw_token(const float* logits, const DrawInput& wanted) {
  constexpr int RANGE = up_to(32, (VOCABULARY + 1023) / 1024 > 256 ? (VOCABULARY + 1023) / 1024 : 256);
  constexpr int RANGES = (VOCABULARY + RANGE - 1) / RANGE;
  __shared__ float sums[RANGES];
  const Highest highest = find_highest(logits, wanted.token);
  if (!highest.finite || wanted.inverse_temperature == 0) return highest.finite ? highest.token : -1;
  const int masked = wanted.token;
  const float inverse = wanted.inverse_temperature, most = highest.value;
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
  const CdfPoint range = find_in_cdf(RANGES, wanted.uniform, [=](int i) { return totals[i]; });
  const CdfPoint token = find_in_cdf(RANGE, range.fraction, [=](int i) { return weight(range.index * RANGE + i); });
  return range.index * RANGE + token.index;
}

extern "C" __global__ void draw_tokens(Arguments a) {
  const DrawInput wanted = a.draws[blockIdx.x];
  const int token = draw_token(a.logits + (long long)wanted.logits_row * VOCABULARY_STRIDE, wanted);
  if (threadIdx.x == 0) a.drawn[blockIdx.x] = token;
}

// Draws the next token of each row, and makes it the row's token. The draws, and what is drawn, are (steps, R).
extern "C" __global__ void draw_next(Arguments a) {
  const int row = blockIdx.x;
  const Row at = a.rows[row];
  if (at.slot < 0) return;
  const int output = at.step * gridDim.x + row;
  const int token = draw_token(a.logits + (long long)row * VOCABULARY_STRIDE, a.draws[output]);
  // All threads have read the row before a barrier in `draw_token`.
  if (threadIdx.x > 0) return;
  a.drawn[output] = token;
  // A row ends where its context does.
  a.rows[row] = Row{token < 0 ? 0 : token, at.position + 1 < POSITIONS ? at.slot : -1, at.position + 1, at.step + 1};
}

// The losses in nats of given tokens; NaN if a logit is not finite.
extern "C" __global__ void score_tokens(Arguments a) {
  __shared__ float sums[DRAW_WARPS];
  const DrawInput wanted = a.draws[blockIdx.x];
  const float* logits = a.logits + (long long)wanted.logits_row * VOCABULARY_STRIDE;
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
