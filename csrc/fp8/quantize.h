// Quantisers to block-scaled e4m3: one kernel, written against a machine.
//
// A block of threads reads a tile of 128 x 128 once and writes what is wanted of it: the values with a scale for each
// row or for all of it, and the transposed values with a scale for each column, or for all. A thread holds 8 x 8
// neighbours, so that 8 bytes of either copy are its own; the transposed ones go by way of shared memory.
#pragma once

#include "scale.h"
#include "schedule.h"

namespace r1::fp8 {

constexpr int SIDE = 8;  // of what a thread holds
constexpr int ACROSS = BLOCK / SIDE;
constexpr int QUANTIZER_THREADS = ACROSS * ACROSS;

// Matrices (batch, rows, columns), and what is written of each; strides in elements. Rows of x begin at multiples of 16
// bytes, rows of the values too, and columns is a multiple of 8.
struct Quantization {
  int rows, columns;
  bool power_of_two;
  int64_t x_batch, x_row;
  uint8_t *values;
  int64_t values_batch, values_row;
  uint8_t *across;  // (columns, rows)
  int64_t across_batch, across_row;
  // Of rows: (blocks of columns, rows), and across (blocks of rows, columns). Of squares: (batch, blocks, blocks).
  float *scales, *across_scales;
};

struct alignas(8) EightBytes {
  uint32_t low, high;
};

// Where a block of threads meets.
struct QuantizerShared {
  EightBytes across[BLOCK][ACROSS];
  float column_amax[ACROSS / 2][BLOCK];  // of each warp
  float column_scales[BLOCK];
};

// The place of the thread's 8 rows in a transposed row: 16 threads of a warp write to 16 different pairs of banks.
R1_BOTH constexpr int swizzled_eight(int column, int eight) { return eight ^ column / SIDE % ACROSS; }

template <class Machine, class Source, bool SQUARE, bool TRANSPOSED>
struct Quantizer {
  Machine machine;
  const Quantization &job;
  const Source *x;
  QuantizerShared &shared;

