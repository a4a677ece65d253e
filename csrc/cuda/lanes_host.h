// lanes.h for a CPU: runs a block of a kernel with every thread as a fiber, to test the kernels' logic without a GPU.
//
// Threads run one after the other, in another order between every two points where they meet, and an asynchronous
// copy arrives at once or as late as it may: code that lacks a barrier or a wait reads what is not there. Threads that
// meet at different operations, and blocks in which no thread can go on, end in `failure`.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define KVS_LANE inline

namespace kvs::gpu {

struct Place {
  int x, y, z;
};

namespace host {

constexpr size_t STACK_BYTES = 96 << 10;
using Copies = std::vector<std::pair<void*, const void*>>;

struct Fiber {
  ucontext_t context;  // enters the fiber; from then on jumps are enough, which make no system calls
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // not cleared
  bool entered = false, done = false;
  Copies open;
  std::deque<Copies> groups;
};

struct Barrier {
  int arrived = 0;
  int64_t passed = 0;
  const char* operation = nullptr;
};

struct Warp {
  Barrier barrier;
  alignas(16) uint8_t slots[2][32][48];  // what lanes bring to an operation; two, for lanes that are one ahead
};

class Block {
 public:
  Block(Place place, int threads, std::function<void()> body)
      : place(place), threads(threads), body_(std::move(body)), warps_(threads / 32) {
    for (int i = 0; i < threads; ++i) fibers_.push_back(std::make_unique<Fiber>());
  }

  // Runs all threads to their end; returns an empty string, or what went wrong.
  std::string run() {
    running() = this;
    for (auto& fiber : fibers_) start(*fiber);
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (bool left = true; left && failure.empty();) {
      std::shuffle(order.begin(), order.end(), random);
      left = false;
      progress_ = false;
      for (const int i : order) {
        if (fibers_[i]->done || !failure.empty()) continue;
        left = true;
        thread = i;
        resume(*fibers_[i]);
      }
      if (left && !progress_) fail("no thread can go on: some wait for threads that have ended");
    }
    return failure;
  }

  void wait(Barrier& barrier, int count, const char* operation) {
    const int64_t passed = barrier.passed;
    if (barrier.arrived++ == 0) barrier.operation = operation;
    if (std::strcmp(barrier.operation, operation)) fail(std::string(barrier.operation) + " meets " + operation);
    progress_ = true;
    if (barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.passed;
    }
    do yield();
    while (barrier.passed == passed);
  }

  // Lanes of a warp show each other a value; returns everybody's.
  template <class T>
  const uint8_t (*exchange(const T& mine, const char* operation))[48] {
    static_assert(sizeof(T) <= 48);
    Warp& warp = warps_[thread / 32];
    auto* slots = warp.slots[warp.barrier.passed & 1];
    std::memcpy(slots[thread % 32], &mine, sizeof(T));
    wait(warp.barrier, 32, operation);
    return slots;
  }

  Fiber& fiber() { return *fibers_[thread]; }
  void fail(const std::string& what) {
    if (failure.empty()) failure = what;
  }
  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

  const Place place;
  const int threads;
  std::mt19937 random{uint32_t(place.x + 7 * place.y + 31 * place.z)};
  int thread = 0;
  Barrier barrier;
  std::string failure;

