// The sampler step over raw pointers, compiled once a CPU capability: see capability.h.
//
// Items of one image's elements in C, H, W order; 16 Philox calls at a time in arrays of one word each, whose plain
// loops the compiler makes vectors of. kernels/sampler_step/reference.py explains the arithmetic; it is repeated here
// operation by operation, without fused multiply-adds, so that the bits are the same.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off", "no-trapping-math")  // the latter lets loops with choices become vectors
#endif

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "sampler_step.h"

namespace sign_fast {
namespace {

constexpr int64_t BLOCKS = 16;  // Philox calls at a time
constexpr int64_t CHUNK = 512;  // elements at a time: what they need stays in the first-level cache
static_assert(CHUNK % (4 * BLOCKS) == 0 && kSamplerItem % CHUNK == 0);

// reference.py: LOG, SIN, COS and the other constants, with their error bounds
constexpr float LOG[8] = {0.3333333134651184f,   -0.2500081956386566f, 0.20001226663589478f, -0.16623356938362122f,
                          0.14201757311820984f, -0.13160182535648346f, 0.1276157647371292f,  -0.07634496688842773f};
constexpr float SIN[3] = {-0.16666655242443085f, 0.00833216030150652f, -0.00019515282474458218f};
constexpr float COS[3] = {0.04166664555668831f, -0.0013887316454201937f, 2.44331567955669e-05f};
constexpr double kAngle = 0.7853981633974483 / 536870912;
constexpr float ANGLE = static_cast<float>(kAngle);
constexpr float ANGLE_HIGH = 3216.0f / 2199023255552.0f;
constexpr float ANGLE_LOW = static_cast<float>(kAngle - 3216.0 / 2199023255552.0);
constexpr float LN2_HIGH = 355.0f / 512;
constexpr float LN2_LOW = static_cast<float>(0.6931471805599453 - 355.0 / 512);
constexpr uint32_t NEAR_ONE = 0x4AFB0CCC;
constexpr int32_t ROOT_HALF_BITS = 0x3F3504F3;

template <typename To, typename From>
inline To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Without AVX-512 there is no conversion of unsigned words; both halves are exact, so the sum rounds once.
inline float to_float(uint32_t v) {
  return static_cast<float>(static_cast<int32_t>(v >> 16)) * 65536.0f +
         static_cast<float>(static_cast<int32_t>(v & 0xFFFF));
}

// −2·ln u: the square of the radius
inline float square_radius(uint32_t w) {
  const uint32_t gap = ~w;
  const bool near = gap < NEAR_ONE;
  const float value = to_float(near ? gap : w + 1);
  const int32_t b = bits<int32_t>(value) - ROOT_HALF_BITS;
  const float mantissa = bits<float>((b & 0x7FFFFF) + ROOT_HALF_BITS);
  const float f = near ? value * -2.3283064365386963e-10f : mantissa - 1.0f;
  const float k = static_cast<float>(near ? 0 : 32 - (b >> 23));
  const float square = f * f;
  float p = LOG[7];
  for (int i = 6; i >= 0; --i) p = p * f + LOG[i];
  const float rest = f * square * p - 0.5f * square;
  return 2.0f * (k * LN2_HIGH - (f + (rest - k * LN2_LOW)));
}

inline void cos_sin(uint32_t w, float& x, float& y) {
  const uint32_t masked = w & 0x1FFFFFFF;
  const int32_t part = static_cast<int32_t>(w & 0x20000000 ? 0x20000000 - masked : masked);
  const float high = static_cast<float>(part & 0x3FFE0000), low = static_cast<float>(part & 0x1FFFF);
  const float lead = high * ANGLE_HIGH;
  const float tail = high * ANGLE_LOW + low * ANGLE;
  const float a = lead + tail;
  const float square = a * a;
  const float sine = lead + (tail + a * square * ((SIN[2] * square + SIN[1]) * square + SIN[0]));
  const float cosine = 1.0f - (0.5f * square - square * square * ((COS[2] * square + COS[1]) * square + COS[0]));
  const bool swap = (w + 0x20000000) & 0x40000000;
  const uint32_t cx = bits<uint32_t>(swap ? sine : cosine), sx = bits<uint32_t>(swap ? cosine : sine);
  x = bits<float>(cx ^ ((w + 0x40000000) & 0x80000000));
  y = bits<float>(sx ^ (w & 0x80000000));
}

// std::sqrt in a loop of its own would call the library: the pragma above forgets -fno-math-errno
inline void roots(float* values) {
  for (int64_t i = 0; i < BLOCKS; i += Vec::size()) Vec::loadu(values + i).sqrt().store(values + i);
}

// out: the 4·BLOCKS normals of calls first, first + 1, …
inline void normals(int64_t seed, int64_t step, int64_t first, float* out) {
  uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS];
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int64_t i = 0; i < BLOCKS; ++i) {
    uint32_t a = static_cast<uint32_t>(first + i), b = static_cast<uint32_t>(step), c = 0, d = 0;
#pragma GCC unroll 10
    for (uint32_t round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{0xD2511F53u} * a, q = uint64_t{0xCD9E8D57u} * c;
      a = static_cast<uint32_t>(q >> 32) ^ b ^ (k0 + round * 0x9E3779B9u);
      c = static_cast<uint32_t>(p >> 32) ^ d ^ (k1 + round * 0xBB67AE85u);
      b = static_cast<uint32_t>(q);
      d = static_cast<uint32_t>(p);
    }
    c0[i] = a, c1[i] = b, c2[i] = c, c3[i] = d;
  }
  float r0[BLOCKS], r1[BLOCKS], x0[BLOCKS], x1[BLOCKS], y0[BLOCKS], y1[BLOCKS];
  for (int64_t i = 0; i < BLOCKS; ++i) r0[i] = square_radius(c0[i]);
  for (int64_t i = 0; i < BLOCKS; ++i) r1[i] = square_radius(c2[i]);
  roots(r0), roots(r1);
  for (int64_t i = 0; i < BLOCKS; ++i) cos_sin(c1[i], x0[i], y0[i]);
  for (int64_t i = 0; i < BLOCKS; ++i) cos_sin(c3[i], x1[i], y1[i]);
  for (int64_t i = 0; i < BLOCKS; ++i) {
    out[4 * i] = r0[i] * x0[i];
    out[4 * i + 1] = r0[i] * y0[i];
    out[4 * i + 2] = r1[i] * x1[i];
    out[4 * i + 3] = r1[i] * y1[i];
  }
}

