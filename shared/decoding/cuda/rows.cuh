// Computes rows of a GPT-2 on an NVIDIA GPU: weights, keys and values in bf16, sums and the residual stream in fp32.
//
// A row is a token at a position of a slot. Nothing that is computed for a row depends on the rows beside it, nor on how many
// there are: a product sums over its inputs in an order that follows from their number alone, attention in one that follows from
// the positions. Prompts and decoding rows use the same kernels.
//
// `program.py` joins primitives.cuh, rows.cuh, products.cu, attention.cu and draws.cu, and defines the shape, the sizes of pages and
// ranges of the vocabulary, and the warps of a product.
//
// Every kernel waits for the previous one before it reads what a kernel writes. It may read rows, `wanted` and the table of pages
// earlier: they change only between steps.
// Shapes: R rows, K inputs of a product, N outputs, C width, H heads, D head width, F hidden width, V vocabulary.

constexpr int HEAD_WIDTH = WIDTH / HEADS;
// A page holds keys and values of all layers at PAGE positions.
constexpr int PAGES = (POSITIONS + PAGE - 1) / PAGE;
// Numbers are loaded and multiplied in groups of 8 and 32; buffers and weights are padded with zeros to whole groups.
__device__ constexpr int up_to(int multiple, int size) { return (size + multiple - 1) / multiple * multiple; }
constexpr int HEAD_GROUPS = up_to(8, HEAD_WIDTH) / 8;
constexpr int WIDTH_GROUPS = up_to(32, WIDTH) / 32;
constexpr int HIDDEN_GROUPS = up_to(32, HIDDEN) / 32;
constexpr int VOCABULARY_STRIDE = up_to(16, VOCABULARY);
// Inputs of products are packed for `mma`, whose lanes load 32 of 8 rows at a time: (R / 8, GROUPS, 8, 32).
template <int GROUPS>
__device__ int packed(int row, int input) { return ((row / 8 * GROUPS + input / 32) * 8 + row % 8) * 32 + input % 32; }

// `step` counts the tokens that were drawn for the row while the host waited.
struct Row {
  int token, slot, position, step;
};

// What a draw, or a score, needs beside a row of logits. `masked` is not drawn; -1: none.
struct DrawInput {
  int logits_row, masked, target;
  float inverse_temperature, uniform;
};

// The highest logit of a range of the vocabulary that may be drawn, and the sum of exp((logit - highest) * inverse temperature);
// NaN if a logit is not finite.
struct RangeSum {
  float highest, sum;
};

// The argument of every kernel; each uses some of it. Rows without a slot have -1, and so have entries of `wanted` and `places`
// without a row.
struct Arguments {
  Row* rows;                       // (R,)
  int* wanted;                     // (R,): rows whose logits are wanted
  const int* places;               // (R,): the indices of the rows in the batch before
  const unsigned long long* pages; // (slots, PAGES): addresses
  const Bf16* token_embedding;     // (V, C)
  const Bf16* position_embedding;  // (POSITIONS, C)
  const float* norm_weight;        // (C,)
  const float* norm_bias;          // (C,)
  const uint4* weight;             // (N, K), packed for `mma`
  const float* bias;               // (N,)
  float* residual;                 // (R, C): the residual stream
  Bf16* normed;                    // (R, C), packed
  float* queries;                  // (R, C)
  Bf16* attended;                  // (R, C), packed
  Bf16* hidden;                    // (R, F), packed
  float* logits;                   // (R, VOCABULARY_STRIDE)
  const DrawInput* draws;          // (steps, R), or (draws,)
  RangeSum* ranges;                // (draws, RANGES)
  int* drawn;                      // as draws
  float* losses;                   // (draws,)
  int layer;
};

__device__ float sum_of_warp(float value) {
  for (int apart = 16; apart > 0; apart /= 2) value += shuffle_xor(value, apart);
  return value;
}

__device__ float max_of_warp(float value) {
  for (int apart = 16; apart > 0; apart /= 2) value = fmaxf(value, shuffle_xor(value, apart));
  return value;
}
