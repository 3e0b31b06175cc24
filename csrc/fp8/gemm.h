// Products of block-scaled e4m3, dense and grouped: one kernel, written against a machine.
//
// A pair of blocks (a cluster) takes two tiles of out that are neighbours along the columns. In each block one warp
// group fetches: a thread of it starts the bulk copies, of which each half of the tile of a goes to both blocks, and a
// warp copies the scales. Two warp groups multiply: 128 products are added up by the matrix units, then scaled and
// added to a float32 sum in registers, as DeepSeek-V3 does (arXiv 2412.19437, section 3.3.2). While one of the two
// scales, the other's products run. Blocks are persistent: they take pair after pair of tiles.
#pragma once

#include "layout.h"

namespace r1::fp8 {

template <int TILE_ROWS_, int TILE_COLUMNS_, Groups GROUPS_, bool SQUARE_, bool ACCUMULATE_, class Out_>
struct Config {
  static constexpr int TILE_ROWS = TILE_ROWS_, TILE_COLUMNS = TILE_COLUMNS_;
  static constexpr Groups GROUPS = GROUPS_;
  static constexpr bool SQUARE = SQUARE_, ACCUMULATE = ACCUMULATE_;
  using Out = Out_;
  static constexpr bool STAGED = sizeof(Out) == 2;
  static constexpr int PRODUCTS = TILE_ROWS / CONSUMERS / MATRIX_ROWS;  // of 64 rows, one after another, a warp group
  static_assert(PRODUCTS * CONSUMERS * MATRIX_ROWS == TILE_ROWS && BLOCK % TILE_COLUMNS == 0);
  using Layout = fp8::Layout<TILE_ROWS, TILE_COLUMNS, SQUARE, STAGED>;
  using Schedule = fp8::Schedule<TILE_ROWS, TILE_COLUMNS, GROUPS>;
};

// Scales of a lie at a[row * a_row + block * a_block], of b at b[row * b_row + block * b_block], where for SQUARE ones
// a row is one of blocks; with Groups::ROWS an expert's b_expert after the last one's.
struct Scales {
  const float *a, *b;
  int64_t a_row, a_block, b_expert, b_row, b_block;
};

struct alignas(8) Two {
  float left, right;
};

template <class Config, class Machine, class Map>
struct Gemm {
  using Layout = typename Config::Layout;
  using Out = typename Config::Out;
  using Stages = Ring<Layout::STAGES>;
  static constexpr int COLUMNS = Config::TILE_COLUMNS, SUMS = COLUMNS / 2;  // sums of a thread in a 64-row product

  Machine machine;
  const Problem &problem;
  const Scales &scales;
  const Map &a, &b;  // what the copy engine knows of the operands
  Out *out;
  char *shared;  // at a multiple of SWIZZLE_BYTES

  R1_BOTH char *a_tile(int stage) const { return shared + stage * Layout::STAGE_BYTES; }
  R1_BOTH char *b_tile(int stage) const { return a_tile(stage) + Layout::A_BYTES; }
  R1_BOTH float *a_scales(int stage) const {
    return reinterpret_cast<float *>(shared + Layout::SCALES + stage * Layout::SCALE_BYTES);
  }
  R1_BOTH float *b_scales(int stage) const { return a_scales(stage) + Layout::A_SCALES; }
  R1_BOTH uint64_t *full(int stage) const { return reinterpret_cast<uint64_t *>(shared + Layout::BARRIERS) + stage; }
  R1_BOTH uint64_t *empty(int stage) const { return full(stage) + Layout::STAGES; }
  R1_BOTH Table *table() const { return reinterpret_cast<Table *>(shared + Layout::TABLE); }

  R1_BOTH void run() {
    const int thread = machine.thread();
    if (thread == 0) {
      for (int stage = 0; stage < Layout::STAGES; ++stage) {
        machine.make_barrier(full(stage), 1 + WARP);  // who starts the copies, and the warp that copies scales
        machine.make_barrier(empty(stage), PAIR * CONSUMERS * 4);  // a lane of every warp of both blocks
      }
      machine.publish_barriers();
    }
    if (Config::GROUPS != Groups::NONE) {
      const int end = Config::GROUPS == Groups::ROWS ? problem.rows : problem.depth;
      for (int entry = thread; entry <= problem.experts; entry += THREADS) {
        table()->fill(problem, entry, end, Config::TILE_ROWS);
      }
    }
    machine.sync_cluster();
    const int warp = machine.same_in_warp(thread / WARP);
    if (warp >= CONSUMERS * 4) {
      machine.give_registers();
      if (warp == CONSUMERS * 4 && thread % WARP == 0) fetch_tiles();
      if (warp == CONSUMERS * 4 + 1) fetch_scales(thread % WARP);
    } else {
      machine.take_registers();
      multiply(warp / 4, thread % WARP_GROUP);
    }
    machine.sync_cluster();  // the other block may still write to this one's shared memory
  }

