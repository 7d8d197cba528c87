// Emulates a warp on the host: each lane is a fiber, and lanes synchronize where a CUDA warp would exchange values.
//
// The kernels run unchanged. A lane runs until it needs the value of another lane. It stores its own value in a slot,
// and the next lane runs; when lane 0 runs again, all slots are filled. If lanes exchange values at different lines of
// the source, which is undefined behavior on a GPU, the program aborts: a passing test shows that no exchange diverges.
#pragma once

// With it, longjmp rejects jumps to the stack of another fiber.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

// CUDA's vector types.
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

class Warp {
 public:
  // Runs body(data) once per lane.
  void run(void (*body)(void*), void* data) {
    body_ = body;
    data_ = data;
    if (_setjmp(caller_) == 0) resume(0);
  }

  int lane() const { return lane_; }

  // Stores `mine` and returns the value that lane `source` stored in the same exchange, which `line` identifies.
  template <typename T>
  T exchange(T mine, int source, int line) {
    put(&mine, sizeof mine, line);
    T theirs;
    memcpy(&theirs, slots_[parity_[lane_]][source], sizeof theirs);
    return theirs;
  }

  bool all(bool mine, int line) {
    put(&mine, sizeof mine, line);
    bool all = true;
    for (auto& slot : slots_[parity_[lane_]]) all &= slot[0] != 0;
    return all;
  }

 private:
  struct Fiber {
    std::vector<char> stack = std::vector<char>(kStackBytes);
    jmp_buf state;
    bool started = false;
  };

  __attribute__((noinline)) void put(const void* value, size_t bytes, int line) {
    // Two sets of slots: a lane may store its next value while other lanes still read the previous ones.
    parity_[lane_] ^= 1;
    memcpy(slots_[parity_[lane_]][lane_], value, bytes);
    check(line);
    switch_to((lane_ + 1) % kLanes);
  }

  void check(int line) {
    if (lane_ == 0) line_ = line;
    if (line_ == line) return;
    fprintf(stderr, "emulated warp: lane %d is at line %d while lane 0 is at line %d\n", lane_, line, line_);
    abort();
  }

  __attribute__((noinline)) void switch_to(int lane) {
    if (_setjmp(fibers_[lane_].state) == 0) resume(lane);
  }

  __attribute__((noinline)) void resume(int lane) {
    lane_ = lane;
    Fiber& fiber = fibers_[lane];
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.data();
    start.uc_stack.ss_size = fiber.stack.size();
    start.uc_link = nullptr;
    current() = this;
    makecontext(&start, &Warp::live, 0);
    setcontext(&start);
  }

  // Fibers are reused, because creating one takes longer than most bodies run.
  static void live() {
    Warp& warp = *current();
    const int lane = warp.lane_;
    for (;;) {
      warp.body_(warp.data_);
      warp.check(-1);
      if (_setjmp(warp.fibers_[lane].state) != 0) continue;
      if (lane + 1 < kLanes) warp.resume(lane + 1);
      _longjmp(warp.caller_, 1);
    }
  }

  static Warp*& current() {
    static thread_local Warp* warp = nullptr;
    return warp;
  }

  Fiber fibers_[kLanes];
  char slots_[2][kLanes][sizeof(double)];
  int parity_[kLanes] = {};
  int lane_ = 0, line_ = 0;
  jmp_buf caller_;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
};

inline Warp& warp() {
  static thread_local Warp warp;
  return warp;
}

struct Position {
  int block, blocks, thread;
};

// Indices of the first lane of the current warp.
inline Position& position() {
  static thread_local Position position;
  return position;
}

// Runs a kernel, given as a function object, for all threads of all blocks, one warp after the other.
template <typename Kernel>
void launch(int blocks, int threads, Kernel kernel) {
  for (int block = 0; block < blocks; ++block)
    for (int thread = 0; thread < threads; thread += kLanes) {
      position() = {block, blocks, thread};
      warp().run([](void* data) { (*static_cast<Kernel*>(data))(); }, &kernel);
    }
}

}  // namespace emulation
