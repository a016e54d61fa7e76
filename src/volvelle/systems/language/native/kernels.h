// Products of a few rows with a matrix whose weights are fp32, bf16, or int8 / int4 on a grid of groups of 32.
//
// Every kernel computes 16 outputs for all rows at once. The sum behind one output of one row runs in one fixed order,
// whatever the other rows are and however many: a token gets the same bits alone and among the tokens of a draft.
//
// Written in the vector types of GCC and Clang, which any processor can run; where the processor multiplies pairs of bf16
// (AVX-512 BF16) or tiles of them (AMX) the weights of 8 and 4 bits become bf16 in a register, without error: only their
// grid is applied in fp32.
//
// Letters: n rows, in and out features, o a block of 16 outputs, q a group of 32 inputs.
#pragma once
#include "vectors.h"
#include <algorithm>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
#if PAIRS && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif

constexpr int GROUP = 32, MOST = 32;    // MOST rows in one call
constexpr int BATCH = 3, AHEAD = 3072;  // groups at a time; bytes of codes to ask for ahead
constexpr int ONE = WIDE / 2, TWO = WIDE == LANES ? 8 : 2;  // outputs at a time of one row, of two: sums stay in registers
enum Kind { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

// A matrix (out, in). fp32 and bf16: rows as torch has them. int8: codes (out/16, in/2, 16, 2); int4: the same with the
// two codes of a pair in one byte. grid: fp16 (out/16, in/32, `numbers`, 16), the scales and, with two numbers, the
// offsets of a group; a weight is scale * code + offset. All of it is read from front to back.
struct Weight {
  int64_t kind, out, in, numbers;
  const void *data, *grid;
  const float *bias;
};

// What the kernels read of the rows, made once a product: x (n, in) fp32 as it is, in bf16 as tiles want it, and each
// group's sum of what bf16 left of it. apart: of every 32 numbers those with even places first, then the others.
struct Rows {
  int n = 0, in = 0;
  std::vector<float> x, sums, apart;
  std::vector<half_t> flat, pairs;  // bf16: (32 rows, in) and (in/2, 32 rows, 2); what rows behind n hold is never read
  void size(int rows, int features) {
    n = rows, in = features;
    const size_t most = (size_t)MOST * in;
    if (x.size() < most)
      x.resize(most), flat.resize(most), pairs.resize(most), sums.resize(most / GROUP), apart.resize(most);
  }
  void finish(int kind, bool tiles) {  // after x is filled
    const size_t groups = in / GROUP;
    if (PAIRS && kind != FP32) {
      for (size_t k = 0; k < (size_t)n * in; k += LANES) store(&flat[k], narrow(wide(&x[k])));
    }
    if (kind >= INT8)
      for (size_t q = 0; q < n * groups; q++)
        sums[q] = PAIRS ? sum(wide(&flat[q * GROUP]) + wide(&flat[q * GROUP + LANES]))
                        : sum(wide(&x[q * GROUP]) + wide(&x[q * GROUP + LANES]));
    if (kind == BF16 && !PAIRS)
      for (size_t k = 0; k < (size_t)n * in; k++) apart[k / GROUP * GROUP + k % 2 * LANES + k % GROUP / 2] = x[k];
    if (kind == BF16 && tiles)
      for (int i = 0; i < n; i++)
        for (int k = 0; k < in / 2; k++) memcpy(&pairs[((size_t)k * MOST + i) * 2], &flat[(size_t)i * in + 2 * k], 4);
  }
};

// ---- any processor -----------------------------------------------------------------------------------------------

// What one load of weights brings: WIDE of fp32, or twice as many of bf16, those with even places first.
INLINE void parts(const float *w, V (&a)[1]) { a[0] = load<V>(w); }
INLINE void parts(const half_t *w, V (&a)[2]) {
  const VU both = load<VU>(w);
  a[0] = (V)(both << 16), a[1] = (V)(both & 0xffff0000u);
}

template <class W, int R, int C> INLINE void dots(const W *w, const float *x, int in, float *y) {
  constexpr int P = 4 / sizeof(W);
  V acc[R][C][HALVES] = {};
  for (int k = 0; k < in; k += P * LANES) {
    if (C > 1) ask(w + (size_t)R * in + (size_t)k * R, R);  // the next rows; alone, a row is foreseen
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++) {
      V a[R][P];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) parts(w + (size_t)r * in + k + h * P * WIDE, a[r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++)
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
          V b = load<V>(x + (size_t)c * in + k + p * LANES + h * WIDE);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) acc[r][c][h] += a[r][p] * b;
        }
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) y[c * LANES + r] = sum(load<F>(&acc[r][c]));
}

