// One pass over the keys: a query tile is rotated anew when its chunk distance to them changes.
//
// A key is rotated once, by its index in its chunk. Queries of chunk n see keys of their own chunk
// at their own index, of the chunk before at min(chunk + index, clamp), of earlier ones at
// min(2 chunk - 1, clamp). Running maximum, mass and output go through all three (flash attention);
// the backward turns each phase's gradient back by the same angle. Threads share out (sequence, kv
// head) pairs, whose gradients nobody else adds to, so results do not depend on their number.
#include "dual_chunk_attention.h"

#include <cmath>

#include "tile.h"

namespace q3mega {
namespace {

constexpr int64_t kTile = 64;

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// out = x rotated to `position` (rotate-half layout); sign -1 turns back.
void rotate(const DualChunk& shape, const float* x, int64_t position, float sign, float* out) {
  const int64_t half = shape.dim / 2;
  const float *c = shape.cosine + position * half, *s = shape.sine + position * half;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half], turn = sign * s[d];
    out[d] = a * c[d] - b * turn;
    out[d + half] = b * c[d] + a * turn;
  }
}

// One kv head's keys of one sequence, rotated, in tiles of rows and of columns.
struct Keys {
  int64_t count, width;     // width: dim, padded
  Floats rotated, columns;  // (count, width), and by tile (dim, kTile)
  Floats values, value_columns;

  Keys(const DualChunk& shape, const float* k, const float* v, int64_t n, bool transposed_values)
      : count(n), width(padded(shape.dim)) {
    const int64_t tiles = (n + kTile - 1) / kTile, step = shape.kv_heads * shape.dim;
    rotated.assign(n * width, 0.0f);
    values.assign(n * width, 0.0f);
    columns.assign(tiles * shape.dim * kTile, 0.0f);
    value_columns.assign(transposed_values ? columns.size() : 0, 0.0f);
    for (int64_t j = 0; j < n; ++j) {
      float* row = rotated.data() + j * width;
      rotate(shape, k + j * step, j % shape.chunk, 1.0f, row);
      std::copy(v + j * step, v + j * step + shape.dim, values.data() + j * width);
      const int64_t at = (j / kTile) * shape.dim * kTile + j % kTile;
      for (int64_t d = 0; d < shape.dim; ++d) {
        columns[at + d * kTile] = row[d];
        if (transposed_values) {
          value_columns[at + d * kTile] = v[j * step + d];
        }
      }
    }
  }

  const float* tile(const Floats& by_column, int64_t first, int64_t dim) const {
    return by_column.data() + (first / kTile) * dim * kTile;
  }
};

// The phases of the queries in [first, last), all of one chunk: keys [low, high) at one rotation.
struct Phase {
  int64_t low, high, kind;  // 0 earlier chunks, 1 the chunk before, 2 their own
};

void phases(const DualChunk& shape, int64_t first, int64_t last, Phase* out) {
  const int64_t chunk_start = first / shape.chunk * shape.chunk;
  const int64_t before = chunk_start >= shape.chunk ? chunk_start - shape.chunk : 0;
  out[0] = {0, before, 0};
  out[1] = {before, chunk_start, 1};
  out[2] = {chunk_start, last, 2};
}

int64_t query_position(const DualChunk& shape, int64_t token, int64_t kind) {
  const int64_t index = token % shape.chunk;
  if (kind == 2) {
    return index;
  }
  return std::min(kind == 1 ? shape.chunk + index : 2 * shape.chunk - 1, shape.clamp);
}

// Scratch of one query tile.
struct Tile {
  int64_t rows, first;  // first: token index in its sequence
  Floats query, scores;

  explicit Tile(int64_t width) : query(kTile * width), scores(kTile * kTile) {}

