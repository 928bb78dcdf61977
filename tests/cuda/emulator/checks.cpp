// What compute-sanitizer's memcheck, initcheck, racecheck and synccheck find on a GPU, and more: kernels compiled with
//   -g1 -fsanitize=thread,alignment,bounds,null,shift,signed-integer-overflow,integer-divide-by-zero
//   --param tsan-instrument-func-entry-exit=0 --param tsan-distinguish-volatile=1
// call the functions at the end of this file before every load and store. Each access must
// - lie in the thread's own stack, the shared memory of its cluster, or a buffer that `watch` announced;
// - read only bytes that somebody wrote (of a buffer: unless the caller filled it);
// - be aligned as its type says (a vector access of 16 bytes to 16);
// - be ordered after every earlier access to the same bytes by another thread, if either writes and not both are atomic
//   or volatile.
//
// What orders memory: __syncwarp within a warp, __syncthreads within a block, cluster_arrive to cluster_wait within a
// cluster; across blocks a fence, then an atomic, seen by another thread's atomic, then its fence; kernels, as far as
// the later one waited (griddepcontrol.wait) or started after the end of the earlier. A kernel launched to overlap the
// one before starts as early as the hardware may let it. Shuffles, votes and mma order nothing.
//
// The order in which accesses are seen is the emulator's, so one run finds every race of the paths it takes but for two
// limits: of each four bytes at most seven accesses are remembered, and an order by chance of two atomics counts as
// one.
#include <dlfcn.h>
#include <sys/mman.h>

#include <set>
#include <string>

#include "fibers.h"

