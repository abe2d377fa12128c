// Matrix products of the head, free of torch: out [M, N] (float32) = or += a [M, K] x b [K, N].
#pragma once

#include "rows.h"

namespace rewardmap {

// One side of a product: its element of row m (or column n) `i` and depth `k`.
struct Operand {
  const void* data;
  int64_t stride;    // in elements, from one line of unit stride to the next
  bool along_depth;  // the lines run along k: element (i, k) is data[i * stride + k], else data[k * stride + i]
  Dtype dtype;
};

struct Product {
  Operand a, b;
  float* out;
  int64_t out_stride;
  int64_t rows, columns, depth;  // M, N, K
  bool add;                      // to what is in `out`
};

struct Tile {  // of `out`, whole
  int64_t row, rows, column, columns;
};

// A tile is made by one thread; its parts of a and b are brought into the order that they are read in. No element of
// `out` depends on how tiles are cut: each is one sum over k, in blocks of a fixed depth.
struct ProductKernel {
  const char* name;
  int64_t row_step, column_step;  // tiles are cut at multiples of these
  void (*tile)(const Product&, const Tile&, float* packed);
};

// What a thread packs at a time: a block of a's rows stays in its second cache, and is read against all of the tile's
// columns of b.
constexpr int64_t kBlockRows = 196, kBlockDepth = 256, kTileBlocks = 3, kTileColumns = 512;
constexpr int64_t kPackedFloats = (kBlockRows + kTileColumns) * kBlockDepth + 64;

// Rows of a block for a kernel that makes `row_step` of them at a time.
constexpr int64_t block_rows(int64_t row_step) { return kBlockRows / row_step * row_step; }

#if defined(__x86_64__)
extern const ProductKernel kAvx2Product, kAvx512Product;  // of float32 and bfloat16, which is widened
extern const ProductKernel kAvx512Bfloat16Product, kAmxProduct;  // of bfloat16 on both sides
#endif

}  // namespace rewardmap