  void turn(const DualChunk& shape, const float* q, int64_t step, int64_t kind, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = query.data() + i * width;
      rotate(shape, q + i * step, query_position(shape, first + i, kind), 1.0f, row);
      for (int64_t d = 0; d < shape.dim; ++d) {
        row[d] *= shape.scale;
      }
    }
  }

  // scores (rows, kTile) of the keys [low, low + kTile), of which [from, to) count; the others'
  // exponentials are 0, since in the first tile of keys every query sees one.
  void score(const DualChunk& shape, const Keys& keys, int64_t low, int64_t from, int64_t to,
             int64_t width) {
    product<false>(query.data(), width, 1, keys.tile(keys.columns, low, shape.dim), kTile,
                   scores.data(), kTile, rows, kTile, shape.dim);
    if (from == low && std::min(to, first + 1) >= low + kTile) {
      return;  // all of them count for all of the queries
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scores.data() + i * kTile;
      const int64_t end = std::min(to, first + i + 1) - low;  // causal
      std::fill(row, row + std::max<int64_t>(0, from - low), -1e30f);
      std::fill(row + std::clamp<int64_t>(end, 0, kTile), row + kTile, -1e30f);
    }
  }
};

// body(tile, first row of q) for each query tile of one sequence; none crosses a chunk.
template <class Body>
void for_tiles(const DualChunk& shape, int64_t queries, Tile& tile, const Body& body) {
  int64_t row = 0;
  while (row < queries) {
    const int64_t token = shape.q_offset + row;
    const int64_t left = shape.chunk - token % shape.chunk;
    tile.first = token;
    tile.rows = std::min({kTile, left, queries - row});
    body(row);
    row += tile.rows;
  }
}

// body(kind, low, from, to) for the key tiles that the query tile sees; turned() at a new phase.
template <class Turn, class Body>
void for_keys(const DualChunk& shape, const Tile& tile, const Turn& turned, const Body& body) {
  Phase parts[3];
  phases(shape, tile.first, tile.first + tile.rows, parts);
  for (const Phase& part : parts) {
    if (part.low >= part.high) {
      continue;
    }
    turned(part.kind);
    for (int64_t low = part.low / kTile * kTile; low < part.high; low += kTile) {
      body(part.kind, low, std::max(low, part.low), std::min(low + kTile, part.high));
    }
  }
}

}  // namespace

void dual_chunk_forward(const DualChunk& shape, const float* q, const float* k, const float* v,
                        float* out, float* lse) {
  const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
  const int64_t q_step = shape.heads * dim, k_step = shape.kv_heads * dim, width = padded(dim);
  for_rows(shape.sequences * shape.kv_heads, [&](int64_t pair) {
    const int64_t b = pair / shape.kv_heads, kv = pair % shape.kv_heads;
    const int64_t offset = shape.cu_k[b] * k_step + kv * dim;
    const Keys keys(shape, k + offset, v + offset, shape.cu_k[b + 1] - shape.cu_k[b], false);
    Tile tile(width);
    Floats sum(kTile * width), top(kTile), mass(kTile);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      const int64_t rows = shape.cu_q[b + 1] - shape.cu_q[b];
      for_tiles(shape, rows, tile, [&](int64_t row) {
        const int64_t at = shape.cu_q[b] + row;
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(top.begin(), top.end(), -1e30f);
        std::fill(mass.begin(), mass.end(), 0.0f);
        const auto turned = [&](int64_t kind) {
          tile.turn(shape, q + at * q_step + head * dim, q_step, kind, width);
        };
        for_keys(shape, tile, turned, [&](int64_t, int64_t low, int64_t from, int64_t to) {
          tile.score(shape, keys, low, from, to, width);
          for (int64_t i = 0; i < tile.rows; ++i) {
            float* s = tile.scores.data() + i * kTile;
            const float best = maximum(s, kTile, top[i]);
            float total = 0.0f;
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < kTile; ++j) {
              s[j] = exp_fast(s[j] - best);
              total += s[j];
            }
            if (best > top[i]) {
              const float shrink = exp_fast(top[i] - best);
              mass[i] *= shrink;
              top[i] = best;
              float* o = sum.data() + i * width;
#pragma omp simd
              for (int64_t d = 0; d < width; ++d) {
                o[d] *= shrink;
              }
            }
            mass[i] += total;
          }
          const int64_t count = std::min(kTile, keys.count - low);
          product<true>(tile.scores.data(), kTile, 1, keys.values.data() + low * width, width,
                        sum.data(), width, tile.rows, width, count);
        });
        for (int64_t i = 0; i < tile.rows; ++i) {
          float* o = out + (at + i) * q_step + head * dim;
          for (int64_t d = 0; d < dim; ++d) {
            o[d] = sum[i * width + d] / mass[i];
          }
          lse[(at + i) * shape.heads + head] = top[i] + std::log(mass[i]);
        }
      });
    }
  });
}

