// Which keys each query of an image sees: panels of keys, tiles of queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/ops.h"

namespace dndetr {

// Keys that the same queries see, at most as many as a kernel takes together.
struct Panel {
  int first, count;           // in Plan::keys
  int first_tile, last_tile;  // of the queries that see it
};

// Queries that see the same keys: `rows` of them, computed as `height` rows (an even number).
struct Tile {
  int query, rows, height;
  int place;                  // rows of all tiles before it
  int first_own, own_panels;  // keys of its group
};

struct Plan {
  int live;               // slots of each group
  std::vector<int> keys;  // those that are seen, in order
  std::vector<Panel> panels;
  std::vector<Tile> tiles;
  int shared = 0;  // the first panel that all tiles see, after those of the groups
  int height = 0;  // of all tiles

  Plan(const Attention& p, int image, int tallest, int widest)
      : live(p.active ? std::clamp(p.active[image], 0, p.slots) : p.slots) {
    const bool* valid = p.valid ? p.valid + std::int64_t(image) * p.keys : nullptr;
    const int grouped = p.groups * p.slots;
    keys.reserve(p.keys);
    for (int first = 0; first < grouped; first += p.slots) {
      const int panel = count(panels), tile = count(tiles);
      add_panels(first, first + live, valid, widest);
      add_tiles(first, live, tallest, panel, count(panels) - panel);
      see(panel, tile);
    }
    shared = count(panels);
    add_panels(grouped, p.keys, valid, widest);
    add_tiles(grouped, p.queries - grouped, tallest, shared, 0);
    see(shared, 0);
  }

  int panels_of(const Tile& tile) const { return tile.own_panels + count(panels) - shared; }
  int panel_of(const Tile& tile, int k) const {
    return k < tile.own_panels ? tile.first_own + k : shared + k - tile.own_panels;
  }

 private:
  template <class Element>
  static int count(const std::vector<Element>& x) {
    return static_cast<int>(x.size());
  }

  void add_panels(int first, int last, const bool* valid, int widest) {
    const int start = count(keys);
    for (int j = first; j < last; ++j) {
      if (!valid || valid[j]) keys.push_back(j);
    }
    for (int k = start; k < count(keys); k += widest) panels.push_back({k, std::min(widest, count(keys) - k), 0, 0});
  }

  // All about as tall: one of two rows after three of twelve would take as long as a whole one.
  void add_tiles(int first, int rows, int tallest, int own, int own_panels) {
    const int tiles_needed = (rows + tallest - 1) / tallest;
    for (int n = 0, start = 0; n < tiles_needed; ++n) {
      const int end = static_cast<int>(std::int64_t(rows) * (n + 1) / tiles_needed), even = (end - start + 1) / 2 * 2;
      tiles.push_back({first + start, end - start, even, height, own, own_panels});
      height += even;
      start = end;
    }
  }

  void see(int first_panel, int first_tile) {
    for (int k = first_panel; k < count(panels); ++k) {
      panels[k].first_tile = first_tile;
      panels[k].last_tile = count(tiles);
    }
  }
};

}  // namespace dndetr