template <class W> INLINE void plain(const Weight &m, int o, const float *x, int n, float *y) {
  const int in = m.in;
  const W *w = (const W *)m.data + (size_t)o * LANES * in;
  int c = 0;
  for (; c + 2 <= n; c += 2)
    for (int r = 0; r < LANES; r += TWO) dots<W, TWO, 2>(w + (size_t)r * in, x + (size_t)c * in, in, y + c * LANES + r);
  for (; c < n; c++)
    for (int r = 0; r < LANES; r += ONE) dots<W, ONE, 1>(w + (size_t)r * in, x + (size_t)c * in, in, y + c * LANES + r);
}

INLINE void codes(const Weight &m, int o, int q, V (*w)[HALVES]) {  // the 32 x 16 codes of a group as numbers
  size_t at = ((size_t)o * m.in / 2 + (size_t)q * GROUP / 2) * LANES;
  for (int p = 0; p < GROUP / 2; p++)
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++, at += WIDE) {
      if (m.kind == INT4) {
        VI b = whole((const uint8_t *)m.data + at);
        w[2 * p][h] = __builtin_convertvector(b & 15, V), w[2 * p + 1][h] = __builtin_convertvector(b >> 4, V);
      } else {
        VI b = whole((const uint16_t *)m.data + at);
        w[2 * p][h] = __builtin_convertvector((b << 24) >> 24, V);
        w[2 * p + 1][h] = __builtin_convertvector((b << 16) >> 24, V);
      }
    }
}

// Add to y what `count` groups give: their sums over codes, on the grid of scale and offset.
INLINE void graded(const Weight &m, int o, int q, int count, const Rows &rows, const F (*part)[MOST], float *y) {
  alignas(64) float s[BATCH][LANES], z[BATCH][LANES];
  for (int j = 0; j < count; j++) {
    const half_t *at = (const half_t *)m.grid + ((size_t)o * (m.in / GROUP) + q + j) * m.numbers * LANES;
    store(s[j], fp16s(at)), store(z[j], m.numbers > 1 ? fp16s(at + LANES) : F{});
  }
  for (int i = 0; i < rows.n; i++) {
    const float *sums = &rows.sums[(size_t)i * (m.in / GROUP) + q];
    for (int h = 0; h < LANES; h += WIDE) {
      V a = load<V>(y + i * LANES + h);
      for (int j = 0; j < count; j++)
        a += load<V>(s[j] + h) * load<V>((const float *)&part[j][i] + h) + load<V>(z[j] + h) * sums[j];
      store(y + i * LANES + h, a);
    }
  }
}

INLINE void grouped(const Weight &m, int o, const Rows &rows, float *y) {
  V w[GROUP][HALVES];
  F part[1][MOST];
  memset(y, 0, sizeof(float) * LANES * rows.n);
  for (int q = 0; q < m.in / GROUP; q++) {
    codes(m, o, q, w);
    for (int i = 0; i < rows.n; i++) {
      const float *x = rows.x.data() + (size_t)i * m.in + q * GROUP;
      V a[4][HALVES] = {};  // four sums, for one would wait for itself
#pragma GCC unroll 8
      for (int k = 0; k < GROUP; k += 4)
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++)
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++) a[e][h] += w[k + e][h] * x[k + e];
      for (int h = 0; h < HALVES; h++) store((float *)&part[0][i] + h * WIDE, (a[0][h] + a[1][h]) + (a[2][h] + a[3][h]));
    }
    graded(m, o, q, 1, rows, part, y);
  }
}

// ---- pairs of bf16 -----------------------------------------------------------------------------------------------

