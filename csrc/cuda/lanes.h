// What one lane of a warp can do beyond plain C++: the only file with PTX in it. On a CPU, lanes_host.h stands in for
// it, so that the same kernels can be run lane by lane without a GPU (tests/kernels/test_cuda.py).
//
// Names of a lane in the fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): g = lane / 4,
// t = lane % 4. A lane holds of
//   A (16 x 16):  a[0] row g, a[1] row g + 8, columns 2t, 2t + 1 of each;  a[2], a[3] columns 2t + 8, 2t + 9
//   B (16 x 8):   b[0] rows 2t, 2t + 1 of column g;  b[1] rows 2t + 8, 2t + 9
//   C (16 x 8):   c[0], c[1] columns 2t, 2t + 1 of row g;  c[2], c[3] of row g + 8
// Two 16-bit numbers share a 32-bit word, the first one in its low half.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "lanes_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KVS_LANE __device__ __forceinline__

namespace kvs::gpu {

struct Place {
  int x, y, z;
};
KVS_LANE Place block_place() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
KVS_LANE int thread_in_block() { return int(threadIdx.x); }
KVS_LANE int threads_per_block() { return int(blockDim.x); }

KVS_LANE void sync_warp() { __syncwarp(); }
KVS_LANE void sync_block() { __syncthreads(); }

// Copies 16 bytes from global to shared memory, both aligned; they are there once `await_copies` has counted them.
KVS_LANE void copy_async(void* shared, const void* global) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
KVS_LANE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `open` (0 to 3) of this lane's newest groups of copies are under way.
KVS_LANE void await_copies(int open) {
  if (open == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  if (open == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (open == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (open == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
}

template <class T>
KVS_LANE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
template <class T>
KVS_LANE T shuffle(T x, int from) {
  return __shfl_sync(0xFFFFFFFFu, x, from);
}
// Transposes an 8 x 8 matrix of 16-bit numbers of which a lane holds the columns 2t, 2t + 1 of row g.
KVS_LANE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Bytes of x (0 to 3) and y (4 to 7), one chosen by each digit of `selector`, lowest first.
KVS_LANE uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) { return __byte_perm(x, y, selector); }
// (x & mask) | bits in one instruction, which the compiler makes two of where both are constants.
KVS_LANE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
KVS_LANE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVS_LANE float log2_of(float x) { return __log2f(x); }

struct Half {
  static constexpr int MANTISSA = 10, BIAS = 15;
  static constexpr bool NARROW = true;  // has no room for a number times a scale
  static KVS_LANE uint32_t pack(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  static KVS_LANE float low(uint32_t x) { return __half2float(__ushort_as_half(uint16_t(x))); }
  static KVS_LANE float high(uint32_t x) { return __half2float(__ushort_as_half(uint16_t(x >> 16))); }
  // c += a * b
  static KVS_LANE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Bfloat {
  static constexpr int MANTISSA = 7, BIAS = 127;
  static constexpr bool NARROW = false;
  static KVS_LANE uint32_t pack(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  static KVS_LANE float low(uint32_t x) { return __uint_as_float(x << 16); }
  static KVS_LANE float high(uint32_t x) { return __uint_as_float(x & 0xFFFF0000u); }
  static KVS_LANE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

}  // namespace kvs::gpu
#endif
