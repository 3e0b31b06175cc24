// Which tile of which product a pair of blocks computes, and in which order.
#pragma once

#include "../machine.h"

namespace r1::fp8 {

constexpr int BLOCK = 128;        // values under one scale, and of the depth of one stage
constexpr int PAIR = 2;           // blocks of a cluster: neighbours along the columns, which share their tile of a
constexpr int MAX_EXPERTS = 512;  // a table in shared memory has two numbers for each
constexpr int TOGETHER = 8;       // tiles of rows that go along b together, so that it is read from the L2 cache

// out (rows, columns) = a (rows, depth) @ b (columns, depth).T. With ROWS an expert owns some of a's rows and a b of
// its own, with DEPTH some of the depth of both and an out of its own; which, tokens_per_expert says.
enum class Groups { NONE, ROWS, DEPTH };

struct Problem {
  int rows, columns, depth;
  int experts;                    // 1 without groups
  const void *tokens_per_expert;  // on the device; int64 if `wide`, else int32
  bool wide;

  R1_BOTH int tokens(int expert) const {
    return wide ? static_cast<int>(static_cast<const int64_t *>(tokens_per_expert)[expert])
                : static_cast<const int32_t *>(tokens_per_expert)[expert];
  }
};

// In shared memory: the tokens, and the tiles of rows, of all experts before each one, and of all.
struct Table {
  int tokens[MAX_EXPERTS + 1], tiles[MAX_EXPERTS + 1];

  // One of the entries 0 ... experts. Counts that add up to more than there is reach no further than the end.
  R1_BOTH void fill(const Problem &problem, int entry, int end, int tile_rows) {
    int before = 0, tiles_before = 0;
    for (int expert = 0; expert < entry; ++expert) {
      const int count = problem.tokens(expert);
      before += count;
      tiles_before += divide_up(count, tile_rows);
    }
    tokens[entry] = before < end ? before : end;
    tiles[entry] = tiles_before;
  }

  // Whose tile of rows this is: the last expert that does not begin after it, as those before it may be empty.
  R1_BOTH int expert_of(int tile, int experts) const {
    int low = 0, high = experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (tiles[middle] <= tile ? low : high) = middle;
    }
    return low;
  }
};

// One block's part of out: rows [row, row_end) of what it computes are the expert's, columns begin at `column`, and
// blocks [depth_begin, depth_end) of the depth are added up, of which the tokens [begin, end) count.
struct Tile {
  int expert, row, row_end, column, depth_begin, depth_end, begin, end;
};

template <int TILE_ROWS, int TILE_COLUMNS, Groups GROUPS>
struct Schedule {
  const Problem &problem;
  const Table &table;

  R1_BOTH int column_pairs() const { return divide_up(problem.columns, PAIR * TILE_COLUMNS); }

  // Tiles that pairs of blocks take, numbered from 0.
  R1_BOTH int size() const {
    if (GROUPS == Groups::ROWS) return table.tiles[problem.experts] * column_pairs();
    return problem.experts * divide_up(problem.rows, TILE_ROWS) * column_pairs();
  }

  // The tile that the block of this rank takes of pair number `index`.
  R1_BOTH Tile at(int index, int rank) const {
    const int columns = column_pairs();
    int expert = 0, row_tiles = divide_up(problem.rows, TILE_ROWS), first_row = 0, row_end = problem.rows;
    int begin = 0, end = problem.depth;
    if (GROUPS == Groups::ROWS) {
      expert = table.expert_of(index / columns, problem.experts);
      index -= table.tiles[expert] * columns;
      row_tiles = table.tiles[expert + 1] - table.tiles[expert];
      first_row = table.tokens[expert];
      row_end = table.tokens[expert + 1];
    }
    if (GROUPS == Groups::DEPTH) {
      expert = index / (row_tiles * columns);
      index -= expert * row_tiles * columns;
      begin = table.tokens[expert];
      end = table.tokens[expert + 1];
    }
    const int first = index / (TOGETHER * columns) * TOGETHER, inside = index % (TOGETHER * columns);
    const int together = row_tiles - first < TOGETHER ? row_tiles - first : TOGETHER;
    Tile tile;
    tile.expert = expert;
    tile.row = first_row + (first + inside % together) * TILE_ROWS;
    tile.row_end = row_end;
    tile.column = (inside / together * PAIR + rank) * TILE_COLUMNS;
    tile.begin = begin;
    tile.end = end;
    tile.depth_begin = begin / BLOCK;
    tile.depth_end = begin < end ? divide_up(end, BLOCK) : tile.depth_begin;
    return tile;
  }
};

}  // namespace r1::fp8
