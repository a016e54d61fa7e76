// One pass of a few tokens through all blocks of a decoder, in one call: norms, products, rotation, cache, attention.
//
// At batch 1 a step reads every weight once and computes almost nothing; called one by one, its 500 operations cost as
// much as the weights. Here all threads walk through the blocks together and meet at barriers only.
// Sums run in fp32; what enters a product of bf16 and what goes into the cache is rounded to the model's dtype.
//
// Letters: b texts, n tokens each, rows = b n, h heads, g key/value heads, d features a head, m keys.
#include "kernels.h"
#include <cmath>
#include <omp.h>

constexpr int CHUNK = 64;  // keys that one unit of work attends to; where they are cut depends on their place alone

struct Block { const float *norm1, *norm2; Weight q, k, v, o, gate, up, down; };
struct Model {
  int64_t depth, width, heads, kv_heads, head_width, mlp_width, half;  // half: the model's dtype is bf16
  float eps, none;
  const Block *blocks;
};
struct Call {
  int64_t b, n, past, rotated, interleaved, rotation_stride, layer_stride, value_stride, text_stride, head_stride;
  int64_t mask_text, mask_token, causal, threads;
  void *x, *cache;          // (b, n, width); slots (layers, 2, b, g, context, d)
  const float *cos, *sin;   // (1 or b, n, rotated)
  const uint8_t *mask;      // (…, n, m) bool, or null
  const int64_t *starts;    // (b) keys before each text's new ones, or null: `past` of all
};

static bool tiles_granted() { static bool granted = ask_for_tiles(); return granted; }

INLINE F exponential(F x) {  // e^x for x <= 0, to 2 ulp: 2^k e^r with |r| <= ln 2 / 2 and a polynomial in r
  x = x < -87.0f ? splat(-87.0f) : x;
  I k = __builtin_convertvector(x * 1.44269504f - 0.5f, I);
  F f = __builtin_convertvector(k, F), r = x - f * 0.693359375f + f * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1.0f;
  return p * (F)((k + 127) << 23);
}

struct Scratch {  // of all threads
  std::vector<float> stream, qkv, seen, act, part;
  std::vector<uint16_t> allowed;
  template <class V> static void fit(V &v, size_t size) { if (v.size() < size) v.resize(size); }
};
static thread_local Rows mine;        // of each thread
static thread_local Scratch for_all;  // of the one that calls

INLINE void share(int64_t count, int t, int threads, int64_t &from, int64_t &to) {
  from = count * t / threads, to = count * (t + 1) / threads;
}

static void norm(const float *x, const float *gain, int rows, int width, float eps, Rows &out) {
  out.size(rows, width);
  for (int i = 0; i < rows; i++) {
    const float *from = x + (size_t)i * width;
    F s = {};
    for (int k = 0; k < width; k += LANES) s += wide(from + k) * wide(from + k);
    float r = 1.0f / std::sqrt(sum(s) / width + eps);
    for (int k = 0; k < width; k += LANES) store(&out.x[(size_t)i * width + k], wide(from + k) * wide(gain + k) * r);
  }
}

static void rows_of(const float *x, int rows, int width, Rows &out) {
  out.size(rows, width);
  memcpy(out.x.data(), x, sizeof(float) * rows * width);
}