// Steps through one image's elements in C, H, W order where the memory is H, W, C.
struct Walk {
  int64_t channels, pixels, channel, pixel;

  Walk(int64_t channels, int64_t pixels, int64_t element)
      : channels(channels), pixels(pixels), channel(element / pixels), pixel(element % pixels) {}
  // calls body(i, at) for the next n elements
  template <typename Body>
  void each(int64_t n, const Body& body) const {
    int64_t c = channel, p = pixel;
    for (int64_t i = 0; i < n;) {
      const int64_t run = std::min(n - i, pixels - p);
      for (int64_t j = 0; j < run; ++j) body(i + j, (p + j) * channels + c);
      i += run, p = 0, ++c;
    }
  }
};

template <typename T>
inline void load(const T* image, int64_t first, int64_t n, bool walk, const SamplerArgs& a, float* out) {
  if (walk) {
    Walk(a.channels, a.pixels, first).each(n, [&](int64_t i, int64_t at) { out[i] = static_cast<float>(image[at]); });
  } else {
    widen(image + first, n, out);
  }
}

inline void load(const void* from, SamplerDtype dtype, int64_t image, int64_t first, int64_t n, bool walk,
                 const SamplerArgs& a, float* out) {
  const int64_t start = image * a.channels * a.pixels;
  switch (dtype) {
    case SamplerDtype::Float:
      return load(static_cast<const float*>(from) + start, first, n, walk, a, out);
    case SamplerDtype::BFloat16:
      return load(static_cast<const c10::BFloat16*>(from) + start, first, n, walk, a, out);
    case SamplerDtype::Half:
      return load(static_cast<const c10::Half*>(from) + start, first, n, walk, a, out);
  }
}