void dual_chunk_backward(const DualChunk& shape, const float* q, const float* k, const float* v,
                         const float* out, const float* lse, const float* d_out, float* d_q,
                         float* d_k, float* d_v) {
  const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
  const int64_t q_step = shape.heads * dim, k_step = shape.kv_heads * dim, width = padded(dim);
  for_rows(shape.sequences * shape.kv_heads, [&](int64_t pair) {
    const int64_t b = pair / shape.kv_heads, kv = pair % shape.kv_heads;
    const int64_t offset = shape.cu_k[b] * k_step + kv * dim;
    const Keys keys(shape, k + offset, v + offset, shape.cu_k[b + 1] - shape.cu_k[b], true);
    Tile tile(width);
    Floats by_key(keys.count * width), by_value(keys.count * width);
    Floats by_query(kTile * width), given(kTile * width), pull(kTile * kTile);
    Floats shift(kTile), mean(kTile), turned_back(dim);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      const int64_t rows = shape.cu_q[b + 1] - shape.cu_q[b];
      for_tiles(shape, rows, tile, [&](int64_t row) {
        const int64_t at = shape.cu_q[b] + row, start = at * q_step + head * dim;
        int64_t rotated_kind = -1;
        for (int64_t i = 0; i < tile.rows; ++i) {
          const float *o = out + start + i * q_step, *g = d_out + start + i * q_step;
          float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
          for (int64_t d = 0; d < dim; ++d) {
            dot += o[d] * g[d];
          }
          mean[i] = dot;
          shift[i] = lse[(at + i) * shape.heads + head];
          std::copy(g, g + dim, given.data() + i * width);
          std::fill(d_q + start + i * q_step, d_q + start + i * q_step + dim, 0.0f);
        }
        const auto turn_back = [&]() {  // the phase's share of d_q, in the query's own basis
          for (int64_t i = 0; rotated_kind >= 0 && i < tile.rows; ++i) {
            const int64_t position = query_position(shape, tile.first + i, rotated_kind);
            rotate(shape, by_query.data() + i * width, position, -1.0f, turned_back.data());
            float* g = d_q + start + i * q_step;
            for (int64_t d = 0; d < dim; ++d) {
              g[d] += shape.scale * turned_back[d];
            }
          }
          std::fill(by_query.begin(), by_query.end(), 0.0f);
        };
        const auto turned = [&](int64_t kind) {
          turn_back();
          rotated_kind = kind;
          tile.turn(shape, q + start, q_step, kind, width);
        };
        for_keys(shape, tile, turned, [&](int64_t, int64_t low, int64_t from, int64_t to) {
          const int64_t count = std::min(kTile, keys.count - low);
          tile.score(shape, keys, low, from, to, width);
          product<false>(given.data(), width, 1, keys.tile(keys.value_columns, low, dim), kTile,
                         pull.data(), kTile, tile.rows, kTile, dim);
          for (int64_t i = 0; i < tile.rows; ++i) {
            float *s = tile.scores.data() + i * kTile, *p = pull.data() + i * kTile;
            const float lse_i = shift[i], mean_i = mean[i];
#pragma omp simd
            for (int64_t j = 0; j < kTile; ++j) {
              s[j] = exp_fast(s[j] - lse_i);
              p[j] = s[j] * (p[j] - mean_i);
            }
          }
          product<true>(tile.scores.data(), 1, kTile, given.data(), width,
                        by_value.data() + low * width, width, count, width, tile.rows);
          product<true>(pull.data(), 1, kTile, tile.query.data(), width,
                        by_key.data() + low * width, width, count, width, tile.rows);
          product<true>(pull.data(), kTile, 1, keys.rotated.data() + low * width, width,
                        by_query.data(), width, tile.rows, width, count);
        });
        turn_back();
      });
    }
    for (int64_t j = 0; j < keys.count; ++j) {
      rotate(shape, by_key.data() + j * width, j % shape.chunk, -1.0f, d_k + offset + j * k_step);
      std::copy(by_value.data() + j * width, by_value.data() + j * width + dim,
                d_v + offset + j * k_step);
    }
  });
}

}  // namespace q3mega
