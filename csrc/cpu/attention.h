// One query a sequence against cached keys and values, and writing them.
#pragma once

#include "product.h"

namespace {

// softmax(scale q k^T) v for every sequence b and head n: q (batch, heads, width), out (batch, heads, value_width).
// Key heads, `key_heads` of them, each serve as many of the heads that follow one another. k and v are the caches:
// tokens stand token_strides apart, their heads head_strides. pages (batch, table_width) lists each sequence's pages of
// page_size tokens, of `cached_pages`. Before any work, a length beyond the table is returned, and -1 for a page that is
// not in the cache; else 0.
int64_t decode(const float *q, const float *k, const float *v, int64_t k_token_stride, int64_t v_token_stride,
               int64_t k_head_stride, int64_t v_head_stride, const int32_t *pages, int64_t table_width,
               int64_t page_size, int64_t cached_pages, const int32_t *lengths, int64_t batch, int64_t heads,
               int64_t key_heads, int64_t width, int64_t value_width, float scale, float *out, int threads) {
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (lengths[b] > table_width * page_size) return lengths[b];
    for (int64_t i = 0; i * page_size < lengths[b]; ++i)
      if (pages[b * table_width + i] < 0 || pages[b * table_width + i] >= cached_pages) return -1;
    total += lengths[b];
  }
  const int64_t shared = heads / key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(total *heads *(width + value_width), threads))
  for (int64_t b = 0; b < batch; ++b) {
    static thread_local Scratch memory;
    const int64_t length = lengths[b] > 0 ? lengths[b] : 0, padded = (length + LANES - 1) / LANES * LANES;
    float *const result = out + b * heads * value_width;
    if (!length) {
      std::memset(result, 0, heads * value_width * sizeof(float));
      continue;
    }
    auto *const results = static_cast<float **>(
        memory.bytes(shared * (2 * sizeof(float *) + padded * sizeof(float)) + length * sizeof(int64_t)));
    const float **const scores = const_cast<const float **>(results + shared);
    auto *const places = reinterpret_cast<int64_t *>(results + 2 * shared);
    auto *const numbers = reinterpret_cast<float *>(places + length);
    for (int64_t page = 0, i = 0; i < length; ++page) {
      const int64_t first = pages[b * table_width + page] * page_size;
      for (int64_t j = 0; j < page_size && i < length; ++j) places[i++] = first + j;
    }
    for (int64_t m = 0; m < key_heads; ++m) {
      const Rows queries{q + (b * heads + m * shared) * width, width, nullptr};
      multiply_transposed(queries, {k + m * k_head_stride, k_token_stride, places}, shared, length, width, numbers,
                          padded);
      for (int64_t n = 0; n < shared; ++n) {
        float *const row = numbers + n * padded;
        scores[n] = row;
        results[n] = result + (m * shared + n) * value_width;
        Vector most = all(-__builtin_inff());
        for (int64_t i = 0; i < padded; i += LANES) {
          const Vector scaled = load(row + i) * scale;
          store(row + i, scaled);
          if (i + LANES > length)
            for (int64_t j = length; j < padded; ++j) row[j] = -__builtin_inff();
          most = maximum(load(row + i), most);
        }
        const float bound = largest(most);
        Vector weights{};
        for (int64_t i = 0; i < padded; i += LANES) {
          const Vector part = exponential(load(row + i) - bound);
          store(row + i, part);
          weights += part;
        }
        const float share = 1.0f / sum(weights);
        for (int64_t i = 0; i < padded; i += LANES) store(row + i, load(row + i) * share);
      }
      multiply(scores, {v + m * v_head_stride, v_token_stride, places}, shared, length, value_width, results);
    }
  }
  return 0;
}

// Row b of `rows` to place positions[b] of its sequence, unless that is negative. Before any work, a position beyond the
// table is returned, and -2 for a page that is not in the cache; else -1.
int64_t append(float *cache, const float *rows, const int32_t *pages, int64_t table_width, int64_t page_size,
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