#if PAIRS
INLINE __m512bh halves(const half_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

template <int R, int C> INLINE void dots_of_pairs(const half_t *w, const half_t *x, int in, float *y) {
  __m512 acc[R][C] = {};
  for (int k = 0; k < in; k += GROUP) {
    __m512bh a[R];
    ask(w + (size_t)R * in + (size_t)k * R, R);  // the next rows
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) a[r] = halves(w + (size_t)r * in + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      __m512bh b = halves(x + (size_t)c * in + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a[r], b);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) y[c * LANES + r] = sum((F)acc[r][c]);
}

template <int R, int C> INLINE void rows_of_pairs(const half_t *w, const half_t *x, int in, float *y) {
  for (int r = 0; r < LANES; r += R) dots_of_pairs<R, C>(w + (size_t)r * in, x, in, y + r);
}

INLINE void plain_pairs(const Weight &m, int o, const Rows &rows, float *y) {
  const half_t *w = (const half_t *)m.data + (size_t)o * LANES * m.in, *x = rows.flat.data();
  int c = 0;
  for (; c + 4 <= rows.n; c += 4) rows_of_pairs<4, 4>(w, x + (size_t)c * m.in, m.in, y + c * LANES);
  x += (size_t)c * m.in, y += c * LANES;
  if (rows.n - c == 3) rows_of_pairs<4, 3>(w, x, m.in, y);
  if (rows.n - c == 2) rows_of_pairs<8, 2>(w, x, m.in, y);
  if (rows.n - c == 1) rows_of_pairs<8, 1>(w, x, m.in, y);
}

INLINE __m512i numbers_of_codes() {  // bf16 0 … 15, twice
  alignas(64) half_t table[32];
  for (int i = 0; i < 32; i++) table[i] = narrow1((float)(i % 16));
  return load<__m512i>(table);
}

// One group's codes as bf16: (16 pairs, 16 outputs, 2).
INLINE void unpack(const Weight &m, int o, int q, __m512i numbers, half_t *tile) {
  size_t at = ((size_t)o * m.in / 2 + (size_t)q * GROUP / 2) * LANES;
  const int bytes = m.kind == INT4 ? 1 : 2;
  ask((const char *)m.data + at * bytes + AHEAD, 4 * bytes);
  for (int p = 0; p < GROUP / 2; p++) {
    if (m.kind == INT4) {  // number -> bf16 by a table of 32; an index is five bits, of which the fifth is not asked
      __m512i b = _mm512_cvtepu8_epi32(load<__m128i>((const uint8_t *)m.data + at + p * LANES));
      store(tile + p * 32, _mm512_permutexvar_epi16(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), numbers));
    } else {
      __m256i b = load<__m256i>((const int8_t *)m.data + (at + p * LANES) * 2);
      __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(b)));
      __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(b, 1)));
      store(tile + p * 32, _mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// Rows c … c + C - 1: their sums of one group, part (rows, 16).
template <int C> INLINE void group_of_pairs(const half_t *tile, const half_t *x, int in, F *part) {
  __m512 a[C] = {}, b[C] = {};
  for (int p = 0; p < GROUP / 2; p += 2) {
    __m512bh first = halves(tile + p * 32), second = halves(tile + p * 32 + 32);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      a[c] = _mm512_dpbf16_ps(a[c], first, (__m512bh)_mm512_set1_epi32(load<int>(x + (size_t)c * in + 2 * p)));
      b[c] = _mm512_dpbf16_ps(b[c], second, (__m512bh)_mm512_set1_epi32(load<int>(x + (size_t)c * in + 2 * p + 2)));
    }
  }
  for (int c = 0; c < C; c++) part[c] = (F)a[c] + (F)b[c];
}

INLINE void grouped_pairs(const Weight &m, int o, const Rows &rows, float *y) {
  alignas(64) half_t tile[GROUP * LANES];
  F part[1][MOST];
  const __m512i numbers = numbers_of_codes();
  memset(y, 0, sizeof(float) * LANES * rows.n);
  for (int q = 0; q < m.in / GROUP; q++) {
    unpack(m, o, q, numbers, tile);
    const half_t *x = rows.flat.data() + q * GROUP;
    int c = 0;
    for (; c + 4 <= rows.n; c += 4) group_of_pairs<4>(tile, x + (size_t)c * m.in, m.in, part[0] + c);
    for (; c < rows.n; c++) group_of_pairs<1>(tile, x + (size_t)c * m.in, m.in, part[0] + c);
    graded(m, o, q, 1, rows, part, y);
  }
}
#else
INLINE void plain_pairs(const Weight &, int, const Rows &, float *) {}
INLINE void grouped_pairs(const Weight &, int, const Rows &, float *) {}
#endif

// ---- tiles of bf16 -----------------------------------------------------------------------------------------------

#ifdef TILES
// the compiler does not know that a tile is loaded from memory
INLINE void written() { asm volatile("" ::: "memory"); }
INLINE bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, tile data
INLINE void release_tiles() { _tile_release(); }

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1: sums of 16 outputs x 16 rows; 2, 3 and 6: sums of rows x 16 outputs; 7: rows; 4 and 5: 16 of anything.
INLINE void set_tiles(int n) {
  Config c;
  for (int t = 0; t < 8; t++) c.bytes[t] = 64, c.rows[t] = t < 2 || t == 4 || t == 5 ? 16 : std::min(n, 16);
  _tile_loadconfig(&c);
}

