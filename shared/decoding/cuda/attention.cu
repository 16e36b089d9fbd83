// Attention of a row in a head, by a block. Each page is one warp's: its weights relative to the highest score in the page, and the
// weighted sum of its values. The sums of the pages are added in their order, so the number of warps changes nothing.
extern "C" __global__ void attend_rows(Arguments a) {
  constexpr int GROUPS = HEAD_GROUPS, EACH = PAGE / 32;
  // LANES lanes load the values of one position, AT_ONCE positions are loaded together, in ROUNDS rounds.
  constexpr int LANES = GROUPS > 8 ? 16 : GROUPS > 4 ? 8 : GROUPS > 2 ? 4 : GROUPS, AT_ONCE = 32 / LANES, ROUNDS = PAGE / AT_ONCE;
  constexpr int BATCH = ROUNDS < 8 ? ROUNDS : 8;
  alignas(16) __shared__ float query[GROUPS * 8];
  __shared__ float sums[PAGES][GROUPS * 8], highest[PAGES], totals[PAGES];
  const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Row at = a.rows[row];
  const int length = at.slot < 0 ? 0 : at.position + 1, pages = (length + PAGE - 1) / PAGE;
  const unsigned long long* table = a.pages + at.slot * PAGES;
  // The first vector of the keys and of the values of this head in a page.
  const int keys = (a.layer * 2 * HEADS + head) * GROUPS * PAGE, values = keys + HEADS * GROUPS * PAGE;
  // With few rows, memory is idle while the previous kernel runs.
  for (int page = warp; page < pages && gridDim.y <= FEW_ROWS; page += warps) {
    const uint4* vectors = reinterpret_cast<const uint4*>(table[page]);
    const int count = length - page * PAGE;
    for (int line = lane; line < GROUPS * PAGE / 8; line += 32) {
      if (line * 8 % PAGE < count) prefetch(vectors + keys + line * 8);
      if (line * 8 < count * GROUPS) prefetch(vectors + values + line * 8);
    }
  }
  wait_for_previous_kernel();
  if (at.slot < 0) return;
  for (int d = threadIdx.x; d < GROUPS * 8; d += blockDim.x)
    query[d] = d < HEAD_WIDTH ? a.queries[row * WIDTH + head * HEAD_WIDTH + d] * rsqrtf((float)HEAD_WIDTH) : 0.0f;
  synchronise();

  for (int page = warp; page < pages; page += warps) {
    const uint4* vectors = reinterpret_cast<const uint4*>(table[page]);
    const int count = length - page * PAGE < PAGE ? length - page * PAGE : PAGE, group = lane % LANES;
    float weights[EACH];
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int position = lane + 32 * i;
      float sum = -INFINITY;
      if (position < count) {
        sum = 0;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          const uint4 vector = vectors[keys + group * PAGE + position];
          const float* q = query + group * 8;
          sum = fmaf(low_bf16(vector.x), q[0], sum);
          sum = fmaf(high_bf16(vector.x), q[1], sum);
          sum = fmaf(low_bf16(vector.y), q[2], sum);
          sum = fmaf(high_bf16(vector.y), q[3], sum);
          sum = fmaf(low_bf16(vector.z), q[4], sum);
          sum = fmaf(high_bf16(vector.z), q[5], sum);
          sum = fmaf(low_bf16(vector.w), q[6], sum);
          sum = fmaf(high_bf16(vector.w), q[7], sum);
        }
      }
      weights[i] = sum;
      // fmaxf ignores NaN; the sum of the weights will be NaN.
      most = fmaxf(most, sum);
    }
    uint4 loaded[BATCH];
    auto load = [&](int round) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int position = (round + i) * AT_ONCE + lane / LANES;
        // What follows the last position may be anything.
        loaded[i] = position < count && group < GROUPS ? vectors[values + position * GROUPS + group] : uint4{0, 0, 0, 0};
      }
    };
    load(0);
    most = max_of_warp(most);
    float total = 0, s[8] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += weights[i] = expf(weights[i] - most);
    total = sum_of_warp(total);
#pragma unroll
    for (int round = 0; round < ROUNDS; round += BATCH) {
      if (round > 0) load(round);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int position = (round + i) * AT_ONCE;
        const float weight = shuffle(weights[position / 32], position % 32 + lane / LANES);
        s[0] = fmaf(weight, low_bf16(loaded[i].x), s[0]);
        s[1] = fmaf(weight, high_bf16(loaded[i].x), s[1]);
        s[2] = fmaf(weight, low_bf16(loaded[i].y), s[2]);
        s[3] = fmaf(weight, high_bf16(loaded[i].y), s[3]);
        s[4] = fmaf(weight, low_bf16(loaded[i].z), s[4]);
        s[5] = fmaf(weight, high_bf16(loaded[i].z), s[5]);
        s[6] = fmaf(weight, low_bf16(loaded[i].w), s[6]);
        s[7] = fmaf(weight, high_bf16(loaded[i].w), s[7]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int apart = LANES; apart < 32; apart *= 2) s[i] += shuffle_xor(s[i], apart);
      if (lane < GROUPS) sums[page][lane * 8 + i] = s[i];
    }
    if (lane == 0) highest[page] = most, totals[page] = total;
  }
  synchronise();
  for (int d = threadIdx.x; d < HEAD_WIDTH; d += blockDim.x) {
    float most = highest[0], total = 0, sum = 0;
    for (int page = 1; page < pages; ++page) most = fmaxf(most, highest[page]);
    for (int page = 0; page < pages; ++page) {
      const float weight = expf(highest[page] - most);
      total = fmaf(weight, totals[page], total);
      sum = fmaf(weight, sums[page][d], sum);
    }
    a.attended[packed<WIDTH_GROUPS>(row, head * HEAD_WIDTH + d)] = to_bf16(sum / total);
  }
}