template <class T> struct Step {
  const Model &m;
  const Call &c;
  Scratch &shared;
  const bool tiles;
  const int h, g, d, rows, group, lanes, blocks, reach, chunks, inner;
  Step(const Model &model, const Call &call)
      : m(model), c(call), shared(for_all), tiles(tiles_granted()), h(m.heads), g(m.kv_heads), d(m.head_width),
        rows(c.b * c.n), group(h / g), lanes(group * c.n), blocks((lanes + LANES - 1) / LANES), reach(c.past + c.n),
        chunks((reach + CHUNK - 1) / CHUNK), inner((h + 2 * g) * d) {}

  void run() {
    Scratch::fit(shared.stream, (size_t)rows * m.width);
    Scratch::fit(shared.qkv, (size_t)rows * inner);
    Scratch::fit(shared.seen, (size_t)rows * h * d);
    Scratch::fit(shared.act, (size_t)rows * m.mlp_width);
    Scratch::fit(shared.part, (size_t)c.b * g * chunks * blocks * (d + 2) * LANES);
    Scratch::fit(shared.allowed, (size_t)c.b * blocks * reach);
    const T *x = (const T *)c.x;
    for (size_t i = 0; i < (size_t)rows * m.width; i++) shared.stream[i] = wide1(x[i]);
    see();
#pragma omp parallel num_threads(c.threads)
    {
      int t = omp_get_thread_num(), threads = omp_get_num_threads();
      if (tiles) set_tiles(rows);
      for (int64_t layer = 0; layer < m.depth; layer++) block(m.blocks[layer], layer, t, threads);
      if (tiles) release_tiles();
    }
    for (size_t i = 0; i < (size_t)rows * m.width; i++) put((T *)c.x + i, shared.stream[i]);
  }

  void block(const Block &w, int64_t layer, int t, int threads) {
    norm(shared.stream.data(), w.norm1, rows, m.width, m.eps, mine);
    mine.finish(w.q.kind, tiles);
    into(w.q, 0, inner, shared.qkv.data(), false, t, threads);
    into(w.k, h * d, inner, shared.qkv.data(), false, t, threads);
    into(w.v, (h + g) * d, inner, shared.qkv.data(), false, threads - 1 - t, threads);
#pragma omp barrier
    turn(layer, t, threads);
#pragma omp barrier
    attend(layer, t, threads);
#pragma omp barrier
    merge(t, threads);
#pragma omp barrier
    rows_of(shared.seen.data(), rows, h * d, mine);
    mine.finish(w.o.kind, tiles);
    into(w.o, 0, m.width, shared.stream.data(), true, t, threads);
#pragma omp barrier
    norm(shared.stream.data(), w.norm2, rows, m.width, m.eps, mine);
    mine.finish(w.gate.kind, tiles);
    gated(w, t, threads);
#pragma omp barrier
    rows_of(shared.act.data(), rows, m.mlp_width, mine);
    mine.finish(w.down.kind, tiles);
    into(w.down, 0, m.width, shared.stream.data(), true, t, threads);
#pragma omp barrier
  }

  void into(const Weight &w, int at, int stride, float *to, bool add, int t, int threads) {
    float y[MOST * LANES];
    int64_t from, end;
    share(w.out / LANES, t, threads, from, end);
    for (int64_t o = from; o < end; o++) {
      product(w, o, mine, tiles, y);
      for (int i = 0; i < rows; i++) {
        float *p = to + (size_t)i * stride + at + o * LANES;
        store(p, add ? wide(p) + wide(y + i * LANES) : wide(y + i * LANES));
      }
    }
  }

  void gated(const Block &w, int t, int threads) {
    float gate[MOST * LANES], up[MOST * LANES];
    int64_t from, end;
    share(w.gate.out / LANES, t, threads, from, end);
    for (int64_t o = from; o < end; o++) {
      product(w.gate, o, mine, tiles, gate), product(w.up, o, mine, tiles, up);
      for (int i = 0; i < rows; i++) {
        F a = wide(gate + i * LANES), e = exponential(a > 0 ? -a : a);  // a sigmoid of a: of -|a|, then the right side
        F sigmoid = a > 0 ? splat(1) / (1 + e) : e / (1 + e);
        store(&shared.act[(size_t)i * m.mlp_width + o * LANES], a * sigmoid * wide(up + i * LANES));
      }
    }
  }

  int64_t start(int text) const { return c.starts ? c.starts[text] : c.past; }

  T *slot(int64_t layer, int value, int text, int head, int64_t key) const {
    T *layer_slots = (T *)c.cache + layer * c.layer_stride + value * c.value_stride;
    return layer_slots + text * c.text_stride + head * c.head_stride + key * d;
  }

  void turn(int64_t layer, int t, int threads) {  // rotate q in place; k and v into their slots
    int64_t from, end;
    share((int64_t)rows * (h + 2 * g), t, threads, from, end);
    for (int64_t u = from; u < end; u++) {
      int row = u / (h + 2 * g), head = u % (h + 2 * g), text = row / c.n, token = row % c.n;
      float *x = &shared.qkv[(size_t)row * inner + head * d], y[512];
      memcpy(y, x, sizeof(float) * d);
      if (head < h + g && c.rotated) {
        const int64_t at = text * c.rotation_stride + token * c.rotated;
        const float *cos = c.cos + at, *sin = c.sin + at;
        const int r = c.rotated;
        if (c.interleaved)
          for (int k = 0; k < r; k++) y[k] = x[k] * cos[k] + x[k ^ 1] * sin[k];
        else
          for (int k = 0; k < r; k++) y[k] = x[k] * cos[k] + x[k < r / 2 ? k + r / 2 : k - r / 2] * sin[k];
      }
      if (head < h) { memcpy(x, y, sizeof(float) * d); continue; }
      T *to = slot(layer, head >= h + g, text, (head - h) % g, start(text) + token);
      for (int k = 0; k < d; k++) put(to + k, y[k]);
    }
  }

  // Which of 16 queries may attend to a key, as bits: the same in every layer, and for all heads of a group.
  void see() {
    for (int text = 0; text < c.b; text++)
      for (int l = 0; l < blocks; l++)
        for (int64_t j = 0; j < reach; j++) {
          uint16_t bits = 0;
          for (int lane = 0; lane < LANES && l * LANES + lane < lanes; lane++) {
            int64_t token = (l * LANES + lane) % c.n;
            const bool in_order = !c.causal || j <= start(text) + token;
            const bool may = c.mask ? c.mask[text * c.mask_text + token * c.mask_token + j] : in_order;
            bits |= (uint16_t)may << lane;
          }
          shared.allowed[((size_t)text * blocks + l) * reach + j] = bits;
        }
  }

  // 16 queries beside each other in a register; a unit is a text, a key/value head and a chunk of keys.
  void attend(int64_t layer, int t, int threads) {
    int64_t from, end;
    share((int64_t)c.b * g * chunks, t, threads, from, end);
    for (int64_t u = from; u < end; u++) {
      int chunk = u % chunks, head = u / chunks % g, text = u / chunks / g;
      int first = chunk * CHUNK, count = std::min(CHUNK, reach - first);
      alignas(64) float keys[CHUNK * 512 / 4], values[CHUNK * 512 / 4];
      const T *k = slot(layer, 0, text, head, first), *v = slot(layer, 1, text, head, first);
      for (int j = 0; j < count * d; j += LANES) store(keys + j, wide(k + j)), store(values + j, wide(v + j));
      float *out = &shared.part[(size_t)u * blocks * (d + 2) * LANES];
      for (int l = 0; l < blocks; l++) unit(text, head, l, first, count, keys, values, out + (size_t)l * (d + 2) * LANES);
    }
  }

  void unit(int text, int head, int l, int first, int count, const float *keys, const float *values, float *out) {
    alignas(64) float q[128 * LANES] = {};
    F score[CHUNK], most = splat(-INFINITY), total = {};
    float scale = 1.0f / std::sqrt((float)d);
    for (int lane = 0; lane < LANES && l * LANES + lane < lanes; lane++) {
      int row = text * c.n + (l * LANES + lane) % c.n, at = head * group + (l * LANES + lane) / c.n;
      for (int k = 0; k < d; k++) q[k * LANES + lane] = scale * shared.qkv[(size_t)row * inner + at * d + k];
    }
    const I bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const uint16_t *allowed = &shared.allowed[((size_t)text * blocks + l) * reach + first];
    for (int j = 0; j < count; j++) {
      F s[4] = {};
      for (int k = 0; k < d; k += 4)
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) s[e] += wide(q + (k + e) * LANES) * keys[j * d + k + e];
      score[j] = ((I{} + allowed[j]) & bit) != 0 ? (s[0] + s[1]) + (s[2] + s[3]) : splat(-INFINITY);
      most = score[j] > most ? score[j] : most;
    }
    F none = most == -INFINITY ? splat(0) : most;
    for (int j = 0; j < count; j++) {
      score[j] = score[j] == -INFINITY ? splat(0) : exponential(score[j] - none);
      total += score[j];
    }
    store(out, most), store(out + LANES, total);
    for (int k = 0; k < d; k += 8) {
      F sum[8] = {};
      for (int j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int e = 0; e < 8; e++) sum[e] += score[j] * values[j * d + k + e];
      for (int e = 0; e < 8; e++) store(out + (2 + k + e) * LANES, sum[e]);
    }
  }

  void merge(int t, int threads) {  // the chunks of keys of 16 queries, by the greatest score among them
    int64_t from, end;
    share((int64_t)c.b * g * blocks, t, threads, from, end);
    for (int64_t u = from; u < end; u++) {
      int l = u % blocks, head = u / blocks % g, text = u / blocks / g;
      size_t stride = (size_t)blocks * (d + 2) * LANES;
      const float *part = &shared.part[(((size_t)text * g + head) * chunks * blocks + l) * (d + 2) * LANES];
      F most = splat(-INFINITY), total = {}, factor[1 << 12];
      for (int i = 0; i < chunks; i++) { F x = wide(part + i * stride); most = x > most ? x : most; }
      for (int i = 0; i < chunks; i++) {
        F x = wide(part + i * stride);
        factor[i] = x == -INFINITY ? splat(0) : exponential(x - most);
        total += factor[i] * wide(part + i * stride + LANES);
      }
      F share_ = total > 0 ? 1 / total : splat(0);
      for (int k = 0; k < d; k++) {
        F s = {};
        for (int i = 0; i < chunks; i++) s += factor[i] * wide(part + i * stride + (2 + k) * LANES);
        s *= share_;
        for (int lane = 0; lane < LANES && l * LANES + lane < lanes; lane++) {
          int row = text * c.n + (l * LANES + lane) % c.n, at = head * group + (l * LANES + lane) / c.n;
          shared.seen[(size_t)row * h * d + at * d + k] = s[lane];
        }
      }
    }
  }
};

