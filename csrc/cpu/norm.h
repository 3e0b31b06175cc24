// RMSNorm and rotary position embedding.
#pragma once

#include "vector.h"

namespace {

// out = x / sqrt(mean(x^2) + eps) * weight, and what x was multiplied by, for every row.
void rms_norm(const float *x, int64_t x_stride, const float *weight, float eps, int64_t rows, int64_t width, float *out,
              float *scales, int threads) {
#pragma omp parallel for num_threads(threads_for(rows *width, threads))
  for (int64_t r = 0; r < rows; ++r) {
    const float *row = x + r * x_stride;
    float *to = out + r * width;
    Vector squares{};
    for (int64_t i = 0; i < width; i += LANES) {
      const Vector part = load(row + i, width - i);
      squares += part * part;
    }
    const float scale = scales[r] = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES)
      store(to + i, load(row + i, width - i) * scale * load(weight + i, width - i), width - i);
  }
}

// d x, and d weight: the rows' part in `count` parts (count, width), added in their order.
void rms_norm_backward(const float *grad, int64_t grad_stride, const float *x, int64_t x_stride, const float *weight,
                       const float *scales, int64_t rows, int64_t width, float *grad_x, float *grad_weight,
                       float *parts, int64_t count, int threads) {
  const int64_t size = (rows + count - 1) / count;
#pragma omp parallel for num_threads(threads_for(2 * rows * width, threads))
  for (int64_t p = 0; p < count; ++p) {
    float *const part = parts + p * width;
    std::memset(part, 0, width * sizeof(float));
    for (int64_t r = p * size; r < least((p + 1) * size, rows); ++r) {
      const float *g = grad + r * grad_stride, *row = x + r * x_stride;
      const float scale = scales[r];
      Vector along{};
      for (int64_t i = 0; i < width; i += LANES) {
        const Vector both = load(g + i, width - i) * load(row + i, width - i);
        along += both * load(weight + i, width - i);
        store(part + i, load(part + i, width - i) + both * scale, width - i);
      }
      const float back = -sum(along) / width * scale * scale * scale;
      for (int64_t i = 0; i < width; i += LANES) {
        const Vector straight = load(g + i, width - i) * load(weight + i, width - i) * scale;
        store(grad_x + r * width + i, straight + load(row + i, width - i) * back, width - i);
      }
    }
  }
  std::memset(grad_weight, 0, width * sizeof(float));
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < width; ++i) grad_weight[i] += parts[p * width + i];
}

// Pairs of every head's numbers turned by the token's angles: neighbours, or i and i + half. out is contiguous.
void apply_rope(const float *x, int64_t token_stride, int64_t head_stride, const float *cos, const float *sin,
                int64_t tokens, int64_t heads, int64_t half, bool interleaved, bool inverse, float *out, int threads) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  const float sign = inverse ? -1.0f : 1.0f;
#pragma omp parallel for num_threads(threads_for(4 * tokens * heads * half, threads))
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < heads; ++n) {
      const float *from = x + t * token_stride + n * head_stride;
      float *to = out + (t * heads + n) * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        const float a = from[i * step], b = from[i * step + apart];
        const float c = cos[t * half + i], s = sin[t * half + i] * sign;
        to[i * step] = a * c - b * s;
        to[i * step + apart] = b * c + a * s;
      }
    }
}

}  // namespace