 private:
  // Calls `work` with every tile of this block.
  template <class Work>
  R1_BOTH void for_tiles(Work work) {
    const typename Config::Schedule schedule{problem, *table()};
    const int pairs = machine.blocks() / PAIR;
    for (int index = machine.block() / PAIR; index < schedule.size(); index += pairs) {
      work(schedule.at(index, machine.block() % PAIR));
    }
  }

  R1_BOTH void fetch_tiles() {
    constexpr int HALF = Config::TILE_ROWS / PAIR;
    const int half = machine.block() % PAIR * HALF;
    Stages ring;
    for_tiles([&](const Tile &tile) {
      const int b_row = tile.column + (Config::GROUPS == Groups::ROWS ? tile.expert * problem.columns : 0);
      for (int block = tile.depth_begin; block < tile.depth_end; ++block, ring.advance()) {
        machine.wait(empty(ring.stage), ring.parity ^ 1);
        machine.arrive_expecting(full(ring.stage), Layout::STAGE_BYTES);
        machine.copy_tile_to_both(a_tile(ring.stage) + half * BLOCK, a, block * BLOCK, tile.row + half,
                                  full(ring.stage));
        machine.copy_tile(b_tile(ring.stage), b, block * BLOCK, b_row, full(ring.stage));
      }
    });
  }

  R1_BOTH void fetch_scales(int lane) {
    Stages ring;
    for_tiles([&](const Tile &tile) {
      const float *of_b = scales.b + (Config::GROUPS == Groups::ROWS ? tile.expert * scales.b_expert : 0);
      for (int block = tile.depth_begin; block < tile.depth_end; ++block, ring.advance()) {
        machine.wait(empty(ring.stage), ring.parity ^ 1);
        R1_ROLL
        for (int i = lane; i < Layout::A_SCALES; i += WARP) {
          const int row = tile.row + i;
          const bool there = row < problem.rows;
          machine.copy_float(a_scales(ring.stage) + i,
                             scales.a + (there ? row * scales.a_row : 0) + block * scales.a_block, there);
        }
        R1_ROLL
        for (int i = lane; i < Layout::B_SCALES; i += WARP) {
          const int row = Config::SQUARE ? tile.column / BLOCK : tile.column + i;
          const bool there = tile.column + i < problem.columns;
          machine.copy_float(b_scales(ring.stage) + i, of_b + (there ? row * scales.b_row : 0) + block * scales.b_block,
                             there);
        }
        machine.arrive_when_copied(full(ring.stage));
      }
    });
  }

  R1_BOTH void multiply(int group, int thread) {
    Stages ring;
    const int first_row = group * Config::PRODUCTS * MATRIX_ROWS;
    for_tiles([&](const Tile &tile) {
      float sums[Config::PRODUCTS][SUMS] = {};
      for (int block = tile.depth_begin; block < tile.depth_end; ++block, ring.advance()) {
        machine.wait(full(ring.stage), ring.parity);
        if (Config::GROUPS == Groups::DEPTH) keep_own(tile, block, ring.stage, group * WARP_GROUP + thread);
        R1_UNROLL
        for (int product = 0; product < Config::PRODUCTS; ++product) {
          const int row = first_row + product * MATRIX_ROWS;
          float part[SUMS];
          machine.template multiply<COLUMNS>(part, machine.shared_address(a_tile(ring.stage) + row * BLOCK),
                                             machine.shared_address(b_tile(ring.stage)), thread);
          add(sums[product], part, ring.stage, row, thread);
        }
        machine.sync_warp();
        if (thread % WARP < PAIR) machine.arrive_at(empty(ring.stage), thread % WARP);
      }
      if (Config::ACCUMULATE && tile.depth_begin == tile.depth_end) return;
      R1_UNROLL
      for (int product = 0; product < Config::PRODUCTS; ++product) {
        const int row = tile.row + first_row + product * MATRIX_ROWS;
        if constexpr (Config::STAGED) {
          store_staged(tile, sums[product], row, group, thread);
        } else {
          store(tile, sums[product], row, thread);
        }
      }
    });
  }

