// The machine of csrc/machine.h on a CPU: a thread for a thread, two blocks at a time, as a cluster has.
//
// What Hopper does by itself is done late and in random order here, so that a missing wait shows: copies run in a
// thread of their own that takes any of those that wait, and products are made when they are waited for, from what the
// descriptors say, read as the PTX ISA describes them. A wait that lasts half a minute ends all: `stuck` then says so.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/fp8/layout.h"

namespace r1 {

inline std::atomic<bool> stuck{false};

template <class Condition>
void wait_until(std::condition_variable &changed, std::unique_lock<std::mutex> &lock, Condition condition) {
  if (stuck || !changed.wait_for(lock, std::chrono::seconds(30), condition)) stuck = true;
}

// An mbarrier: a phase of it ends when as many have arrived as it expects and all bytes have come.
class Barrier {
 public:
  explicit Barrier(int arrivals) : arrivals_(arrivals), missing_(arrivals) {}

  void change(int arrived, int64_t bytes) {
    std::lock_guard lock(mutex_);
    missing_ -= arrived;
    bytes_ += bytes;
    if (missing_ == 0 && bytes_ == 0) {
      missing_ = arrivals_;
      ++phase_;
      changed_.notify_all();
    }
  }
  void wait(uint32_t parity) {
    std::unique_lock lock(mutex_);
    wait_until(changed_, lock, [&] { return (phase_ & 1) != parity; });
  }
  // Arrives, and waits for all others.
  void meet() {
    std::unique_lock lock(mutex_);
    const uint32_t phase = phase_;
    if (--missing_ == 0) {
      missing_ = arrivals_;
      ++phase_;
      changed_.notify_all();
    } else {
      wait_until(changed_, lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrivals_, missing_;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

// Does what it is given in another thread, late and in random order.
class CopyEngine {
 public:
  explicit CopyEngine(uint32_t seed) : random_(seed), worker_([this] { work(); }) {}
  ~CopyEngine() {
    {
      std::lock_guard lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }
  void add(std::function<void()> copy) {
    {
      std::lock_guard lock(mutex_);
      copies_.push_back(std::move(copy));
    }
    changed_.notify_all();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> copy;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return done_ || !copies_.empty(); });
        if (copies_.empty()) return;
        std::swap(copies_[random_() % copies_.size()], copies_.back());
        copy = std::move(copies_.back());
        copies_.pop_back();
      }
      if (random_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 100));
      copy();
    }
  }

  std::mt19937 random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> copies_;
  bool done_ = false;
  std::thread worker_;
};

// A matrix of bytes as a tensor map describes it: boxes of box_rows x 128, zeros outside.
struct Map {
  const uint8_t *values;
  int64_t rows, columns, row_stride;
  int box_rows;
};

inline float e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float sign = byte & 128 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  return sign * (exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6));
}

struct BFloat16 {
  uint16_t bits;
};

inline BFloat16 bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

struct Block {
  std::vector<char> memory;
  char *shared;
  std::map<ptrdiff_t, std::unique_ptr<Barrier>> barriers;  // by their place in shared memory
  Barrier consumers{fp8::CONSUMERS * fp8::WARP_GROUP};
  std::deque<Barrier> warps;

  explicit Block(int bytes) : memory(bytes + fp8::SWIZZLE_BYTES, '\xFF') {  // NaN in e4m3 and float32
    const auto begin = reinterpret_cast<uintptr_t>(memory.data());
    shared = memory.data() + (fp8::SWIZZLE_BYTES - begin % fp8::SWIZZLE_BYTES);
    for (int warp = 0; warp < fp8::THREADS / fp8::WARP; ++warp) warps.emplace_back(fp8::WARP);
  }
  Barrier &barrier(uint64_t *pointer) { return *barriers.at(reinterpret_cast<char *>(pointer) - shared); }
};

struct Cluster {
  std::deque<Block> blocks;
  Barrier all{fp8::PAIR * fp8::THREADS};
  CopyEngine engine;

  Cluster(int bytes, uint32_t seed) : engine(seed) {
    for (int rank = 0; rank < fp8::PAIR; ++rank) blocks.emplace_back(bytes);
  }
};

class Cpu {
 public:
  Cpu(Cluster &cluster, int index, int blocks, int rank, int thread)
      : cluster_(&cluster),
        own_(&cluster.blocks[rank]),
        block_(index * fp8::PAIR + rank),
        blocks_(blocks),
        thread_(thread) {}

  int thread() const { return thread_; }
  int block() const { return block_; }
  int blocks() const { return blocks_; }
  int same_in_warp(int x) const { return x; }
  uint32_t shared_address(const void *pointer) const {
    return static_cast<uint32_t>(static_cast<const char *>(pointer) - own_->shared);
  }

  void make_barrier(uint64_t *barrier, int arrivals) const {
    own_->barriers[reinterpret_cast<char *>(barrier) - own_->shared] = std::make_unique<Barrier>(arrivals);
  }
  void publish_barriers() const {}
  void wait(uint64_t *barrier, uint32_t parity) const { own_->barrier(barrier).wait(parity); }
  void arrive_expecting(uint64_t *barrier, int bytes) const { own_->barrier(barrier).change(1, bytes); }
  void arrive_at(uint64_t *barrier, int rank) const { same_place(barrier, rank).change(1, 0); }
  void sync_cluster() const { cluster_->all.meet(); }
  void sync_consumers() const { own_->consumers.meet(); }
  void sync_warp() const { own_->warps[thread_ / fp8::WARP].meet(); }

