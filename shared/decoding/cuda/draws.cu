// Drawing and scoring: first sums of ranges of the vocabulary, then a warp for each draw.

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

// Sums ranges of the logits of a draw, one for each warp.
__device__ void sum_ranges(const Arguments& a, const DrawInput& draw, int number) {
  const int range = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (range >= RANGES) return;
  constexpr int EACH = RANGE / 128;
  const float4* logits = reinterpret_cast<const float4*>(a.logits + (long long)draw.logits_row * VOCABULARY_STRIDE);
  float values[EACH][4];
  float highest = -INFINITY, sum = 0;
  const float inverse = draw.inverse_temperature;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int vector = range * (RANGE / 4) + i * 32 + lane;
    const float4 four = vector * 4 < VOCABULARY ? logits[vector] : float4{0, 0, 0, 0};
    const float each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = vector * 4 + j;
      finite &= token >= VOCABULARY || is_finite(each[j]);
      values[i][j] = token >= VOCABULARY || token == draw.masked ? -INFINITY : each[j];
      highest = fmaxf(highest, values[i][j]);
    }
  }
  highest = max_of_warp(highest);
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (values[i][j] > -INFINITY) sum += inverse > 0 ? rough_exp((values[i][j] - highest) * inverse) : 1.0f;
  sum = sum_of_warp(sum);
  if (ballot(!finite)) sum = NAN;
  if (lane == 0) a.ranges[number * RANGES + range] = RangeSum{highest, sum};
}

// Returns to all lanes of a warp the highest logit of a draw; NaN if a logit is not finite.
__device__ float find_highest(const RangeSum* ranges) {
  float highest = -INFINITY;
  bool finite = true;
  for (int range = threadIdx.x % 32; range < RANGES; range += 32) {
    highest = fmaxf(highest, ranges[range].highest);
    finite &= is_finite(ranges[range].sum);
  }
  highest = max_of_warp(highest);
  return ballot(!finite) ? NAN : highest;
}

// Returns to all lanes the first of (count,) items for which a condition holds.
template <class Condition>
__device__ int find_first(int count, Condition holds) {
  for (int first = 0;; first += 32) {
    const int i = first + threadIdx.x % 32;
    if (const unsigned found = ballot(i < count && holds(i))) return first + first_bit(found);
  }
}

// Draws a token at a temperature, by one warp: first a range by its sum, then the token in it. Returns it to all lanes; -1 if a
// logit is not finite.
__device__ int draw_token(const Arguments& a, const DrawInput& draw, int number) {
  __shared__ float sums[RANGES];
  const RangeSum* ranges = a.ranges + number * RANGES;
  const float* logits = a.logits + (long long)draw.logits_row * VOCABULARY_STRIDE;
  const float highest = find_highest(ranges), inverse = draw.inverse_temperature;
  const int masked = draw.masked;
  if (!is_finite(highest)) return -1;
  if (inverse == 0) {
    const int first = find_first(RANGES, [=](int i) { return ranges[i].highest == highest; }) * RANGE;
    return first + find_first(RANGE, [=](int i) { return first + i < VOCABULARY && first + i != masked && logits[first + i] == highest; });
  }
  for (int range = threadIdx.x; range < RANGES; range += 32)
    sums[range] = ranges[range].sum > 0 ? ranges[range].sum * rough_exp((ranges[range].highest - highest) * inverse) : 0.0f;
  synchronise();
  const float* totals = sums;
  const CdfPoint range = find_in_cdf(RANGES, draw.uniform, [=](int i) { return totals[i]; });
  const int first = range.index * RANGE;
  const CdfPoint token = find_in_cdf(RANGE, range.fraction, [=](int i) {
    return first + i == masked || first + i >= VOCABULARY ? 0.0f : rough_exp((logits[first + i] - highest) * inverse);
  });
  return first + token.index;
}

// The draws for rows, and what is drawn, are (steps, R).
__device__ int draw_of_row(const Arguments& a, const Row& row) { return row.step * gridDim.y + blockIdx.y; }

extern "C" __global__ void sum_ranges_of_draws(Arguments a) {
  wait_for_previous_kernel();
  sum_ranges(a, a.draws[blockIdx.y], blockIdx.y);
}

extern "C" __global__ void sum_ranges_of_rows(Arguments a) {
  const Row row = a.rows[blockIdx.y];
  wait_for_previous_kernel();
  if (row.slot >= 0) sum_ranges(a, a.draws[draw_of_row(a, row)], blockIdx.y);
}

extern "C" __global__ void draw_tokens(Arguments a) {
  wait_for_previous_kernel();
  const int token = draw_token(a, a.draws[blockIdx.y], blockIdx.y);
  if (threadIdx.x == 0) a.drawn[blockIdx.y] = token;
}

// Draws the next token of each row, and makes it the row's token.
extern "C" __global__ void draw_next(Arguments a) {
  const Row row = a.rows[blockIdx.y];
  wait_for_previous_kernel();
  if (row.slot < 0) return;
  const int number = draw_of_row(a, row), token = draw_token(a, a.draws[number], blockIdx.y);
  if (threadIdx.x > 0) return;
  a.drawn[number] = token;
  // A row ends where its context ends, or when it draws no token.
  const bool goes_on = token >= 0 && row.position + 1 < POSITIONS;
  a.rows[blockIdx.y] = Row{token, goes_on ? row.slot : -1, row.position + 1, row.step + 1};
}

// Replaces the rows by those that go on from the batch before, and wants the logits of all of them. One block does it.
extern "C" __global__ void continue_rows(Arguments a) {
  wait_for_previous_kernel();
  const int place = a.places[threadIdx.x];
  Row row{0, -1, 0, 0};
  if (place >= 0) row = a.rows[place];
  // All reads precede the writes.
  synchronise();
  a.rows[threadIdx.x] = Row{row.token, row.slot, row.position, 0};
  a.wanted[threadIdx.x] = place < 0 ? -1 : (int)threadIdx.x;
}

// The losses in nats of targets; NaN if a logit is not finite.
extern "C" __global__ void score_tokens(Arguments a) {
  wait_for_previous_kernel();
  const DrawInput draw = a.draws[blockIdx.y];
  const RangeSum* ranges = a.ranges + blockIdx.y * RANGES;
  const float highest = find_highest(ranges);
  float sum = 0;
  for (int range = threadIdx.x; range < RANGES; range += 32) sum += ranges[range].sum * expf(ranges[range].highest - highest);
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) a.losses[blockIdx.y] = logf(sum) + highest - a.logits[(long long)draw.logits_row * VOCABULARY_STRIDE + draw.target];
}
