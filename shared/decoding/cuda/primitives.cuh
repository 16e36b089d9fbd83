// What the kernels use of an NVIDIA GPU of compute capability 8.0 or higher. It includes nothing, so that NVRTC alone compiles it.

#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

struct Bf16 {
  unsigned short bits;
};

__device__ inline Bf16 to_bf16(float value) {
  Bf16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(value));
  return converted;
}
__device__ inline float to_float(Bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ inline float low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
// Its relative error is at most about 1e-5 if the result is a normal number.
__device__ inline float rough_exp(float value) { return __expf(value); }
__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// From compute capability 9.0 on, a kernel starts while the previous one still runs, and loads what no kernel changes. This waits
// until that one has ended, and only then allows the next to start: so everything that came before that one is complete, too.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Loads a line of 128 bytes into the cache of the whole GPU, where the writes of all kernels are.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Begins to copy 16 bytes to shared memory. `wait_for_copies<N>` waits for all but this thread's last N groups of copies; other
// threads see them after a barrier.
__device__ inline void copy_to_shared(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ inline void synchronise() { __syncthreads(); }
__device__ inline void synchronise_warp() { __syncwarp(); }
template <class T>
__device__ T shuffle_xor(T value, int apart) { return __shfl_xor_sync(0xffffffffu, value, apart); }
template <class T>
__device__ T shuffle_up(T value, int apart) { return __shfl_up_sync(0xffffffffu, value, apart); }
template <class T>
__device__ T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
__device__ inline int first_bit(unsigned bits) { return __ffs(bits) - 1; }
__device__ inline int last_bit(unsigned bits) { return 31 - __clz(bits); }

// Adds the product of a matrix (16, 16) of bf16 and a matrix (16, 8) to sums (16, 8), by a warp. The fragments of its lanes are
// those of mma.m16n8k16 in NVIDIA's PTX ISA, section "Matrix Fragments for mma.m16n8k16".
__device__ inline void mma(float (&sums)[4], uint4 a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
