// Attention over raw pointers, compiled once a CPU capability: see capability.h.
#include "attention.h"

#include <cmath>
#include <limits>

#include "convolution_kernel.h"
#include "exponential.h"
#include "matmul_tile.h"

namespace sign_fast {
namespace {

inline int64_t whole(int64_t count) { return (count + V - 1) / V * V; }

// from is (tokens, channels) with rows `row` apart; to is (block of tokens, channels, vectors of the block)
void pack_keys(const float* from, int64_t row, int64_t tokens, int64_t channels, float* to) {
  const int64_t vectors = whole(tokens) / V;
  for (int64_t i = 0; i < block_count(vectors); ++i) {
    const Block block = sign_fast::block(vectors, i);
    const int64_t step = block.vectors * V;
    for (int64_t n = 0; n < block.vectors; ++n) {
      const int64_t first = (block.first + n) * V, rows = std::min(V, tokens - first);
      const float* x = from + first * row;
      float* y = to + n * V;
      int64_t c = 0;
      if (rows == V)
        for (; c + V <= channels; c += V) at::vec::transpose_mxn<float, V, V>(x + c, row, y + c * step, step);
      for (; c < channels; ++c)
        for (int64_t r = 0; r < V; ++r) y[c * step + r] = r < rows ? x[r * row + c] : 0.f;
    }
    to += channels * step;
  }
}

// the same, to (block of channels, tokens, vectors of the block)
void pack_values(const float* from, int64_t row, int64_t tokens, int64_t channels, float* to) {
  const int64_t vectors = whole(channels) / V;
  for (int64_t i = 0; i < block_count(vectors); ++i) {
    const Block block = sign_fast::block(vectors, i);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = 0; n < block.vectors; ++n, to += V) {
        const int64_t first = (block.first + n) * V;
        load(from + t * row + first, channels - first).store(to);
      }
  }
}

// scores = e^(scale·(score − largest)); returns 1/Σ
inline float softmax(float* scores, int64_t count, float scale) {
  Vec most(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + V <= count; i += V) most = at::vec::maximum(most, Vec::loadu(scores + i));
  float largest = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, most);
  for (int64_t j = i; j < count; ++j) largest = std::max(largest, scores[j]);
  const Vec top(largest), factor(-scale);
  Vec total(0.f);
  for (i = 0; i < count; i += V) {  // the scores fill whole vectors
    Vec e = exp_of_minus((Vec::loadu(scores + i) - top) * factor);
    if (count - i < V) e = Vec::set(Vec(0.f), e, count - i);
    e.store(scores + i);
    total = total + e;
  }
  return 1 / sum(total);
}

void queries(const AttentionTask& t, const float* q, float* y, int64_t begin, int64_t end, const float* keys,
             const float* values, float* scores) {
  const int64_t row = 3 * t.heads * t.channels, out = t.heads * t.channels, width = whole(t.tokens);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(t.channels)));
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t count = std::min(ROWS, end - first);
    const float* x[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) x[r] = q + (first + std::min(r, count - 1)) * row;
    const float* w = keys;
    for (int64_t i = 0; i < block_count(width / V); ++i) {
      const Block block = sign_fast::block(width / V, i);
      with_vectors(block.vectors, [&](auto vectors) {
        multiply<vectors, ROWS>(x, w, t.channels, [&](const auto& sum) {
#pragma GCC unroll 8
          for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int64_t n = 0; n < vectors; ++n) sum[r][n].store(scores + r * width + (block.first + n) * V);
        });
      });
      w += t.channels * block.vectors * V;
    }
    float factor[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) {
      if (r < count) factor[r] = softmax(scores + r * width, t.tokens, scale);
      x[r] = scores + std::min(r, count - 1) * width;
    }
    w = values;
    const int64_t vectors_out = whole(t.channels) / V;
    for (int64_t i = 0; i < block_count(vectors_out); ++i) {
      const Block block = sign_fast::block(vectors_out, i);
      with_vectors(block.vectors, [&](auto vectors) {
        multiply<vectors, ROWS>(x, w, t.tokens, [&](const auto& sum) {
#pragma GCC unroll 8
          for (int64_t r = 0; r < ROWS; ++r) {
            if (r >= count) break;
#pragma GCC unroll 3
            for (int64_t n = 0; n < vectors; ++n) {
              const int64_t c = (block.first + n) * V;
              store(y + (first + r) * out + c, sum[r][n] * Vec(factor[r]), t.channels - c);
            }
          }
        });
      });
      w += t.tokens * block.vectors * V;
    }
  }
}

}  // namespace

int64_t SIGN_FAST_ENTRY(attention_scratch)(int64_t tokens, int64_t channels) {
  return whole(tokens) * channels + tokens * whole(channels) + ROWS * whole(tokens);
}

void SIGN_FAST_ENTRY(attention)(const AttentionTask& t, int64_t begin, int64_t end, float* scratch) {
  const int64_t chunks = t.chunks(), all = t.heads * t.channels;
  float *keys = scratch, *values = keys + whole(t.tokens) * t.channels, *scores = values + t.tokens * whole(t.channels);
  for (int64_t item = begin, packed = -1; item < end; ++item) {
    const int64_t head = item / chunks, first = item % chunks * t.chunk;
    const int64_t b = head / t.heads, offset = head % t.heads * t.channels;
    const float* q = t.qkv + b * t.tokens * 3 * all + offset;
    if (head != packed) {
      pack_keys(q + all, 3 * all, t.tokens, t.channels, keys);
      pack_values(q + 2 * all, 3 * all, t.tokens, t.channels, values);
      packed = head;
    }
    queries(t, q, t.y + b * t.tokens * all + offset, first, std::min(first + t.chunk, t.tokens), keys, values, scores);
  }
}

}  // namespace sign_fast
