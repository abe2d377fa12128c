// The matrix product over a type of vector arithmetic: included once by the file of each instruction set.
//
// V::rows x V::vectors vectors of `out` are summed in registers. What is multiplied at one step is a unit of 32 bits: a
// float32, or two bfloat16 that follow each other along k (V::paired). A block of each operand is packed before, so that
// the innermost loop reads both without a stride. Everything lies in an unnamed namespace: see row_kernels.h.
#include <immintrin.h>

#include <algorithm>

#include "products.h"

namespace rewardmap {
namespace {

// Eight units of eight lines.
struct Square {
  __m256i line[8];
  void transpose() {
    __m256i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_epi32(line[i], line[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi32(line[i], line[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int k = 0; k < 2; ++k) {
        fours[i + 2 * k] = _mm256_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
        fours[i + 2 * k + 1] = _mm256_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
      }
    for (int i = 0; i < 4; ++i) {
      line[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
      line[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
  }
};

inline void store_units(float* to, __m256i units) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), units); }
inline __m256i load_units(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m256i widen_units(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Units of elements of type T, `depth` elements of k each.
template <class T, bool paired>
struct Units;

template <>
struct Units<float, false> {
  static constexpr int64_t depth = 1;
  static __m256i along(const float* p) { return load_units(p); }
  static __m256i across(const float* p, int64_t) { return load_units(p); }
  static uint32_t one(const float* p, int64_t, bool) {
    uint32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return bits;
  }
};

template <>
struct Units<uint16_t, false> {
  static constexpr int64_t depth = 1;
  static __m256i along(const uint16_t* p) { return _mm256_slli_epi32(widen_units(p), 16); }
  static __m256i across(const uint16_t* p, int64_t) { return along(p); }
  static uint32_t one(const uint16_t* p, int64_t, bool) { return static_cast<uint32_t>(*p) << 16; }
};

template <>
struct Units<uint16_t, true> {
  static constexpr int64_t depth = 2;
  static __m256i along(const uint16_t* p) { return load_units(p); }
  static __m256i across(const uint16_t* p, int64_t stride) {
    return _mm256_or_si256(widen_units(p), _mm256_slli_epi32(widen_units(p + stride), 16));
  }
  // The second of a last, odd k is 0.
  static uint32_t one(const uint16_t* p, int64_t to_next, bool has_next) {
    return *p | (has_next ? static_cast<uint32_t>(p[to_next]) << 16 : 0u);
  }
};

inline void store_one(float* to, uint32_t bits) { __builtin_memcpy(to, &bits, 4); }

// Lines `first` to `first + count` of the operand at depths `k` to `k + depth` as panels of `width` lines: all of a
// panel's units of one depth, then those of the next, to `units` of them. What is beyond `count` and `depth` is 0.
template <class T, bool paired, int64_t width>
struct Packing {
  using U = Units<T, paired>;
  // Panels are written by vectors of 8 units, of which the last ends with the panel and may overlap the one before. In
  // narrower panels it runs over the end, into the panel's next depth, which is written later.
  static constexpr int64_t last = width < 8 ? 0 : width - 8;
  const T* origin;
  int64_t line, deep, count, depth, units;
  float* to;

  Packing(const Operand& from, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t units, float* to)
      : line(from.along_depth ? from.stride : 1), deep(from.along_depth ? 1 : from.stride), count(count), depth(depth),
        units(units), to(to) {
    origin = static_cast<const T*>(from.data) + first * line + k * deep;
    if (from.along_depth) {
      for (int64_t panel = 0; panel < count; panel += width) along(panel);
    } else {
      // Depth by depth: what follows each other in memory is read together.
      for (int64_t unit = 0; unit < units; ++unit)
        for (int64_t panel = 0; panel < count; panel += width) across(panel, unit);
    }
  }

  float* at(int64_t panel, int64_t unit) const { return to + panel * units + unit * width; }

  void one_by_one(int64_t panel, int64_t unit) const {
    const bool there = unit * U::depth < depth, pair = (unit + 1) * U::depth <= depth;
    const T* p = origin + panel * line + unit * U::depth * deep;
    for (int64_t i = 0; i < width; ++i)
      store_one(at(panel, unit) + i, there && panel + i < count ? U::one(p + i * line, deep, pair) : 0u);
  }

  void along(int64_t panel) const {
    // Of each line a few whole cache lines that follow each other: what is fetched with the first is read while it is there.
    constexpr int64_t many = 32;
    int64_t unit = 0;
    if (panel + width <= count) {
      for (; (unit + many) * U::depth <= depth; unit += many)
        for (int64_t i = 0; i < width; i += 8)
          for (int64_t next = 0; next < many; next += 8) square(panel, std::min(i, last), unit + next);
      for (; (unit + 8) * U::depth <= depth; unit += 8)
        for (int64_t i = 0; i < width; i += 8) square(panel, std::min(i, last), unit);
    }
    for (; unit < units; ++unit) one_by_one(panel, unit);
  }

  void square(int64_t panel, int64_t i, int64_t unit) const {
    Square square;
    for (int64_t j = 0; j < 8; ++j)
      square.line[j] =
          i + j < width ? U::along(origin + (panel + i + j) * line + unit * U::depth) : _mm256_setzero_si256();
    square.transpose();
    for (int64_t j = 0; j < 8; ++j) store_units(at(panel, unit + j) + i, square.line[j]);
  }

  void across(int64_t panel, int64_t unit) const {
    const bool overruns = width < 8 && unit + 1 == units;
    if (panel + last + 8 > count || (unit + 1) * U::depth > depth || overruns) return one_by_one(panel, unit);
    const T* p = origin + panel + unit * U::depth * deep;
    for (int64_t i = 0; i < width; i += 8)
      store_units(at(panel, unit) + std::min(i, last), U::across(p + std::min(i, last), deep));
  }
};

template <bool paired, int64_t width>
void pack(const Operand& from, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t units, float* to) {
  if constexpr (paired) {
    Packing<uint16_t, true, width>(from, first, count, k, depth, units, to);
  } else if (from.dtype == Dtype::float32) {
    Packing<float, false, width>(from, first, count, k, depth, units, to);
  } else {
    Packing<uint16_t, false, width>(from, first, count, k, depth, units, to);
  }
}

// How a panel of each side is multiplied by vectors of the arithmetic V.
template <class V>
struct ByVectors {
  static constexpr bool paired = V::paired;
  static constexpr int64_t rows = V::rows, columns = V::vectors * V::width, unit_step = 1;

  static void pack_rows(const Operand& a, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t units, float* to) {
    pack<paired, rows>(a, first, count, k, depth, units, to);
  }

  static void multiply(const float* a, const float* b, int64_t units, float* out, int64_t stride, bool add) {
    using F = typename V::F;
    constexpr int64_t W = V::width, R = V::rows, C = V::vectors;
    F sum[R][C];
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) sum[r][c] = V::set(0.0f);
    // What is summed into arrives during the sums.
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C * W; c += 16) __builtin_prefetch(out + r * stride + c, 1);
    for (int64_t k = 0; k < units; ++k, a += R, b += C * W) {
      F right[C];
      for (int64_t c = 0; c < C; ++c) right[c] = V::load(b + c * W);
      for (int64_t r = 0; r < R; ++r) {
        const F left = V::set(a[r]);
        for (int64_t c = 0; c < C; ++c) sum[r][c] = V::dot(left, right[c], sum[r][c]);
      }
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) {
        float* to = out + r * stride + c * W;
        V::store(to, add ? V::load(to) + sum[r][c] : sum[r][c]);
      }
  }
};

// A block of `out` from packed panels.
template <class P>
void multiply_block(const float* left, const float* right, int64_t units, float* out, int64_t stride, int64_t rows,
                    int64_t columns, bool add) {
  constexpr int64_t R = P::rows, C = P::columns;
  float edge[R * C];
  for (int64_t column = 0; column < columns; column += C)
    for (int64_t row = 0; row < rows; row += R) {
      const float *a = left + row * units, *b = right + column * units;
      float* to = out + row * stride + column;
      if (row + R <= rows && column + C <= columns) {
        P::multiply(a, b, units, to, stride, add);
        continue;
      }
      P::multiply(a, b, units, edge, C, false);
      for (int64_t r = 0; r < R && row + r < rows; ++r)
        for (int64_t c = 0; c < C && column + c < columns; ++c)
          to[r * stride + c] = add ? to[r * stride + c] + edge[r * C + c] : edge[r * C + c];
    }
}

// P: `rows` x `columns` of `out` at a time from `unit_step` units of either side, packed by `pack_rows` and in panels.
template <class P>
void product_tile(const Product& product, const Tile& tile, float* packed) {
  constexpr int64_t per_unit = P::paired ? 2 : 1, block = kBlockDepth * per_unit, step = per_unit * P::unit_step;
  constexpr int64_t most = block_rows(P::rows);
  float* const left = packed;
  float* const right = packed + kBlockRows * kBlockDepth + 32;
  for (int64_t k = 0; k < product.depth; k += block) {
    const int64_t depth = product.depth - k < block ? product.depth - k : block;
    const int64_t units = (depth + step - 1) / step * P::unit_step;
    pack<P::paired, P::columns>(product.b, tile.column, tile.columns, k, depth, units, right);
    for (int64_t row = 0; row < tile.rows; row += most) {
      const int64_t rows = tile.rows - row < most ? tile.rows - row : most;
      P::pack_rows(product.a, tile.row + row, rows, k, depth, units, left);
      float* out = product.out + (tile.row + row) * product.out_stride + tile.column;
      multiply_block<P>(left, right, units, out, product.out_stride, rows, tile.columns, product.add || k > 0);
    }
  }
}

template <class P>
constexpr ProductKernel product_of(const char* name) {
  static_assert(kTileColumns % P::columns == 0 && kBlockDepth % P::unit_step == 0);
  return {name, P::rows, P::columns, product_tile<P>};
}

}  // namespace
}  // namespace rewardmap
