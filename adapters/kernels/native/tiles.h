// The processor's tiles (AMX), where the target has them and the system lets this process use them.
//
// Two tiles hold half a panel of W each, as many inputs as fit; the others hold rows of x or of products, at most
// TILE_ROWS.
#pragma once

#include <cstdint>

#include "vector.h"

constexpr int64_t TILE_ROWS = 16;

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

// A process asks the system once; its threads may use tiles from then on.
static bool ask_for_tiles() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
static const bool tiles_granted = ask_for_tiles();

struct TileShapes {  // what LDTILECFG reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Of eight tiles 4 and 5 hold W, all 64 bytes wide.
static inline void open_tiles(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile == 4 || tile == 5 ? 16 : rows;
  }
  __atomic_signal_fence(__ATOMIC_SEQ_CST);  // compilers do not know that loads of tiles read what was stored
  _tile_loadconfig(&shapes);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);  // nor that this reads all of the shapes
}
static inline void close_tiles() { _tile_release(); }
#else
constexpr bool tiles_granted = false;
#endif
