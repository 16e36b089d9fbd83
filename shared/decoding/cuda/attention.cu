// Attention of a row in a head, by a block; each thread handles every ATTENTION_THREADS-th position.
extern "C" __global__ void attend_rows(Arguments a) {
  constexpr int THREADS = ATTENTION_THREADS, GROUPS = HEAD_GROUPS, KEPT = 8;
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
      sum = fmaf(low_bf16(vector.x), q[0], sum);
      sum = fmaf(high_bf16(vector.x), q[1], sum);
      sum = fmaf(low_bf16(vector.y), q[2], sum);
      sum = fmaf(high_bf16(vector.y), q[3], sum);
      sum = fmaf(low_bf16(vector.z), q[4], sum);
      sum = fmaf(high_bf16(vector.z), q[5], sum);
      sum = fmaf(low_bf16(vector.w), q[6], sum);
      sum = fmaf(high_bf16(vector.w), q[7], sum);
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
      s[0] = fmaf(weight, low_bf16(vector.x), s[0]);
      s[1] = fmaf(weight, high_bf16(vector.x), s[1]);
      s[2] = fmaf(weight, low_bf16(vector.y), s[2]);
      s[3] = fmaf(weight, high_bf16(vector.y), s[3]);
      s[4] = fmaf(weight, low_bf16(vector.z), s[4]);
      s[5] = fmaf(weight, high_bf16(vector.z), s[5]);
      s[6] = fmaf(weight, low_bf16(vector.w), s[6]);
      s[7] = fmaf(weight, high_bf16(vector.w), s[7]);
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
    a.attended[row * WIDTH_STRIDE + head * HEAD_WIDTH + threadIdx.x] = to_bf16(sum / total);
  }
}