INLINE void plain_tiles(const Weight &m, int o, const Rows &rows, float *y) {
  const half_t *w = (const half_t *)m.data + (size_t)o * LANES * m.in, *x = rows.pairs.data();
  alignas(64) float even[LANES * LANES], odd[LANES * LANES];
  written();
  for (int c = 0; c < rows.n; c += LANES) {
    _tile_zero(0);
    _tile_zero(1);
    for (int k = 0; k < m.in; k += 2 * GROUP) {  // two sums, for one would wait for itself
      _tile_loadd(4, w + k, m.in * 2);
      _tile_loadd(5, x + (size_t)k * MOST + c * 2, MOST * 4);
      _tile_dpbf16ps(0, 4, 5);
      if (k + GROUP == m.in) break;
      _tile_loadd(4, w + k + GROUP, m.in * 2);
      _tile_loadd(5, x + (size_t)(k + GROUP) * MOST + c * 2, MOST * 4);
      _tile_dpbf16ps(1, 4, 5);
    }
    _tile_stored(0, even, 64);
    _tile_stored(1, odd, 64);
    written();
    for (int i = c; i < std::min(rows.n, c + LANES); i++)
      for (int r = 0; r < LANES; r++) y[i * LANES + r] = even[r * LANES + i - c] + odd[r * LANES + i - c];
  }
}

// part (rows, 16) = x of one group times its tile of codes
#define GROUP_SUM(T, x, stride, tile, part) \
  _tile_zero(T);                            \
  _tile_loadd(4, tile, 64);                 \
  _tile_loadd(7, x, stride);                \
  _tile_dpbf16ps(T, 7, 4);                  \
  _tile_stored(T, part, 64);

INLINE void grouped_tiles(const Weight &m, int o, const Rows &rows, float *y) {
  alignas(64) half_t tile[BATCH][GROUP * LANES];
  F part[2][BATCH][MOST];  // of this batch of groups, and of the one before: what waits for a tile is done later
  const __m512i numbers = numbers_of_codes();
  memset(y, 0, sizeof(float) * LANES * rows.n);
  const int groups = m.in / GROUP;
  int turn = 0;
  for (int q = 0; q < groups + BATCH; q += BATCH, turn ^= 1) {
    int count = std::min(BATCH, groups - q);
    for (int j = 0; j < count; j++) unpack(m, o, q + j, numbers, tile[j]);
    written();
    for (int c = 0; c < rows.n && count > 0; c += LANES) {
      const half_t *x = rows.flat.data() + (size_t)c * m.in + q * GROUP;
      GROUP_SUM(2, x, m.in * 2, tile[0], part[turn][0] + c)
      if (count > 1) { GROUP_SUM(3, x + GROUP, m.in * 2, tile[1], part[turn][1] + c) }
      if (count > 2) { GROUP_SUM(6, x + 2 * GROUP, m.in * 2, tile[2], part[turn][2] + c) }
    }
    written();
    if (q) graded(m, o, q - BATCH, std::min(BATCH, groups - q + BATCH), rows, part[turn ^ 1], y);
  }
}
#else
INLINE bool ask_for_tiles() { return false; }
INLINE void set_tiles(int) {}
INLINE void plain_tiles(const Weight &, int, const Rows &, float *) {}
INLINE void grouped_tiles(const Weight &, int, const Rows &, float *) {}
INLINE void release_tiles() {}
#endif

// y (n, 16): outputs 16 o … 16 o + 15 of all rows
static void product(const Weight &m, int o, const Rows &rows, bool tiles, float *y) {
  if (m.kind == FP32) plain<float>(m, o, rows.x.data(), rows.n, y);
  else if (m.kind == BF16 && tiles) plain_tiles(m, o, rows, y);
  else if (m.kind == BF16 && PAIRS) plain_pairs(m, o, rows, y);
  else if (m.kind == BF16) plain<half_t>(m, o, rows.apart.data(), rows.n, y);
  else if (tiles) grouped_tiles(m, o, rows, y);
  else if (PAIRS) grouped_pairs(m, o, rows, y);
  else grouped(m, o, rows, y);
  if (m.bias)
    for (int i = 0; i < rows.n; i++) store(y + i * LANES, load<F>(y + i * LANES) + wide(m.bias + o * LANES));
}
