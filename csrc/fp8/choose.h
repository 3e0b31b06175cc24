// Which tile a product of a given shape takes.
#pragma once

#include "schedule.h"

namespace r1::fp8 {

struct TileShape {
  int rows, columns;
  double rate;  // of the matrix units that a full wave of such tiles keeps busy, by reasoning: not yet measured
};

// A tile of r x c reads (r / 2 + c) * 128 bytes from the L2 cache for r * c * 128 products: of 256 x 128 two warp
// groups hide each other's scaling and the cache keeps up, of 128 x 128 the cache is at its limit, and narrow tiles
// are for few rows, where only the weight's way from memory counts and all multiprocessors shall fetch.
constexpr TileShape TILES[] = {{256, 128, 1.0}, {128, 128, 0.85}, {128, 64, 0.6}};

// The index into TILES of what should take the least time: whole waves of pairs of tiles, at each one's rate.
inline int choose_tile(int rows, int groups, int columns, int multiprocessors) {
  int best = 0;
  double least = 0.0;
  for (int i = 0; i < 3; ++i) {
    const int64_t tiles = int64_t{groups} * divide_up(rows, TILES[i].rows);
    const int64_t pairs = tiles * divide_up(columns, PAIR * TILES[i].columns), at_once = multiprocessors / PAIR;
    const double waves = static_cast<double>((pairs + at_once - 1) / at_once);
    const double time = waves * TILES[i].rows * TILES[i].columns / TILES[i].rate;
    if (i == 0 || time < least) {
      best = i;
      least = time;
    }
  }
  return best;
}

}  // namespace r1::fp8
