// The matrix product of bfloat16 in Intel's tile registers (AMX): 16 x 32 by 32 x 16 to 16 x 16 of float32 at a step.
// Compiled with -mavx2 -mamx-tile -mamx-bf16; a thread's tiles are configured for each tile of the product.
#include <immintrin.h>

#include "product_kernels.h"

namespace rewardmap {
namespace {

constexpr int64_t kTile = 16, kUnits = kTile * kTile;  // lines of a register, and units of 32 bits in it
constexpr int64_t kPanel = 2 * kTile;                  // what is multiplied is two registers by two

// Registers 0 to 3 hold sums, 4 and 5 parts of a, 6 and 7 parts of b: all of 16 lines of 64 bytes.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

// Lines `first` to `first + count` of a at depths `k` to `k + depth`: of each panel of 32 lines, two registers of 16
// lines and 16 units, then the next 16 units. What lies beyond is 0.
struct Registers {
  using U = Units<uint16_t, true>;
  const uint16_t* origin;
  int64_t line, deep, count, depth, units;
  float* to;

  Registers(const Operand& from, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t units, float* to)
      : line(from.along_depth ? from.stride : 1), deep(from.along_depth ? 1 : from.stride), count(count), depth(depth),
        units(units), to(to) {
    origin = static_cast<const uint16_t*>(from.data) + first * line + k * deep;
    // Unit by unit where those of a line are apart: what follows each other in memory is read together.
    if (from.along_depth) {
      for (int64_t i = 0; i < count; i += kTile)
        for (int64_t unit = 0; unit < units; unit += kTile) along(i, unit);
    } else {
      for (int64_t unit = 0; unit < units; unit += kTile)
        for (int64_t i = 0; i < count; i += kTile) across(i, unit);
    }
  }

  float* at(int64_t i, int64_t unit) const {
    return to + i / kPanel * kPanel * units + unit * kPanel + i % kPanel / kTile * kUnits;
  }

  bool whole(int64_t i, int64_t unit) const { return i + kTile <= count && (unit + kTile) * U::depth <= depth; }

  void one_by_one(int64_t i, int64_t unit) const {
    float* out = at(i, unit);
    for (int64_t r = 0; r < kTile; ++r)
      for (int64_t u = 0; u < kTile; ++u) {
        const int64_t k = (unit + u) * U::depth;
        const bool there = i + r < count && k < depth;
        store_one(out + r * kTile + u, there ? U::one(origin + (i + r) * line + k * deep, deep, k + 1 < depth) : 0u);
      }
  }

  void along(int64_t i, int64_t unit) const {
    if (!whole(i, unit)) return one_by_one(i, unit);
    for (int64_t r = 0; r < kTile; ++r)
      __builtin_memcpy(at(i, unit) + r * kTile, origin + (i + r) * line + unit * U::depth, 4 * kTile);
  }

  void across(int64_t i, int64_t unit) const {
    if (!whole(i, unit)) return one_by_one(i, unit);
    for (int64_t r = 0; r < kTile; r += 8)
      for (int64_t u = 0; u < kTile; u += 8) {
        Square square;
        for (int64_t j = 0; j < 8; ++j) square.line[j] = U::across(origin + i + r + (unit + u + j) * U::depth * deep, deep);
        square.transpose();
        for (int64_t j = 0; j < 8; ++j) store_units(at(i, unit) + (r + j) * kTile + u, square.line[j]);
      }
  }
};

struct ByRegisters {
  static constexpr bool paired = true;
  static constexpr int64_t rows = kPanel, columns = kPanel, unit_step = kTile;

  static void pack_rows(const Operand& a, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t units, float* to) {
    Registers(a, first, count, k, depth, units, to);
  }

  static void multiply(const float* a, const float* b, int64_t units, float* out, int64_t stride, bool add) {
    const int64_t bytes = 4 * stride;
    if (add) {
      _tile_loadd(0, out, bytes);
      _tile_loadd(1, out + kTile, bytes);
      _tile_loadd(2, out + kTile * stride, bytes);
      _tile_loadd(3, out + kTile * stride + kTile, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    // What the next panel is summed into arrives during the sums.
    const float* next = out + kPanel * stride;
    for (int64_t unit = 0; unit < units; unit += kTile, a += 2 * kUnits, b += 2 * kUnits) {
      _tile_loadd(4, a, 4 * kTile);
      _tile_loadd(6, b, 4 * kPanel);
      _tile_loadd(7, b + kTile, 4 * kPanel);
      for (int64_t r = 0; r < 4; ++r, next += stride) {
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + kTile, 1);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + kUnits, 4 * kTile);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + kTile, bytes);
    _tile_stored(2, out + kTile * stride, bytes);
    _tile_stored(3, out + kTile * stride + kTile, bytes);
  }
};

void tile_by_registers(const Product& product, const Tile& tile, float* packed) {
  const Configuration configuration;
  _tile_loadconfig(&configuration);
  product_tile<ByRegisters>(product, tile, packed);
  _tile_release();
}

}  // namespace

const ProductKernel kAmxProduct{"amx_bf16", kPanel, kPanel, tile_by_registers};

}  // namespace rewardmap
