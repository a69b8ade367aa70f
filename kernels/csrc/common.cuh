// What every operation of the extension uses on CUDA.
#pragma once

#include "common.h"

#include "launch.cuh"

#include <algorithm>
#include <initializer_list>

namespace epg_fast {

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// How an element-wise kernel on float32 covers `size` elements: the first 4 * vectors in 16-byte accesses, the rest one by
// one, both in grid-stride loops.
struct ElementwiseGrid {
  static constexpr int kThreads = 256;
  static constexpr int64_t kMaxBlocks = 4096;

  int64_t vectors;
  unsigned blocks;

  ElementwiseGrid(int64_t size, std::initializer_list<const void*> pointers) {
    const bool wide = std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return aligned(p, 16); });
    vectors = wide ? size / 4 : 0;
    const int64_t items = wide ? (size + 3) / 4 : size;
    blocks = static_cast<unsigned>(std::min(kMaxBlocks, (items + kThreads - 1) / kThreads));
  }
};

}  // namespace epg_fast
