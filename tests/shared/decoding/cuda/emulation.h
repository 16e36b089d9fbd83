// Runs kernels of CUDA on a CPU, one block at a time and each of its threads as a coroutine: it takes the place of
// `primitives.cuh`. Threads run one after the other up to a barrier, so many missing barriers show as a wrong number: all
// by which a thread reads what a later one writes.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
// Everything else is hidden: a process loads the kernels of several shapes.
#define __global__ __attribute__((visibility("default")))
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  int x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct Bf16 {
  uint16_t bits;
};
static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static Bf16 to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return Bf16{0x7fff};
  return Bf16{(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static float to_float(Bf16 value) { return from_bits((uint32_t)value.bits << 16); }
static float low_bf16(uint32_t pair) { return from_bits(pair << 16); }
static float high_bf16(uint32_t pair) { return from_bits(pair & 0xffff0000u); }
static float rough_exp(float value) { return expf(value); }
static bool is_finite(float value) { return std::isfinite(value); }
static float rsqrtf(float value) { return 1 / sqrtf(value); }
static int first_bit(unsigned bits) { return __builtin_ctz(bits); }
static int last_bit(unsigned bits) { return 31 - __builtin_clz(bits); }

// The threads of a block take turns, and give way while they wait at a barrier.
struct Barrier {
  int arrived = 0, generation = 0;
};
struct Warp {
  Barrier barrier;
  // What the lanes exchange. The next exchange uses the other half, while lanes may still read this one.
  uint32_t words[2][32][6];
  int turn[32] = {};
};
struct Thread {
  jmp_buf place;
  bool began, ended;
};
constexpr int MOST_THREADS = 1024, STACK = 1 << 16;
static Thread threads[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static Barrier whole;
static jmp_buf scheduler;

static void give_way() {
  if (!_setjmp(threads[threadIdx.x].place)) _longjmp(scheduler, 1);
}

static void wait_at(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) give_way();
}
// Kernels run one after the other.
static void wait_for_previous_kernel() {}
static void prefetch(const void*) {}
static void synchronise() { wait_at(whole, blockDim.x); }
static void synchronise_warp() { wait_at(warps[threadIdx.x / 32].barrier, 32); }

// Copies to shared memory are made as late as they may, when their thread waits for them; if EAGER, at once.
struct Copy {
  void* to;
  const void* from;
  int group;
};
static std::vector<Copy> copies[MOST_THREADS];
static int copy_groups[MOST_THREADS];
static void copy_to_shared(void* to, const void* from) {
  if (EAGER)
    memcpy(to, from, 16);
  else
    copies[threadIdx.x].push_back(Copy{to, from, copy_groups[threadIdx.x]});
}
static void commit_copies() { ++copy_groups[threadIdx.x]; }
template <int PENDING>
static void wait_for_copies() {
  std::vector<Copy>& mine = copies[threadIdx.x];
  size_t done = 0;
  for (; done < mine.size() && mine[done].group < copy_groups[threadIdx.x] - PENDING; ++done) memcpy(mine[done].to, mine[done].from, 16);
  mine.erase(mine.begin(), mine.begin() + done);
}

// Gives `count` words to the other lanes of the warp, and returns those of all.
static uint32_t (*exchange(const uint32_t* words, int count))[6] {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, half = warp.turn[lane]++ % 2;
  for (int i = 0; i < count; ++i) warp.words[half][lane][i] = words[i];
  wait_at(warp.barrier, 32);
  return warp.words[half];
}
template <class T>
static T shuffle(T value, int lane) {
  uint32_t word;
  memcpy(&word, &value, 4);
  memcpy(&value, exchange(&word, 1)[lane], 4);
  return value;
}
template <class T>
static T shuffle_xor(T value, int apart) { return shuffle(value, (threadIdx.x % 32) ^ apart); }
template <class T>
static T shuffle_up(T value, int apart) {
  const int lane = threadIdx.x % 32;
  return shuffle(value, lane < apart ? lane : lane - apart);
}
static unsigned ballot(bool vote) {
  const uint32_t word = vote;
  const auto votes = exchange(&word, 1);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= votes[lane][0] << lane;
  return bits;
}
static void mma(float (&sums)[4], uint4 a, uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  const auto words = exchange(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = words[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2], right = words[column * 4 + k % 8 / 2][4 + k / 8];
      sum += k % 2 ? high_bf16(left) * high_bf16(right) : low_bf16(left) * low_bf16(right);
    }
    sums[i] += sum;
  }
}

struct Arguments;
static void enter();

// Goes on with a thread until it waits or ends. A thread has one stack, on which it runs in every block.
static void resume(int thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (threads[thread].began) _longjmp(threads[thread].place, 1);
  // Only what threads use of it takes memory.
  static char* stacks = new char[(size_t)MOST_THREADS * STACK];
  threads[thread].began = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = &stacks[(size_t)thread * STACK];
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

static void (*kernel)(Arguments);
static const Arguments* arguments;

extern "C" __global__ void run(void (*function)(Arguments), int blocks_x, int blocks_y, int count, const Arguments* given) {
  kernel = function, arguments = given, blockDim.x = count, gridDim = {blocks_x, blocks_y};
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x) {
      whole = Barrier{};
      for (Warp& warp : warps) warp = Warp{};
      for (int i = 0; i < count; ++i) threads[i].ended = false;
      for (bool going = true; going;) {
        going = false;
        for (int i = 0; i < count; ++i)
          if (!threads[i].ended) {
            resume(i);
            going |= !threads[i].ended;
          }
      }
    }
}

// Comes after the kernels, where their argument is known.
#define ENTER                              \
  static void enter() {                    \
    for (;;) {                             \
      kernel(*arguments);                  \
      threads[threadIdx.x].ended = true;   \
      give_way();                          \
    }                                      \
  }
