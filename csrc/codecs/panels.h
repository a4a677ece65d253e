// Panels back to rows.
#pragma once
#include <algorithm>

#include "../gemm.h"
#include "tile.h"

namespace kvs {

// rows: [tokens][head_dim]
inline void panels_to_rows(const HalfTile& t, const float* panels, float* rows) {
  const int dim = t.head_dim;
  if (t.keys) {
    for (int token = 0; token < t.tokens; token += VL)
      for (int d = 0; d < dim; d += VL)
        transpose_block(panels + t.in_panels(token, d), COLUMNS, rows + (ptrdiff_t)token * dim + d, dim);
    return;
  }
  for (int token = 0; token < t.tokens; ++token)
    for (int d = 0; d < dim; d += COLUMNS) {
      const float* from = panels + t.in_panels(token, d);
      std::copy(from, from + std::min(COLUMNS, dim - d), rows + (ptrdiff_t)token * dim + d);
    }
}

}  // namespace kvs