  void copy_tile(char *to, const Map &map, int x, int y, uint64_t *barrier) const {
    add_copy(to, map, x, y, barrier, {block_ % fp8::PAIR});
  }
  void copy_tile_to_both(char *to, const Map &map, int x, int y, uint64_t *barrier) const {
    add_copy(to, map, x, y, barrier, {0, 1});
  }
  void copy_float(float *to, const float *from, bool there) { floats_.push_back({to, from, there}); }
  void arrive_when_copied(uint64_t *barrier) {
    cluster_->engine.add([floats = std::move(floats_), &barrier = own_->barrier(barrier)] {
      for (const Float &f : floats) *f.to = f.there ? *f.from : 0.0f;
      barrier.change(1, 0);
    });
    floats_.clear();
  }
  void show_copy_engine() const {}
  void give_registers() const {}
  void take_registers() const {}

  template <int COLUMNS>
  void multiply(float (&part)[COLUMNS / 2], uint32_t a, uint32_t b, int thread) {
    for (float &x : part) x = std::numeric_limits<float>::quiet_NaN();
    for (int i = 0; i < fp8::BLOCK / fp8::MATRIX_DEPTH; ++i) {
      a_[i] = fp8::further_along(fp8::matrix_descriptor(a), i * fp8::MATRIX_DEPTH);
      b_[i] = fp8::further_along(fp8::matrix_descriptor(b), i * fp8::MATRIX_DEPTH);
    }
    group_thread_ = thread;
  }
  template <int N>
  void wait_for_products(float (&part)[N]) const {
    static const std::vector<float> values = [] {
      std::vector<float> table;
      for (int byte = 0; byte < 256; ++byte) table.push_back(e4m3(static_cast<uint8_t>(byte)));
      return table;
    }();
    for (int i = 0; i < N; ++i) {
      // The fragment of wgmma's D, m64nNk32: PTX ISA, figure "WGMMA .m64nNk32 register fragment layout".
      const int row = group_thread_ / 32 * 16 + group_thread_ % 32 / 4 + (i & 2) * 4;
      const int column = i / 4 * 8 + group_thread_ % 4 * 2 + (i & 1);
      double sum = 0.0;
      for (int step = 0; step < fp8::BLOCK / fp8::MATRIX_DEPTH; ++step) {
        for (int k = 0; k < fp8::MATRIX_DEPTH; ++k) {
          sum += double{values[operand(a_[step], row, k)]} * values[operand(b_[step], column, k)];
        }
      }
      part[i] = static_cast<float>(sum);
    }
  }

  void store_two(float *to, float first, float second) const {
    if (reinterpret_cast<uintptr_t>(to) % 8) std::abort();
    to[0] = first;
    to[1] = second;
  }
  void add_two(float *to, float first, float second) const { store_two(to, to[0] + first, to[1] + second); }
  void put_two(BFloat16 *to, float first, float second) const {
    to[0] = bfloat16(first);
    to[1] = bfloat16(second);
  }
  void copy_16_bytes(void *to, const void *from) const {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    std::memcpy(to, from, 16);
  }

 private:
  struct Float {
    float *to;
    const float *from;
    bool there;
  };

  Barrier &same_place(uint64_t *barrier, int rank) const {
    return *cluster_->blocks[rank].barriers.at(reinterpret_cast<char *>(barrier) - own_->shared);
  }

  // A byte of a K-major operand in swizzled rows of 128: bits 4 to 6 of its address are exchanged with bits 7 to 9.
  uint8_t operand(uint64_t descriptor, int row, int k) const {
    if (descriptor >> 62 != 1) std::abort();
    const uint32_t begin = (descriptor & 0x3FFF) << 4, eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
    const uint32_t address = begin + row / 8 * eight_rows + row % 8 * 128 + k;
    return static_cast<uint8_t>(own_->shared[address ^ (address >> 7 & 7) << 4]);
  }

  void add_copy(char *to, const Map &map, int x, int y, uint64_t *barrier, std::vector<int> ranks) const {
    const ptrdiff_t place = to - own_->shared;
    if (place % 1024 || map.row_stride % 16 || reinterpret_cast<uintptr_t>(map.values) % 16 || map.box_rows > 256)
      std::abort();
    for (const int rank : ranks) {
      char *shared = cluster_->blocks[rank].shared + place;
      cluster_->engine.add([=, &map, &full = same_place(barrier, rank)] {
        for (int row = 0; row < map.box_rows; ++row) {
          for (int byte = 0; byte < 128; ++byte) {
            const bool inside = y + row < map.rows && x + byte < map.columns;
            const uint8_t value = inside ? map.values[(y + row) * map.row_stride + x + byte] : 0;
            shared[row * 128 + ((byte / 16 ^ row % 8) * 16 | byte % 16)] = static_cast<char>(value);
          }
        }
        full.change(0, -map.box_rows * 128);
      });
    }
  }

  Cluster *cluster_;
  Block *own_;
  int block_, blocks_, thread_, group_thread_ = 0;
  std::vector<Float> floats_;
  uint64_t a_[4] = {}, b_[4] = {};
};

}  // namespace r1