template <typename T>
inline void store(T* image, int64_t first, int64_t n, bool walk, const SamplerArgs& a, const float* values) {
  if (walk) {
    Walk(a.channels, a.pixels, first).each(n, [&](int64_t i, int64_t at) { image[at] = static_cast<T>(values[i]); });
  } else {
    narrow(values, n, image + first);
  }
}

inline void store(const SamplerArgs& a, int64_t image, int64_t first, int64_t n, bool walk, const float* values) {
  const int64_t start = image * a.channels * a.pixels;
  switch (a.y_dtype) {
    case SamplerDtype::Float:
      return store(static_cast<float*>(a.y) + start, first, n, walk, a, values);
    case SamplerDtype::BFloat16:
      return store(static_cast<c10::BFloat16*>(a.y) + start, first, n, walk, a, values);
    case SamplerDtype::Half:
      return store(static_cast<c10::Half*>(a.y) + start, first, n, walk, a, values);
  }
}

}  // namespace

void SIGN_FAST_ENTRY(sampler_step)(const SamplerArgs& a, int64_t begin, int64_t end) {
  const int64_t elements = a.channels * a.pixels, items = sampler_items(a);
  // bytes need no noise and are written in H, W, C order: in channels_last every tensor then lies in order
  const bool walk = a.channels_last && a.channels > 1 && a.pixels > 1 && a.seeds;
  const bool bytes_walk = a.bytes && !a.channels_last && a.channels > 1 && a.pixels > 1;
  float d[CHUNK] = {}, f[CHUNK] = {}, n[CHUNK] = {};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / items, start = item % items * kSamplerItem;
    const float skip = a.c_skip ? a.c_skip[image * a.c_skip_row] : 1.0f;
    const float out = a.c_out ? a.c_out[image * a.c_out_row] : 0.0f;
    const float scale = a.scale ? a.scale[image * a.scale_row] : 1.0f;
    const float sigma = a.sigma ? a.sigma[image * a.sigma_row] : 0.0f;
    for (int64_t first = start; first < std::min(start + kSamplerItem, elements); first += CHUNK) {
      const int64_t count = std::min(CHUNK, elements - first);
      if (a.x) load(a.x, a.x_dtype, image, first, count, walk, a, d);
      if (a.network_output) {
        load(a.network_output, a.network_dtype, image, first, count, walk, a, f);
        for (int64_t i = 0; i < count; ++i) d[i] = skip * d[i] + out * f[i];
      }
      if (a.seeds) {
        for (int64_t i = 0; i < count; i += 4 * BLOCKS) normals(a.seeds[image], a.step, (first + i) / 4, n + i);
        if (a.x) {
          for (int64_t i = 0; i < count; ++i) d[i] = scale * d[i] + sigma * n[i];
        } else {
          for (int64_t i = 0; i < count; ++i) d[i] = n[i] * sigma;
        }
      }
      if (!a.bytes) {
        store(a, image, first, count, walk, d);
        continue;
      }
      uint8_t* to = static_cast<uint8_t*>(a.y) + image * elements;
      uint8_t rounded[CHUNK];
      for (int64_t i = 0; i < count; ++i) {
        float v = d[i] * 127.5f;
        v = v > -128.0f ? v : -128.0f;  // NaN too
        v = v < 127.0f ? v : 127.0f;
        rounded[i] = static_cast<uint8_t>(static_cast<int32_t>(v + 128.0f));
      }
      if (bytes_walk) {
        Walk(a.channels, a.pixels, first).each(count, [&](int64_t i, int64_t at) { to[at] = rounded[i]; });
      } else {
        std::copy_n(rounded, count, to + first);
      }
    }
  }
}

}  // namespace sign_fast