  // sums += part, which is still being made, times the scales of its rows and columns.
  R1_BOTH void add(float (&sums)[SUMS], float (&part)[SUMS], int stage, int row, int thread) {
    const float *of_a = a_scales(stage) + row + accumulator_row(thread, 0), *of_b = b_scales(stage);
    float upper = of_a[0], lower = of_a[8];
    if constexpr (Config::SQUARE) {
      upper *= of_b[0];
      lower *= of_b[0];
    }
    machine.wait_for_products(part);
    R1_UNROLL
    for (int i = 0; i < SUMS; i += 4) {
      Two beside = {1.0f, 1.0f};
      if constexpr (!Config::SQUARE) beside = *reinterpret_cast<const Two *>(of_b + accumulator_column(thread, i));
      sums[i] += part[i] * (Config::SQUARE ? upper : upper * beside.left);
      sums[i + 1] += part[i + 1] * (Config::SQUARE ? upper : upper * beside.right);
      sums[i + 2] += part[i + 2] * (Config::SQUARE ? lower : lower * beside.left);
      sums[i + 3] += part[i + 3] * (Config::SQUARE ? lower : lower * beside.right);
    }
  }

  // Of a block of tokens that experts share, zeros where the others' are: nothing of theirs enters, NaN neither.
  R1_BOTH void keep_own(const Tile &tile, int block, int stage, int thread) {
    const int begin = tile.begin - block * BLOCK, end = tile.end - block * BLOCK;
    if (begin <= 0 && end >= BLOCK) return;  // the same for all threads of both groups
    char *rows = a_tile(stage);              // b's rows follow
    for (int i = thread; i < (Config::TILE_ROWS + COLUMNS) * (BLOCK / 4); i += CONSUMERS * WARP_GROUP) {
      const int row = i / (BLOCK / 4), byte = i % (BLOCK / 4) * 4;
      if (byte >= begin && byte + 4 <= end) continue;
      uint32_t *word = reinterpret_cast<uint32_t *>(rows + swizzled(row, byte));
      uint32_t own = 0;
      R1_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (byte + j >= begin && byte + j < end) own |= 0xFFu << 8 * j;
      }
      *word &= own;
    }
    machine.show_copy_engine();  // and the matrix units, which read past the ordinary stores otherwise
    machine.sync_consumers();
  }

  R1_BOTH Out *out_row(const Tile &tile, int row) const {
    const int64_t rows_before = Config::GROUPS == Groups::DEPTH ? int64_t{tile.expert} * problem.rows : 0;
    return out + (rows_before + row) * problem.columns;
  }

  // float32 from registers: four threads write 32 bytes of a row.
  R1_BOTH void store(const Tile &tile, float (&sums)[SUMS], int row, int thread) {
    R1_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int own = row + accumulator_row(thread, 2 * half);
      if (own >= tile.row_end) continue;
      Out *line = out_row(tile, own);
      R1_UNROLL
      for (int i = 2 * half; i < SUMS; i += 4) {
        const int column = tile.column + accumulator_column(thread, i);
        if (problem.columns % 2 == 0) {
          if (column >= problem.columns) continue;
          if constexpr (Config::ACCUMULATE) {
            machine.add_two(line + column, sums[i], sums[i + 1]);
          } else {
            machine.store_two(line + column, sums[i], sums[i + 1]);
          }
        } else {
          R1_UNROLL
          for (int j = 0; j < 2 && column + j < problem.columns; ++j) {
            line[column + j] = (Config::ACCUMULATE ? line[column + j] : 0.0f) + sums[i + j];
          }
        }
      }
    }
  }

  // bfloat16 by way of shared memory, a warp's 16 rows and 64 columns at a time: eight threads write 128 bytes of a
  // row.
  R1_BOTH void store_staged(const Tile &tile, float (&sums)[SUMS], int row, int group, int thread) {
    const int lane = thread % WARP, warp = thread / WARP;
    Out *staged = reinterpret_cast<Out *>(shared + Layout::STAGED_AT) + (group * 4 + warp) * 16 * STAGED_STRIDE;
    R1_UNROLL
    for (int first = 0; first < COLUMNS; first += STAGED_COLUMNS) {
      R1_UNROLL
      for (int i = 0; i < STAGED_COLUMNS / 2; i += 2) {
        Out *place = staged + accumulator_row(lane, i) * STAGED_STRIDE + accumulator_column(lane, i);
        machine.put_two(place, sums[first / 2 + i], sums[first / 2 + i + 1]);
      }
      machine.sync_warp();
      const int column = tile.column + first + lane % 8 * 8;
      R1_UNROLL
      for (int i = 0; i < 16; i += 4) {
        const int own = row + warp * 16 + i + lane / 8;
        const Out *from = staged + (i + lane / 8) * STAGED_STRIDE + lane % 8 * 8;
        if (own >= tile.row_end || column >= problem.columns) continue;
        Out *to = out_row(tile, own) + column;
        if (problem.columns % 8 == 0) {
          machine.copy_16_bytes(to, from);
        } else {
          for (int j = 0; j < 8 && column + j < problem.columns; ++j) to[j] = from[j];
        }
      }
      machine.sync_warp();
    }
  }
};

}  // namespace r1::fp8