 private:
  static void enter() {
    Block& block = *running();
    Fiber& fiber = block.fiber();
    block.body_();
    fiber.done = true;
    block.progress_ = true;
    _longjmp(block.main_, 1);
  }
  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  void resume(Fiber& fiber) {
    if (_setjmp(main_)) return;
    if (fiber.entered) _longjmp(fiber.place, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }
  void yield() {
    if (!_setjmp(fiber().place)) _longjmp(main_, 1);
  }

  std::function<void()> body_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf main_;
  bool progress_ = false;
};

inline Block& block() { return *Block::running(); }

template <class T>
T value_of(const uint8_t (&slot)[48]) {
  T value;
  std::memcpy(&value, slot, sizeof value);
  return value;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_half(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, int(exponent) - 25) : std::ldexp(float(mantissa), -24));
}
inline uint32_t to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7E00;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent;
  std::frexp(size, &exponent);
  const int step = size == 0.0f || exponent - 11 < -24 ? -24 : exponent - 11;
  const float scaled = std::nearbyint(std::ldexp(size, -step));  // ties to even; at most 2048
  if (step == -24) return sign | uint32_t(scaled);               // subnormal, or the first normal numbers
  return sign | (uint32_t(step + 24) * 1024 + uint32_t(scaled));
}
inline uint32_t to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  return std::isnan(x) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

struct Operands {
  float c[4];
  uint32_t a[4], b[2];
};

// c += a * b, element by element as the PTX ISA says which lane holds what.
template <class Number>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Operands mine;
  std::memcpy(mine.c, c, sizeof c), std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b);
  const auto* slots = block().exchange(mine, "mma");
  const int lane = block().thread % 32;
  const auto half_of = [](uint32_t word, int k) { return k & 1 ? Number::high(word) : Number::low(word); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const Operands left = value_of<Operands>(slots[row % 8 * 4 + k % 8 / 2]);
      const Operands right = value_of<Operands>(slots[column * 4 + k % 8 / 2]);
      c[i] += half_of(left.a[(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)], k) * half_of(right.b[k >= 8 ? 1 : 0], k);
    }
  }
}

}  // namespace host

inline Place block_place() { return host::block().place; }
inline int thread_in_block() { return host::block().thread; }
inline int threads_per_block() { return host::block().threads; }
inline void sync_warp() { host::block().exchange(0, "sync_warp"); }
inline void sync_block() { host::block().wait(host::block().barrier, host::block().threads, "sync_block"); }

inline void copy_async(void* shared, const void* global) {
  if ((uintptr_t(shared) | uintptr_t(global)) % 16) host::block().fail("copy_async of unaligned bytes");
  if (host::block().random() & 1)
    std::memcpy(shared, global, 16);
  else
    host::block().fiber().open.emplace_back(shared, global);
}
inline void close_copies() {
  auto& fiber = host::block().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
inline void await_copies(int open) {
  auto& groups = host::block().fiber().groups;
  for (; int(groups.size()) > open; groups.pop_front())
    for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
}

template <class T>
T shuffle(T x, int from) {
  return host::value_of<T>(host::block().exchange(x, "shuffle")[from]);
}
template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, host::block().thread % 32 ^ mask);
}
inline uint32_t transpose(uint32_t x) {
  const auto* slots = host::block().exchange(x, "transpose");
  const int g = host::block().thread % 32 / 4, t = host::block().thread % 4;
  const auto at = [&](int row, int column) {
    return host::value_of<uint32_t>(slots[row * 4 + column / 2]) >> (column & 1 ? 16 : 0) & 0xFFFF;
  };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}
inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline float exp2_of(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }

struct Half {
  static constexpr int MANTISSA = 10, BIAS = 15;
  static constexpr bool NARROW = true;
  static uint32_t pack(float low, float high) { return host::to_half(low) | host::to_half(high) << 16; }
  static float low(uint32_t x) { return host::from_half(x & 0xFFFF); }
  static float high(uint32_t x) { return host::from_half(x >> 16); }
  static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { host::mma<Half>(c, a, b); }
};

struct Bfloat {
  static constexpr int MANTISSA = 7, BIAS = 127;
  static constexpr bool NARROW = false;
  static uint32_t pack(float low, float high) { return host::to_bfloat(low) | host::to_bfloat(high) << 16; }
  static float low(uint32_t x) { return host::float_of(x << 16); }
  static float high(uint32_t x) { return host::float_of(x & 0xFFFF0000u); }
  static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { host::mma<Bfloat>(c, a, b); }
};

}  // namespace kvs::gpu
