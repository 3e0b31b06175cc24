// Products of small matrices, a tile of the result at a time in registers. A row of a result is summed in the same
// order whatever the other rows are.
#pragma once

#include "vector.h"

namespace {

// Row i begins at list[i], or i itself without a list, times the stride.
struct Matrix {
  const float *data;
  int64_t stride;
  const int64_t *list;

  const float *operator[](int64_t i) const { return data + (list ? list[i] : i) * stride; }
};

// What is summed at a time: of so many rows two operands stay in the first-level cache, and the error of a float32 sum
// stays small.
constexpr int64_t DEPTH = 256;

// out[r][first..] = sum over k in begin..end of a[r][k] b[k][first..], or that added to it unless begin is 0, for ROWS
// rows and VECTORS vectors of columns. TAIL: of the last vector, `columns` numbers.
template <int ROWS, int VECTORS, bool TAIL>
inline void tile(const float *const *a, Matrix b, int64_t begin, int64_t end, int64_t first, int64_t columns,
                 float *const *out) {
  Vector total[ROWS][VECTORS] = {};
  for (int64_t k = begin; k < end; ++k) {
    const float *row = b[k] + first;
    Vector factor[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) factor[v] = TAIL ? load(row, columns) : load(row + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) total[r][v] += a[r][k] * factor[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float *to = out[r] + first + v * LANES;
      const int64_t count = TAIL ? columns : LANES;
      store(to, begin ? total[r][v] + load(to, count) : total[r][v], count);
    }
}

template <int ROWS>
void multiply_rows(const float *const *a, Matrix b, int64_t depth, int64_t columns, float *const *out) {
  for (int64_t begin = 0; begin < depth || begin == 0; begin += DEPTH) {
    const int64_t end = least(begin + DEPTH, depth);
    int64_t first = 0;
    for (; first + TILE_VECTORS * LANES <= columns; first += TILE_VECTORS * LANES)
      tile<ROWS, TILE_VECTORS, false>(a, b, begin, end, first, 0, out);
    for (; first + LANES <= columns; first += LANES) tile<ROWS, 1, false>(a, b, begin, end, first, 0, out);
    if (first < columns) tile<ROWS, 1, true>(a, b, begin, end, first, columns - first, out);
  }
}

// For the rows that make no whole tile: as many as there are, at most ROWS.
template <int ROWS>
void multiply_last_rows(const float *const *a, Matrix b, int64_t rows, int64_t depth, int64_t columns,
                        float *const *out) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return multiply_rows<ROWS>(a, b, depth, columns, out);
    multiply_last_rows<ROWS - 1>(a, b, rows, depth, columns, out);
  }
}

// out (rows, columns) = a (rows, depth) b (depth, columns); a's and out's rows each begin at their pointer.
void multiply(const float *const *a, Matrix b, int64_t rows, int64_t depth, int64_t columns, float *const *out) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS) multiply_rows<TILE_ROWS>(a + r, b, depth, columns, out + r);
  multiply_last_rows<TILE_ROWS - 1>(a + r, b, rows - r, depth, columns, out + r);
}

