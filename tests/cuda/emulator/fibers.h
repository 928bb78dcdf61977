// How emulator.cpp keeps the threads of a launch, and what it tells checks.cpp. Kernels never see this.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#include "emulator.h"

namespace emulator {

// Where a thread stood when it released its writes by a fence before an atomic (see checks.cpp).
struct Release {
  uint32_t thread, warp_epoch, block_epoch, fences;
};
using Releases = std::map<uint32_t, Release>;  // by thread; the latest

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  const void* site = nullptr;     // where in the code its first thread arrived
  Releases carried, passed_on;    // what the arriving threads know of other blocks; what the leaving ones learn
  void arrive();
  void leave();
  void release();
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
};

struct Block {
  uint3 index;
  unsigned rank = 0;
  int alive = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Fiber {
  uint3 thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  char* stack = nullptr;
  bool started = false, done = false;
  const Barrier* waiting = nullptr;
  uint64_t seen = 0, cluster_ticket = 0;
  jmp_buf state;
  ucontext_t start;
  // for checks.cpp
  uint32_t index = 0;  // in the launch
  uint32_t warp_epoch = 0, block_epoch = 0, cluster_arrivals = 0, cluster_waits = 0, fences = 0;
  uint32_t fence_warp_epoch = 0, fence_block_epoch = 0;  // at the last fence
  Releases acquired, pending;  // pending: seen by an atomic, effective at the next fence
  bool waited = false;         // for the kernel before
};

extern Fiber* current;
[[noreturn]] void fail(const char* what);                     // of the emulator
void stop(const char* what, const void* site = nullptr);      // of the kernel: reports a fault and gives up the launch

constexpr size_t kStack = 128 * 1024;

// checks.cpp
struct Shared {  // the shared memory of a cluster's blocks, one after the other
  unsigned char* base = nullptr;
  size_t stride = 0, bytes = 0;  // from block to block; of one block
  unsigned blocks = 0;
};
void launch_begins(const Launch& launch);
void launch_ends(bool waited);  // whether any thread waited for the kernel before
void cluster_begins(const Shared& shared);
void cluster_ends();
void fault(const char* what, const void* site);

}  // namespace emulator
