// Where things lie: stages in shared memory, their swizzle, the matrix units' descriptors and accumulators.
#pragma once

#include "schedule.h"

namespace r1::fp8 {

constexpr int WARP = 32;
constexpr int WARP_GROUP = 128;
constexpr int CONSUMERS = 2;                           // warp groups that multiply
constexpr int THREADS = (CONSUMERS + 1) * WARP_GROUP;  // and one that fetches
constexpr int MATRIX_ROWS = 64;                        // of one warp-group product
constexpr int MATRIX_DEPTH = 32;                       // of one in FP8
constexpr int SHARED_LIMIT = 227 * 1024;               // bytes a block of Hopper may have
constexpr int SWIZZLE_BYTES = 1024;                    // eight rows of 128 bytes: stages begin at multiples of it
constexpr int STAGED_COLUMNS = 64;                     // of bfloat16 results that a warp lays out before it stores them
constexpr int STAGED_STRIDE = STAGED_COLUMNS + 8;      // padded by 16 bytes: neighbouring rows in different banks

// The byte of a tile of rows of 128 bytes that copy engine and matrix units take for (row, byte): 16-byte units of a
// row change places with the row's number.
R1_BOTH constexpr int swizzled(int row, int byte) { return row * BLOCK + (byte ^ (row % 8 * 16)); }

// What the matrix units want to know of such a tile (PTX ISA, wgmma, "matrix descriptor"): where it begins, 1024 bytes
// from eight rows to the next eight, a 128-byte swizzle.
R1_BOTH constexpr uint64_t matrix_descriptor(uint32_t shared_address) {
  return (shared_address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{SWIZZLE_BYTES >> 4} << 32 | uint64_t{1} << 62;
}

// That of the same rows from `depth` bytes on: a tile begins at a multiple of 1024, so that nothing carries over.
R1_BOTH constexpr uint64_t further_along(uint64_t descriptor, int depth) { return descriptor + (depth >> 4); }

// Which element of a 64-row product a thread of the warp group has in its i-th accumulator.
R1_BOTH constexpr int accumulator_row(int thread, int i) {
  return thread / WARP * 16 + thread % WARP / 4 + i / 2 % 2 * 8;
}
R1_BOTH constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// One block's shared memory. SQUARE: b has a scale for 128 x 128 values, so one a stage, else one a row.
template <int TILE_ROWS, int TILE_COLUMNS, bool SQUARE, bool STAGED>
struct Layout {
  static constexpr int A_BYTES = TILE_ROWS * BLOCK;
  static constexpr int B_BYTES = TILE_COLUMNS * BLOCK;
  static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;  // that the copy engine brings
  static constexpr int A_SCALES = TILE_ROWS;
  static constexpr int B_SCALES = SQUARE ? 1 : TILE_COLUMNS;
  static constexpr int SCALE_BYTES = (A_SCALES + divide_up(B_SCALES, 4) * 4) * 4;
  static constexpr int STAGED_BYTES = STAGED ? CONSUMERS * 4 * 16 * STAGED_STRIDE * 2 : 0;
  static constexpr int FIXED_BYTES = SWIZZLE_BYTES + STAGED_BYTES + sizeof(Table);
  static constexpr int MOST_STAGES = (SHARED_LIMIT - FIXED_BYTES) / (STAGE_BYTES + SCALE_BYTES + 16);
  static constexpr int STAGES = MOST_STAGES < 8 ? MOST_STAGES : 8;

  static constexpr int SCALES = STAGES * STAGE_BYTES;
  static constexpr int STAGED_AT = SCALES + STAGES * SCALE_BYTES;
  static constexpr int BARRIERS = STAGED_AT + STAGED_BYTES;
  static constexpr int TABLE = BARRIERS + 16 * STAGES;
  static constexpr int BYTES = TABLE + sizeof(Table) + SWIZZLE_BYTES;  // a block's memory begins at any multiple of 16
  static_assert(STAGES >= 3 && BYTES <= SHARED_LIMIT, "does not fit in shared memory");
};

}  // namespace r1::fp8