namespace emulator {
namespace {

enum Kind : uint8_t { kRead, kWrite, kVolatileRead, kAtomic };

bool writes(Kind kind) { return kind == kWrite || kind == kAtomic; }
bool strong(Kind kind) { return kind >= kVolatileRead; }  // may meet another strong access without an order

struct Access {
  uint32_t launch, thread, warp_epoch, block_epoch;
  int32_t site;  // from &anchor
  uint16_t cluster_arrivals, fences;
  uint8_t mask;  // of the cell's four bytes
  Kind kind;
};

struct Cell {  // of four bytes
  uint8_t written, count;
  Access accesses[7];
};

template <typename T>
T* pages(size_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the checks");
  return static_cast<T*>(memory);
}

struct Buffer {
  uintptr_t begin, end;  // begin: down to a multiple of four
  bool filled;
  std::string name;
  Cell* cells;
};

std::vector<Buffer> buffers;
Shared shared;
Cell* shared_cells;
std::map<const void*, Releases> released;  // by the atomic's address
std::set<std::string> seen;
std::string report;

// Launches are numbered; those up to `complete_at_start` had ended, memory and all, when this one may have begun.
uint32_t launch_number, complete_at_start, threads_per_block, blocks_per_cluster;
bool overlaps, triggered_early;
bool checking = false;  // whether the kernels are compiled to call the functions at the end

const char anchor = 0;

void describe(std::string& text, const void* site) {
  if (!site) return;
  Dl_info info;
  char words[32];
  size_t offset = dladdr(site, &info) ? size_t(static_cast<const char*>(site) - static_cast<char*>(info.dli_fbase)) : 0;
  std::snprintf(words, sizeof words, " at {%zx}", offset - 1);  // the call's last byte, not what follows the call
  text += words;
}

void add(const std::string& what, const std::string& detail) {
  if (seen.size() < 20 && seen.insert(what).second) report += what + detail + "\n";
}

bool ordered(const Access& a, const Fiber& b) {
  if (a.launch != launch_number) return a.launch <= complete_at_start || b.waited;
  if (a.thread == b.index) return true;
  uint32_t block = a.thread / threads_per_block, own = b.index / threads_per_block;
  if (block == own) {
    if (a.thread / 32 == b.index / 32 && b.warp_epoch > a.warp_epoch) return true;
    if (b.block_epoch > a.block_epoch) return true;
  }
  if (block / blocks_per_cluster == own / blocks_per_cluster && b.cluster_waits > a.cluster_arrivals) return true;
  for (auto& [thread, release] : b.acquired) {
    if (thread == a.thread && release.fences > a.fences) return true;
    if (thread / threads_per_block != block) continue;
    if (release.block_epoch > a.block_epoch) return true;
    if (thread / 32 == a.thread / 32 && release.warp_epoch > a.warp_epoch) return true;
  }
  return false;
}

// Where an access went: a buffer, or the shared memory of a block.
struct Place {
  const char* name;
  size_t offset;
  std::string text() const { return std::string(" in ") + name + ", byte " + std::to_string(offset); }
};

void touch(Cell& cell, uint8_t mask, Kind kind, bool filled, const void* site, const Place& place) {
  const Fiber& self = *current;
  if (kind != kWrite && !filled && (cell.written & mask) != mask) {
    std::string what = "read of memory that nobody wrote";
    describe(what, site);
    add(what, place.text());
  }
  if (writes(kind)) cell.written |= mask;
  int kept = 0;
  for (int i = 0; i < cell.count; ++i) {
    Access a = cell.accesses[i];
    bool after = ordered(a, self), conflict = (writes(a.kind) || writes(kind)) && !(strong(a.kind) && strong(kind));
    if (!after && conflict && (a.mask & mask)) {
      static const char* names[] = {"read", "write", "volatile read", "atomic"};
      std::string what = std::string("race: ") + names[kind];
      describe(what, site);
      what += std::string(" and ") + (a.launch == launch_number ? "" : "an earlier kernel's ") + names[a.kind];
      describe(what, &anchor + a.site);
      add(what, place.text() + ", threads " + std::to_string(self.index) + " and " + std::to_string(a.thread));
    }
    // What comes after the new access also comes after those it is ordered after.
    if (!(after && !(a.mask & ~mask) && (kind != kRead || a.kind == kRead))) cell.accesses[kept++] = a;
  }
  int slot = kept < 7 ? kept++ : int(self.index / 32 % 7);
  cell.count = uint8_t(kept);
  cell.accesses[slot] = {launch_number,
                         self.index,
                         self.warp_epoch,
                         self.block_epoch,
                         int32_t(static_cast<const char*>(site) - &anchor),
                         uint16_t(self.cluster_arrivals),
                         uint16_t(self.fences),
                         mask,
                         kind};
}

void touch_all(Cell* cells, uintptr_t begin, uintptr_t from, size_t bytes, Kind kind, bool filled, const void* site,
               const char* name) {
  for (uintptr_t at = from; at < from + bytes;) {
    uintptr_t word = (at - begin) / 4, next = std::min(begin + 4 * (word + 1), from + bytes);
    unsigned first = unsigned((at - begin) % 4), count = unsigned(next - at);
    touch(cells[word], uint8_t(((1u << count) - 1) << first), kind, filled, site, {name, at - begin});
    at = next;
  }
}

// A thread's access to `bytes` bytes.
void access(const void* pointer, size_t bytes, Kind kind, const void* site) {
  if (!checking || !current) return;  // current: null in host code
  auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at - reinterpret_cast<uintptr_t>(current->stack) < kStack) return;
  for (const dim3* registers : {&gridDim, &blockDim})
    if (at - reinterpret_cast<uintptr_t>(registers) < sizeof(dim3)) return;
  size_t offset = at - reinterpret_cast<uintptr_t>(shared.base);
  if (offset < shared.stride * shared.blocks) {
    size_t block = offset / shared.stride;
    if (offset % shared.stride + bytes > shared.bytes) {
      stop("access beyond shared memory", site);
    }
    bool own = block == current->block->rank;
    size_t cells = shared.stride / 4;
    touch_all(shared_cells + block * cells, reinterpret_cast<uintptr_t>(shared.base + block * shared.stride), at, bytes,
              kind, false, site, own ? "shared memory" : "another block's shared memory");
    return;
  }
  for (const Buffer& b : buffers)
    if (at >= b.begin && at + bytes <= b.end) {
      touch_all(b.cells, b.begin, at, bytes, kind, b.filled, site, b.name.c_str());
      return;
    }
  stop(writes(kind) ? "write to memory that is no device buffer" : "read of memory that is no device buffer", site);
}

void undefined(const char* what, const void* data) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  auto* location = static_cast<const Location*>(data);
  add(std::string(what) + " in " + location->file + ":" + std::to_string(location->line), "");
}

}  // namespace

void fault(const char* what, const void* site) {
  std::string text = what;
  describe(text, site);
  add(text, "");
}

