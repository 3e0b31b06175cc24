// One query a sequence against cached keys and values, and writing them.
#pragma once

#include "product.h"

namespace {

// In place: softmax of scale times the first `length` numbers of a row that has room for whole vectors, 0 after them.
// Returns the log of the sum of exponentials.
inline float softmax(float *row, int64_t length, float scale) {
  for (int64_t i = 0; i < length; i += LANES) store(row + i, load(row + i) * scale);
  const int64_t whole = (length + LANES - 1) / LANES * LANES;
  for (int64_t i = length; i < whole; ++i) row[i] = -__builtin_inff();
  Vector most = all(-__builtin_inff()), total{};
  for (int64_t i = 0; i < whole; i += LANES) most = maximum(load(row + i), most);
  const float bound = largest(most);
  for (int64_t i = 0; i < whole; i += LANES) {
    const Vector part = exponential(load(row + i) - bound);
    store(row + i, part);
    total += part;
  }
  const float all_of_them = sum(total), share = 1.0f / all_of_them;
  for (int64_t i = 0; i < whole; i += LANES) store(row + i, load(row + i) * share);
  return bound + __builtin_logf(all_of_them);
}

// softmax(scale q k^T) v for every sequence b and head n: q (batch, heads, width), out (batch, heads, value_width).
// Each key head serves heads / key_heads heads that follow one another. k and v are caches (cached_pages, page_size,
// key_heads, k_width or v_width), whose first `width` and `value_width` numbers count. pages (batch, table_width) lists
// each sequence's. Before any work, a length beyond the table is returned, and -1 for a page that is not in the cache;
// else 0.
int64_t decode(const float *q, const float *k, const float *v, int64_t k_width, int64_t v_width, const int64_t *pages,
               int64_t table_width, int64_t page_size, int64_t cached_pages, const int64_t *lengths, int64_t batch,
               int64_t heads, int64_t key_heads, int64_t width, int64_t value_width, float scale, float *out,
               int threads) {
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (lengths[b] > table_width * page_size) return lengths[b];
    for (int64_t i = 0; i * page_size < lengths[b]; ++i)
      if (pages[b * table_width + i] < 0 || pages[b * table_width + i] >= cached_pages) return -1;
    total += lengths[b];
  }
  const int64_t shared = heads / key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(total * heads * (width + value_width), threads))
  for (int64_t task = 0; task < batch * key_heads; ++task) {
    static thread_local Scratch memory;
    const int64_t b = task / key_heads, m = task % key_heads, head = b * heads + m * shared;
    const int64_t length = lengths[b];
    if (length <= 0) {
      std::memset(out + head * value_width, 0, shared * value_width * sizeof(float));
      continue;
    }
    const int64_t room = (length + LANES - 1) / LANES * LANES;
    auto *const results = static_cast<float **>(
        memory.bytes(shared * (2 * sizeof(float *) + room * sizeof(float)) + length * sizeof(int64_t)));
    const float **const weights = const_cast<const float **>(results + shared);
    auto *const places = reinterpret_cast<int64_t *>(results + 2 * shared);
    auto *const scores = reinterpret_cast<float *>(places + length);
    for (int64_t page = 0, i = 0; i < length; ++page) {
      const int64_t first = pages[b * table_width + page] * page_size;
      for (int64_t j = 0; j < page_size && i < length; ++j) places[i++] = first + j;
    }
    const Matrix queries{q + head * width, width, nullptr}, keys{k + m * k_width, key_heads * k_width, places};
    multiply_transposed(queries, keys, shared, length, width, scores, room);
    for (int64_t n = 0; n < shared; ++n) {
      softmax(scores + n * room, length, scale);
      weights[n] = scores + n * room;
      results[n] = out + (head + n) * value_width;
    }
    multiply(weights, {v + m * v_width, key_heads * v_width, places}, shared, length, value_width, results);
  }
  return 0;
}

// Row b of `rows` to place positions[b] of its sequence, unless that is negative. Before any work, a position beyond
// the table is returned, and -2 for a page that is not in the cache; else -1.
int64_t append(float *cache, const float *rows, const int64_t *pages, int64_t table_width, int64_t page_size,
               int64_t cached_pages, const int64_t *positions, int64_t batch, int64_t width) {
  for (int64_t b = 0; b < batch; ++b) {
    if (positions[b] < 0) continue;
    if (positions[b] >= table_width * page_size) return positions[b];
    const int64_t page = pages[b * table_width + positions[b] / page_size];
    if (page < 0 || page >= cached_pages) return -2;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t position = positions[b];
    if (position < 0) continue;
    const int64_t page = pages[b * table_width + position / page_size];
    std::memcpy(cache + (page * page_size + position % page_size) * width, rows + b * width, width * sizeof(float));
  }
  return -1;
}

}  // namespace