extern "C" int tiles() { return tiles_granted(); }

extern "C" void step(const Model *model, const Call *call) {
  if (model->half) Step<half_t>(*model, *call).run();
  else Step<float>(*model, *call).run();
}

// y (n, out) = x (n, in) Wᵀ + bias, for any n; x and y are bf16 (half) or fp32
extern "C" void linear(const Weight *w, const void *x, void *y, int64_t n, int64_t half, int64_t threads) {
  const bool tiles = tiles_granted();
#pragma omp parallel num_threads(threads)
  {
    float out[MOST * LANES];
    for (int64_t first = 0; first < n; first += MOST) {
      int count = std::min<int64_t>(MOST, n - first);
      mine.size(count, w->in);
      for (size_t k = 0; k < (size_t)count * w->in; k++) {
        size_t at = (size_t)first * w->in + k;
        mine.x[k] = half ? wide1(((const half_t *)x)[at]) : ((const float *)x)[at];
      }
      mine.finish(w->kind, tiles);
      if (tiles) set_tiles(count);
      int64_t from, end;
      share(w->out / LANES, omp_get_thread_num(), omp_get_num_threads(), from, end);
      for (int64_t o = from; o < end; o++) {
        product(*w, o, mine, tiles, out);
        for (int i = 0; i < count; i++)
          for (int r = 0; r < LANES; r++) {
            size_t at = (size_t)(first + i) * w->out + o * LANES + r;
            if (half) ((half_t *)y)[at] = narrow1(out[i * LANES + r]);
            else ((float *)y)[at] = out[i * LANES + r];
          }
      }
    }
    if (tiles) release_tiles();
  }
}
