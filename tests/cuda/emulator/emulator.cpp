// The emulated machine: threads as fibers, barriers, exchanges within a warp, launches.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "fibers.h"

// How far a fiber's own calls reach back: the instruction in the kernel that called the emulator.
#define SITE __builtin_return_address(0)

dim3 gridDim, blockDim;

namespace emulator {

Machine machine;
Fiber* current = nullptr;

namespace {

Cluster* cluster = nullptr;
jmp_buf scheduler;
bool stopped = false;  // the launch is given up
void (*body)(void*) = nullptr;
void* body_context = nullptr;

void wait(Barrier& barrier, uint64_t seen) {
  if (barrier.generation == seen) {
    current->waiting = &barrier;
    current->seen = seen;
    if (!_setjmp(current->state)) _longjmp(scheduler, 1);
  }
}

void learn(const Barrier& barrier) {
  for (auto& [thread, release] : barrier.passed_on) current->acquired[thread] = release;
}

// Arrives, waits, and orders memory: what the arriving threads know of other blocks' writes passes to all.
void meet(Barrier& barrier) {
  for (auto& [thread, release] : current->acquired) barrier.carried[thread] = release;
  uint64_t seen = barrier.generation;
  barrier.arrive();
  wait(barrier, seen);
  learn(barrier);
}

// All threads of a barrier must come from one place in the code: on a GPU others are undefined, or another barrier.
void same_site(Barrier& barrier, const void* site, const char* what) {
  if (barrier.arrived == 0) barrier.site = site;
  if (barrier.site != site) fault(what, site);
}

void entry() {
  body(body_context);
  Fiber* self = current;
  self->done = true;
  --self->block->alive;
  self->block->barrier.leave();
  cluster->barrier.leave();
  _longjmp(scheduler, 1);
}

constexpr size_t kCanary = 256;

void run_cluster(const Launch& launch, unsigned first, char* stacks, std::mt19937& random, bool* waited) {
  Cluster own;
  cluster = &own;
  unsigned threads = launch.block.x;
  own.barrier.expected = int(launch.cluster * threads);
  Shared shared;
  shared.bytes = launch.shared;
  shared.stride = (launch.shared + kCanary + 127) / 128 * 128;
  shared.blocks = launch.cluster;
  size_t arena = shared.stride * launch.cluster + 16;
  void* memory = mmap(nullptr, arena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the blocks' shared memory");
  memset(memory, 0xff, arena);
  shared.base = static_cast<unsigned char*>(memory) + 16;  // aligned to what __align__(16) promises and no more
  std::vector<Fiber> fibers(launch.cluster * threads);
  for (unsigned b = 0; b < launch.cluster; ++b) {
    own.blocks.push_back(std::make_unique<Block>());
    Block& block = *own.blocks.back();
    unsigned flat = first + b;
    block.index = {flat % gridDim.x, flat / gridDim.x % gridDim.y, flat / (gridDim.x * gridDim.y)};
    block.rank = b;
    block.alive = block.barrier.expected = int(threads);
    block.shared = shared.base + b * shared.stride;
    block.warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread = {t, 0, 0};
      fiber.block = &block;
      fiber.warp = &block.warps[t / 32];
      fiber.lane = int(t % 32);
      fiber.index = flat * threads + t;
      fiber.warp->barrier.expected++;
    }
  }
  std::vector<Fiber*> order;
  for (size_t i = 0; i < fibers.size(); ++i) {
    fibers[i].stack = stacks + i * kStack;
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack = {fibers[i].stack, 0, kStack};
    fibers[i].start.uc_link = nullptr;
    makecontext(&fibers[i].start, entry, 0);
    order.push_back(&fibers[i]);
  }
  cluster_begins(shared);
  while (!order.empty()) {
    if (machine.seed) std::shuffle(order.begin(), order.end(), random);
    volatile bool progress = false;
    for (volatile size_t i = 0; i < order.size(); i = i + 1) {
      Fiber& fiber = *order[i];
      if (fiber.waiting && fiber.waiting->generation == fiber.seen) continue;
      progress = true;
      fiber.waiting = nullptr;
      current = &fiber;
      if (!_setjmp(scheduler)) {
        if (fiber.started) _longjmp(fiber.state, 1);
        fiber.started = true;
        setcontext(&fiber.start);
      }
      current = nullptr;
      if (stopped) break;
    }
    if (!progress) stop("deadlock: some threads wait at a barrier, shuffle or vote that the others never reach");
    if (stopped) break;
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
  }
  cluster_ends();
  for (const Fiber& fiber : fibers) *waited |= fiber.waited;
  bool beyond = false;
  for (auto& block : own.blocks)
    for (size_t i = 0; i < kCanary; ++i) beyond |= block->shared[launch.shared + i] != 0xff;
  if (beyond) stop("a kernel wrote beyond its shared memory");
  munmap(memory, arena);
}

// A warp-wide exchange: every lane gives a value and sees all 32. Orders no memory.
const uint64_t* exchange(uint64_t value, unsigned mask, const void* site) {
  Warp& warp = *current->warp;
  if (mask != ~0u) fault("a warp operation with a mask of some lanes, which the emulator does not know", site);
  same_site(warp.barrier, site, "the lanes of a warp meet in different warp operations");
  uint64_t seen = warp.barrier.generation, *slots = warp.slots[seen & 1];
  slots[current->lane] = value;
  warp.barrier.arrive();
  wait(warp.barrier, seen);
  return slots;
}

std::map<std::pair<const void*, int>, Function>& functions() {
  static std::map<std::pair<const void*, int>, Function> all;
  return all;
}

}  // namespace

void Barrier::arrive() {
  if (++arrived == expected) release();
}
void Barrier::leave() {
  --expected;
  if (expected > 0 && arrived == expected) release();
}
void Barrier::release() {
  arrived = 0;
  ++generation;
  passed_on.swap(carried);
  carried.clear();
}

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void stop(const char* what, const void* site) {
  fault(what, site);
  stopped = true;
  if (current) _longjmp(scheduler, 1);
}

Function& function(const void* kernel) { return functions()[{kernel, device()}]; }

int device() {
  static std::vector<Machine> devices;
  auto same = [](const Machine& m) {
    return m.multiprocessors == machine.multiprocessors && m.max_cluster == machine.max_cluster &&
           m.capability == machine.capability && m.max_shared == machine.max_shared && m.compiled == machine.compiled;
  };
  auto found = std::find_if(devices.begin(), devices.end(), same);
  if (found == devices.end()) found = devices.insert(found, machine);
  return int(found - devices.begin());
}

bool run(const Launch& launch, const void* kernel, void (*call)(void*), void* context) {
  unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z, threads = launch.block.x;
  const Function& allowed = function(kernel);
  bool new_features = launch.cluster > 1 || launch.overlap;
  if (!blocks || launch.grid.y > 65535 || launch.grid.z > 65535 || blocks % launch.cluster || !threads ||
      threads > 1024 || launch.shared > size_t(allowed.shared) || (new_features && machine.capability < 90) ||
      launch.cluster > unsigned(allowed.large_clusters ? machine.max_cluster : std::min(machine.max_cluster, 8)))
    return false;
  if (launch.cluster > 1 && machine.compiled < 90) stop("a launch as a cluster of code that knows none");
  gridDim = launch.grid;
  blockDim = launch.block;
  body = call;
  body_context = context;
  size_t bytes = size_t(launch.cluster) * threads * kStack;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the fibers' stacks");
  std::mt19937 random(machine.seed);
  std::vector<unsigned> order(blocks / launch.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * launch.cluster;
  if (machine.seed) std::shuffle(order.begin(), order.end(), random);
  bool waited = false;
  launch_begins(launch);
  stopped = false;
  for (unsigned first : order)
    if (!stopped) run_cluster(launch, first, static_cast<char*>(stacks), random, &waited);
  launch_ends(waited);
  munmap(stacks, bytes);
  return !stopped;
}

// ---- what a thread asks -------------------------------------------------------------------------------------------
uint3 thread_index() { return current->thread; }
uint3 block_index() { return current->block->index; }
uint64_t shuffle(uint64_t value, unsigned mask, int lane) {
  return exchange(value, mask, SITE)[lane];
}
unsigned ballot(unsigned mask, bool predicate) {
  const uint64_t* slots = exchange(predicate, mask, SITE);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(slots[lane]) << lane;
  return votes;
}
int lane() { return current->lane; }

void grid_wait() { current->waited = machine.compiled >= 90; }  // older code does not wait


unsigned cluster_rank_of() { return current->block->rank; }
unsigned cluster_blocks() { return unsigned(cluster->blocks.size()); }
unsigned char* shared_base() { return current->block->shared; }
unsigned char* shared_base_of(unsigned rank) {
  Block& block = *cluster->blocks.at(rank);
  if (!block.alive) stop("shared memory of a block that has left its cluster", SITE);
  return block.shared;
}

// mma.sync.aligned.m16n8k{16,8}.row.col.f32: the lane's share of each operand as the PTX manual lays it out.
void mma(float* acc, const uint32_t* a, const uint32_t* b, int depth, float (*widen)(uint16_t)) {
  int words_of_a = depth / 4, words = words_of_a + depth / 8;
  uint32_t operand[6][32];
  for (int r = 0; r < words; ++r) {
    const uint64_t* slots = exchange(r < words_of_a ? a[r] : b[r - words_of_a], ~0u, SITE);
    for (int lane = 0; lane < 32; ++lane) operand[r][lane] = uint32_t(slots[lane]);
  }
  auto element = [&](int r, int lane, int half) { return widen(uint16_t(operand[r][lane] >> (16 * half))); };
  int group = current->lane / 4, member = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    int row = group + 8 * (i / 2), column = 2 * member + i % 2;
    for (int k = 0; k < depth; ++k) {
      int lane = k % 8 / 2;
      acc[i] += element(row / 8 + 2 * (k / 8), row % 8 * 4 + lane, k % 2) *
                element(words_of_a + k / 8, column * 4 + lane, k % 2);
    }
  }
}

}  // namespace emulator

using namespace emulator;

void __syncthreads() {
  same_site(current->block->barrier, SITE, "the threads of a block meet in different __syncthreads");
  meet(current->block->barrier);
  ++current->block_epoch;
}
void __syncwarp(unsigned mask) {
  if (mask != ~0u) fault("a __syncwarp with a mask of some lanes, which the emulator does not know", SITE);
  same_site(current->warp->barrier, SITE, "the lanes of a warp meet in different warp operations");
  meet(current->warp->barrier);
  ++current->warp_epoch;
}
void __threadfence() {
  for (auto& [thread, release] : current->pending) current->acquired[thread] = release;
  current->pending.clear();
  ++current->fences;
  current->fence_warp_epoch = current->warp_epoch;
  current->fence_block_epoch = current->block_epoch;
}
void cluster_arrive() {
  Barrier& barrier = cluster->barrier;
  for (auto& [thread, release] : current->acquired) barrier.carried[thread] = release;
  current->cluster_ticket = barrier.generation;
  ++current->cluster_arrivals;
  barrier.arrive();
}
void cluster_wait() {
  wait(cluster->barrier, current->cluster_ticket);
  learn(cluster->barrier);
  ++current->cluster_waits;
}