  R1_BOTH void run() {
    const int thread = machine.thread(), first_column = thread % ACROSS * SIDE, first_row = thread / ACROSS * SIDE;
    const int row_block = machine.tile_row(), column_block = machine.tile_column(), batch = machine.batch();
    const int row = row_block * BLOCK + first_row, column = column_block * BLOCK + first_column;
    // All loads before the first use.
    typename Machine::template Eight<Source> loaded[SIDE] = {};
    R1_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      if (row + i < job.rows && column < job.columns) {
        loaded[i] = machine.load_8(x + batch * job.x_batch + (row + i) * job.x_row + column);
      }
    }
    float tile[SIDE][SIDE];
    R1_UNROLL
    for (int i = 0; i < SIDE; ++i) machine.to_floats(tile[i], loaded[i]);
    float row_scales[SIDE];
    find_scales(tile, row_scales, first_column);
    R1_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      const Divisor divisor(row_scales[i]);
      if (row + i < job.rows && column < job.columns) {
        uint8_t *to = job.values + batch * job.values_batch + (row + i) * job.values_row + column;
        *reinterpret_cast<EightBytes *>(to) = eight([&](int j) { return divisor.quotient(tile[i][j]); });
      }
      // The i-th of the 16 threads of a row stores the scale of the i-th row, so that neighbours store neighbours.
      if (!SQUARE && thread % ACROSS == i && row + i < job.rows) {
        job.scales[int64_t{column_block} * job.rows + row + i] = row_scales[i];
      }
    }
    if (SQUARE && thread == 0) {
      const int blocks = divide_up(job.columns, BLOCK);
      job.scales[(int64_t{batch} * divide_up(job.rows, BLOCK) + row_block) * blocks + column_block] = row_scales[0];
    }
    if constexpr (TRANSPOSED) store_across(tile, row_scales[0], row_block, column_block, batch);
  }

 private:
  // Largest sizes; a comparison with NaN leaves the other.
  R1_BOTH void find_scales(float (&tile)[SIDE][SIDE], float (&row_scales)[SIDE], int first_column) {
    const int thread = machine.thread(), warp = thread / 32;
    float rows[SIDE] = {}, columns[SIDE] = {};
    R1_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      R1_UNROLL
      for (int j = 0; j < SIDE; ++j) {
        rows[i] = fmaxf(rows[i], fabsf(tile[i][j]));
        columns[j] = fmaxf(columns[j], fabsf(tile[i][j]));
      }
    }
    if constexpr (SQUARE) {
      float amax = 0.0f;
      R1_UNROLL
      for (float size : rows) amax = fmaxf(amax, size);
      R1_UNROLL
      for (int other = 16; other > 0; other /= 2) amax = fmaxf(amax, machine.shuffle_xor(amax, other));
      if (thread % 32 == 0) shared.column_amax[warp][0] = amax;
      machine.sync_block();
      R1_UNROLL
      for (int i = 0; i < ACROSS / 2; ++i) amax = fmaxf(amax, shared.column_amax[i][0]);
      R1_UNROLL
      for (float &scale : row_scales) scale = scale_of(amax, job.power_of_two);
    } else {
      R1_UNROLL
      for (int i = 0; i < SIDE; ++i) {
        R1_UNROLL
        for (int other = ACROSS / 2; other > 0; other /= 2)
          rows[i] = fmaxf(rows[i], machine.shuffle_xor(rows[i], other));
        row_scales[i] = scale_of(rows[i], job.power_of_two);
      }
      if constexpr (TRANSPOSED) {
        R1_UNROLL
        for (int j = 0; j < SIDE; ++j) {
          columns[j] = fmaxf(columns[j], machine.shuffle_xor(columns[j], ACROSS));
          if (thread % 32 < ACROSS) shared.column_amax[warp][first_column + j] = columns[j];
        }
      }
    }
  }

  R1_BOTH void store_across(float (&tile)[SIDE][SIDE], float scale, int row_block, int column_block, int batch) {
    const int thread = machine.thread(), first_column = thread % ACROSS * SIDE;
    if constexpr (!SQUARE) {
      machine.sync_block();
      if (thread < BLOCK) {
        float amax = 0.0f;
        R1_UNROLL
        for (int warp = 0; warp < ACROSS / 2; ++warp) amax = fmaxf(amax, shared.column_amax[warp][thread]);
        const int column = column_block * BLOCK + thread;
        shared.column_scales[thread] = scale_of(amax, job.power_of_two);
        if (column < job.columns) {
          job.across_scales[int64_t{row_block} * job.columns + column] = shared.column_scales[thread];
        }
      }
      machine.sync_block();
    }
    R1_UNROLL
    for (int j = 0; j < SIDE; ++j) {
      const Divisor divisor(SQUARE ? scale : shared.column_scales[first_column + j]);
      const EightBytes bytes = eight([&](int i) { return divisor.quotient(tile[i][j]); });
      shared.across[first_column + j][swizzled_eight(first_column + j, thread / ACROSS)] = bytes;
    }
    machine.sync_block();
    // Now neighbouring threads have neighbouring rows: 16 of them write 128 bytes. What they write beyond the last row
    // is room that makes the next one begin at a multiple of 16.
    const int row = row_block * BLOCK + thread % ACROSS * SIDE;
    R1_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      const int own = thread / ACROSS + i * ACROSS, column = column_block * BLOCK + own;
      if (column >= job.columns || row >= job.rows) continue;
      uint8_t *to = job.across + batch * job.across_batch + column * job.across_row + row;
      *reinterpret_cast<EightBytes *>(to) = shared.across[own][swizzled_eight(own, thread % ACROSS)];
    }
  }

  template <class Value>
  R1_BOTH EightBytes eight(Value value) const {
    return {machine.to_e4m3(value(0), value(1), value(2), value(3)),
            machine.to_e4m3(value(4), value(5), value(6), value(7))};
  }
};

}  // namespace r1::fp8