// out[r][0..] (+)= sum over k of a[k][r] b[k][0..], for rows first_row.. of out.
template <int ROWS, int VECTORS, bool TAIL>
inline void outer_tile(Matrix a, Matrix b, int64_t depth, int64_t first_row, int64_t first, int64_t columns, float *out,
                       int64_t stride, bool accumulate) {
  Vector total[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const float *left = a[k] + first_row, *right = b[k] + first;
    Vector factor[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) factor[v] = TAIL ? load(right, columns) : load(right + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) total[r][v] += left[r] * factor[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float *to = out + (first_row + r) * stride + first + v * LANES;
      const int64_t count = TAIL ? columns : LANES;
      store(to, accumulate ? total[r][v] + load(to, count) : total[r][v], count);
    }
}

template <int ROWS>
void multiply_outer_rows(Matrix a, Matrix b, int64_t depth, int64_t row, int64_t columns, float *out, bool accumulate) {
  int64_t first = 0;
  for (; first + TILE_VECTORS * LANES <= columns; first += TILE_VECTORS * LANES)
    outer_tile<ROWS, TILE_VECTORS, false>(a, b, depth, row, first, 0, out, columns, accumulate);
  for (; first + LANES <= columns; first += LANES)
    outer_tile<ROWS, 1, false>(a, b, depth, row, first, 0, out, columns, accumulate);
  if (first < columns) outer_tile<ROWS, 1, true>(a, b, depth, row, first, columns - first, out, columns, accumulate);
}

// Matrix begin..end of out (rows, columns) = transposed a (depth, rows) times b (depth, columns), or that added to it.
void multiply_outer(Matrix a, Matrix b, int64_t depth, int64_t begin, int64_t end, int64_t columns, float *out,
                    bool accumulate) {
  for (int64_t k = 0; k < depth || k == 0; k += DEPTH) {
    const int64_t part = least(DEPTH, depth - k);
    const Matrix left = a.list ? Matrix{a.data, a.stride, a.list + k} : Matrix{a[k], a.stride, nullptr};
    const Matrix right = b.list ? Matrix{b.data, b.stride, b.list + k} : Matrix{b[k], b.stride, nullptr};
    int64_t row = begin;
    for (; row + TILE_ROWS <= end; row += TILE_ROWS)
      multiply_outer_rows<TILE_ROWS>(left, right, part, row, columns, out, accumulate || k);
    for (; row < end; ++row) multiply_outer_rows<1>(left, right, part, row, columns, out, accumulate || k);
  }
}

// out[r][c] = a[r] . b[c], for ROWS x COLUMNS of them.
template <int ROWS, int COLUMNS>
inline void dots(Matrix a, Matrix b, int64_t width, int64_t row, int64_t column, float *out, int64_t stride) {
  Vector total[ROWS][COLUMNS] = {};
  const float *left[ROWS], *right[COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) left[r] = a[row + r];
#pragma GCC unroll 8
  for (int c = 0; c < COLUMNS; ++c) right[c] = b[column + c];
  const auto add = [&](int64_t i, auto... count) {
    Vector factor[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) factor[r] = load(left[r] + i, count...);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      const Vector other = load(right[c] + i, count...);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) total[r][c] += factor[r] * other;
    }
  };
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) add(i);
  if (i < width) add(i, width - i);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    float *const to = out + (row + r) * stride + column;
    if constexpr (COLUMNS == 4) {
      const Four four = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
      std::memcpy(to, &four, sizeof(four));
    } else {
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) to[c] = sum(total[r][c]);
    }
  }
}

// out (rows, columns) = a (rows, width) times transposed b (columns, width).
void multiply_transposed(Matrix a, Matrix b, int64_t rows, int64_t columns, int64_t width, float *out, int64_t stride) {
  constexpr int SIDE = 4;
  int64_t column = 0;
  for (; column + SIDE <= columns; column += SIDE) {
    int64_t row = 0;
    for (; row + SIDE <= rows; row += SIDE) dots<SIDE, SIDE>(a, b, width, row, column, out, stride);
    for (; row < rows; ++row) dots<1, SIDE>(a, b, width, row, column, out, stride);
  }
  for (; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row) dots<1, 1>(a, b, width, row, column, out, stride);
}

// out (columns, rows) = x (rows, columns), transposed.
void transpose(const float *x, int64_t rows, int64_t columns, float *out) {
  constexpr int64_t BLOCK = 16;
  for (int64_t r = 0; r < rows; r += BLOCK)
    for (int64_t c = 0; c < columns; c += BLOCK)
      for (int64_t j = c; j < least(c + BLOCK, columns); ++j)
        for (int64_t i = r; i < least(r + BLOCK, rows); ++i) out[j * rows + i] = x[i * columns + j];
}

}  // namespace