void launch_begins(const Launch& launch) {
  // The last launch triggered this one when its own start was certain, or after it had waited.
  uint32_t last = triggered_early ? complete_at_start : launch_number ? launch_number - 1 : 0;
  complete_at_start = launch.overlap ? last : launch_number;
  ++launch_number;
  overlaps = launch.overlap;
  triggered_early = false;
  threads_per_block = launch.block.x;
  blocks_per_cluster = launch.cluster;
  released.clear();
}

void launch_ends(bool waited) {
  // Else the end of this launch would not imply the end of the one before, as the next one takes it to.
  if (overlaps && !waited) add("a kernel that may overlap the one before never waited for it", "");
}

void cluster_begins(const Shared& of_cluster) {
  shared = of_cluster;
  shared_cells = pages<Cell>(shared.stride / 4 * shared.blocks);
}

void cluster_ends() {
  munmap(shared_cells, shared.stride / 4 * shared.blocks * sizeof(Cell));
  shared = {};
}

void grid_trigger() { triggered_early |= overlaps && !current->waited; }

void atomic(const void* at, size_t bytes) {
  access(at, bytes, kAtomic, __builtin_return_address(0));
  Releases& here = released[at];
  for (auto& [thread, release] : here) current->pending[thread] = release;
  for (auto& [thread, release] : current->acquired) here[thread] = release;
  if (current->fences)
    here[current->index] = {current->index, current->fence_warp_epoch, current->fence_block_epoch, current->fences};
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// Announces a buffer of device memory; `filled`: by the caller, and not to be written before it is read.
void watch(const void* data, size_t bytes, bool filled, const char* name) {
  auto begin = reinterpret_cast<uintptr_t>(data), down = begin / 4 * 4;
  if (bytes) buffers.push_back({down, begin + bytes, filled, name, pages<Cell>((begin + bytes - down + 3) / 4)});
}

void forget_buffers() {
  for (const Buffer& b : buffers) munmap(b.cells, (b.end - b.begin + 3) / 4 * sizeof(Cell));
  buffers.clear();
}

// What was found since the last call, a line each; {hex} is an offset in this library, for addr2line.
const char* faults() {
  static std::string last;
  last.swap(report);
  report.clear();
  seen.clear();
  return last.c_str();
}

#define SITE __builtin_return_address(0)
void __tsan_init() { checking = true; }  // called when a source file so compiled is loaded
#define NGD_HOOKS(BYTES)                                                            \
  void __tsan_read##BYTES(void* at) { access(at, BYTES, kRead, SITE); }              \
  void __tsan_write##BYTES(void* at) { access(at, BYTES, kWrite, SITE); }            \
  void __tsan_volatile_read##BYTES(void* at) { access(at, BYTES, kVolatileRead, SITE); }   \
  void __tsan_unaligned_read##BYTES(void* at) { access(at, BYTES, kRead, SITE); }    \
  void __tsan_unaligned_write##BYTES(void* at) { access(at, BYTES, kWrite, SITE); }
NGD_HOOKS(1)
NGD_HOOKS(2)
NGD_HOOKS(4)
NGD_HOOKS(8)
NGD_HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) { access(at, bytes, kRead, SITE); }
void __tsan_write_range(void* at, size_t bytes) { access(at, bytes, kWrite, SITE); }
// Of std::atomic, which only host code uses.
char __tsan_atomic8_load(const volatile char* at, int) { return *at; }
void __tsan_atomic8_store(volatile char* at, char value, int) { *at = value; }

void __ubsan_handle_type_mismatch_v1(void* data, void*) {
  undefined("misaligned or null access", data);
  if (current) stop("the launch was given up");  // before this processor traps
}
void __ubsan_handle_out_of_bounds(void* data, void*) { undefined("index out of bounds", data); }
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) { undefined("shift by too many bits", data); }
void __ubsan_handle_add_overflow(void* data, void*, void*) { undefined("overflow", data); }
void __ubsan_handle_sub_overflow(void* data, void*, void*) { undefined("overflow", data); }
void __ubsan_handle_mul_overflow(void* data, void*, void*) { undefined("overflow", data); }
void __ubsan_handle_negate_overflow(void* data, void*) { undefined("overflow", data); }
void __ubsan_handle_divrem_overflow(void* data, void*, void*) { undefined("division by zero or overflow", data); }
}
