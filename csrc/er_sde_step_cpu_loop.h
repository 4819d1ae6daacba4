// The CPU kernel for one instruction set: included once for each, inside its namespace and under its target pragma.
//
// Work goes row by row. Tensors of one type, contiguous along the row, are read and written in place; any others pass
// through tiles of the accumulation type that stay in cache. The noise is one more row, drawn where it is used.

#include "er_sde_math.h"
#include "er_sde_rows.h"

constexpr int kTile = 1024;

ERSDE_FN float to_float(uint16_t bits, DType t) {
  return t == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

template <typename T>
inline T load_one(const char* p, DType t) {
  switch (t) {
    case DType::float32: { float v; __builtin_memcpy(&v, p, 4); return (T)v; }
    case DType::float64: { double v; __builtin_memcpy(&v, p, 8); return (T)v; }
    case DType::bfloat16:
    case DType::float16: { uint16_t v; __builtin_memcpy(&v, p, 2); return (T)to_float(v, t); }
  }
  return T(0);
}

template <typename T>
inline void store_one(char* p, DType t, T value) {
  switch (t) {
    case DType::float32: { const float v = (float)value; __builtin_memcpy(p, &v, 4); return; }
    case DType::float64: { const double v = (double)value; __builtin_memcpy(p, &v, 8); return; }
    case DType::bfloat16: { const uint16_t v = float_to_bfloat16((float)value); __builtin_memcpy(p, &v, 2); return; }
    case DType::float16: { const uint16_t v = float_to_float16((float)value); __builtin_memcpy(p, &v, 2); return; }
  }
}

// A row of n elements in type T: in place where it is contiguous and of type T, else converted into buffer.
template <typename T>
const T* load_row(const char* p, int64_t stride, DType t, int n, T* buffer) {
  if (stride != size_of(t)) {
    for (int i = 0; i < n; ++i) buffer[i] = load_one<T>(p + i * stride, t);
  } else if (t == (sizeof(T) == 8 ? DType::float64 : DType::float32)) {
    return reinterpret_cast<const T*>(p);
  } else if (t == DType::bfloat16) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    for (int i = 0; i < n; ++i) buffer[i] = (T)bfloat16_to_float(h[i]);
  } else if (t == DType::float16) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    for (int i = 0; i < n; ++i) buffer[i] = (T)float16_to_float(h[i]);
  } else if (t == DType::float32) {
    const float* f = reinterpret_cast<const float*>(p);
    for (int i = 0; i < n; ++i) buffer[i] = (T)f[i];
  } else {
    const double* f = reinterpret_cast<const double*>(p);
    for (int i = 0; i < n; ++i) buffer[i] = (T)f[i];
  }
  return buffer;
}

template <typename T>
void store_row(char* p, int64_t stride, DType t, int n, const T* row) {
  if (stride != size_of(t) || t == DType::float64) {
    for (int i = 0; i < n; ++i) store_one<T>(p + i * stride, t, row[i]);
  } else if (t == DType::bfloat16) {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    for (int i = 0; i < n; ++i) h[i] = float_to_bfloat16((float)row[i]);
  } else if (t == DType::float16) {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    for (int i = 0; i < n; ++i) h[i] = float_to_float16((float)row[i]);
  } else {
    float* f = reinterpret_cast<float*>(p);
    for (int i = 0; i < n; ++i) f[i] = (float)row[i];
  }
}

// Storage types that are not C++'s: one row of them is read and written in place, number by number, without a buffer.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
ERSDE_FN float widen(float v) { return v; }
ERSDE_FN double widen(double v) { return v; }
ERSDE_FN float widen(BFloat16 v) { return bfloat16_to_float(v.bits); }
ERSDE_FN float widen(Float16 v) { return float16_to_float(v.bits); }
ERSDE_FN void narrow(float v, float& out) { out = v; }
ERSDE_FN void narrow(double v, double& out) { out = v; }
ERSDE_FN void narrow(float v, BFloat16& out) { out.bits = float_to_bfloat16(v); }
ERSDE_FN void narrow(float v, Float16& out) { out.bits = float_to_float16(v); }

// out = sum of w[k] * row[k], in this order, then w[K] * z, each product but the first fused into the sum. out may be a row.
template <int K, bool Draws, typename T, typename S>
void combine(S* out, const S* const* rows, const T* z, const T* weights, int n) {
  const S* row[K + 1];
  T w[K + 1];
  for (int k = 0; k < K; ++k) row[k] = rows[k];
  for (int k = 0; k < K + Draws; ++k) w[k] = weights[k];
  ERSDE_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    T y = 0;
    if (K > 0) y = mul_(w[0], widen(row[0][i]));
    for (int k = 1; k < K; ++k) y = fma_(w[k], widen(row[k][i]), y);
    if (Draws) y = K > 0 ? fma_(w[K], z[i], y) : mul_(w[K], z[i]);
    narrow(y, out[i]);
  }
}

template <bool Draws, typename T, typename S>
void combine_any(S* out, const S* const* rows, int num_rows, const T* z, const T* weights, int n) {
  with_constant<0, kMaxTerms>(num_rows, [&](auto k) { combine<k.value, Draws, T, S>(out, rows, z, weights, n); });
}

inline void box_muller_row(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
  ERSDE_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) box_muller(a[i], b[i], z0[i], z1[i]);
}

// Normals of `count` whole groups from `group` on, count <= kTile / 4. Three short loops, each of which vectorises within
// the registers of AVX2: words, pairs of normals from pairs of words, and the order in which the elements take them.
inline void normals_of_groups(float* z, uint64_t seed, uint32_t step, uint64_t sample, uint64_t group, int count) {
  constexpr int kGroups = kTile / 4;
  alignas(64) uint32_t words[4][kGroups];
  alignas(64) float normals[4][kGroups];
  const Keys keys = keys_of(seed);
  const Words first = portable_counter(group, step, sample);
  for (int g = 0; g < count; ++g) {
    Words c = first;
    c.x += (uint32_t)g;
    c.w += (uint32_t)(c.x < first.x) << 24;  // the carry into the group's high bits
    const Words w = philox(keys, c);
    words[0][g] = w.x;
    words[1][g] = w.y;
    words[2][g] = w.z;
    words[3][g] = w.w;
  }
  box_muller_row(words[0], words[1], normals[0], normals[1], count);
  box_muller_row(words[2], words[3], normals[2], normals[3], count);
  for (int g = 0; g < count; ++g) {
    for (int k = 0; k < 4; ++k) z[4 * g + k] = normals[k][g];
  }
}

// Normals [first, first + n) of a sample; n <= kTile.
inline void normals_of_range(float* z, uint64_t seed, uint32_t step, uint64_t sample, uint64_t first, int n) {
  float group[4];
  while (n > 0 && (first % 4 != 0 || n < 4)) {
    normals_of_groups(group, seed, step, sample, first / 4, 1);
    do {
      *z++ = group[first % 4];
      ++first;
      --n;
    } while (n > 0 && first % 4 != 0);
  }
  normals_of_groups(z, seed, step, sample, first / 4, n / 4);
  z += n / 4 * 4;
  first += n / 4 * 4;
  if (n % 4) {
    normals_of_groups(group, seed, step, sample, first / 4, 1);
    for (int i = 0; i < n % 4; ++i) z[i] = group[i];
  }
}

// Where an element of a row is found: the address of a row of every operand, and the position of its first element.
struct Walk {
  const StepArgs& a;
  int64_t index[kMaxDims];

  Walk(const StepArgs& args, int64_t element) : a(args) {
    for (int d = a.ndim - 1; d >= 0; --d) {
      index[d] = element % a.sizes[d];
      element /= a.sizes[d];
    }
  }
  int64_t left_in_row() const { return a.sizes[a.ndim - 1] - index[a.ndim - 1]; }
  int64_t sample() const { return a.batched ? index[0] : 0; }
  char* address(const Operand& o, int64_t offset = 0) const {
    char* p = o.data + offset;
    for (int d = 0; d < a.ndim; ++d) p += index[d] * o.strides[d];
    return p;
  }
  void draw(float* z, int n, uint32_t counter) const {
    int64_t position = a.first_position;
    for (int d = 0; d < a.ndim; ++d) position += index[d] * a.position_strides[d];
    const uint64_t seed = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * index[0]] : a.drawn.seed;
    const uint64_t sample = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * index[0] + 1] : (uint64_t)index[0];
    normals_of_range(z, seed, counter, sample, (uint64_t)position, n);
  }
  void advance(int n) {
    index[a.ndim - 1] += n;
    for (int d = a.ndim - 1; d > 0 && index[d] == a.sizes[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
};

// A sum of some operands: which are read (those whose weight is not 0), in which order, and with which weights.
template <typename T>
struct Sum {
  const Operand* read[kMaxTerms];
  int64_t offset[kMaxTerms];
  T weights[kMaxTerms + 1];  // the noise's behind the others
  int count = 0;

  void add(const Operand& o, int64_t bytes, T weight) {
    if (weight == 0) return;
    read[count] = &o;
    offset[count] = bytes;
    weights[count++] = weight;
  }
};

// What the step makes of one sample: the prediction of a model's output, where there is one, and the next sample.
template <typename T>
struct Recipe {
  Sum<T> prediction, next;
  int64_t newest;  // offset of the prediction
  uint32_t counter;
  bool predicts, draws;

  Recipe(const StepArgs& a, int64_t b) : predicts(a.rows.predicts) {
    const auto c = coefficients_of<T, kMaxTerms>(a.rows, b);
    const int slot = ring_slot(a.rows);
    newest = ring_offset(a.rows, slot, 0);
    counter = c.counter;
    draws = a.drawn.source == Noise::portable && c.noise != 0;
    if (predicts) {
      prediction.add(a.terms[0], 0, c.p[0]);
      prediction.add(a.terms[1], 0, c.p[1]);
      prediction.add(a.guide, 0, c.p[2]);
    }
    for (int k = 0; k < a.num_terms; ++k) {
      if (predicts && k == 1) next.add(a.denoised, newest, c.w[k]);
      else next.add(a.terms[k], term_offset(a.rows, slot, k), c.w[k]);
    }
    next.weights[next.count] = draws ? c.noise : T(0);
  }
};

// Calls f(walk, recipe, n) for the rows of elements [begin, end), each of at most `longest` elements.
template <typename T, typename F>
inline void for_each_row(const StepArgs& a, int64_t begin, int64_t end, int64_t longest, const F& f) {
  Walk walk(a, begin);
  int64_t sample = walk.sample();
  Recipe<T> recipe(a, sample);
  for (int64_t e = begin; e < end;) {
    int64_t width = walk.left_in_row();
    if (width > end - e) width = end - e;
    if (width > longest) width = longest;
    if (walk.sample() != sample) recipe = Recipe<T>(a, sample = walk.sample());
    f(walk, recipe, (int)width);
    walk.advance((int)width);
    e += width;
  }
}

// Combines one row of every operand of a sum into out, drawing the noise that is part of it.
template <typename T, typename S>
inline void combine_row(S* out, const S* const* rows, const Sum<T>& sum, const Walk& walk, bool draws, uint32_t counter, int n) {
  if (!draws) return combine_any<false, T, S>(out, rows, sum.count, nullptr, sum.weights, n);
  alignas(64) float noise[kTile];
  alignas(64) T wide[kTile];
  walk.draw(noise, n, counter);
  const T* z = load_row<T>(reinterpret_cast<const char*>(noise), 4, DType::float32, n, wide);
  combine_any<true, T, S>(out, rows, sum.count, z, sum.weights, n);
}

// All of one storage type S and contiguous along the rows: read and written in place. Rows may be long, so that the processor
// prefetches across pages, but where noise or a prediction is to stay in cache.
template <typename T, typename S>
void step_in_place(const StepArgs& a, int64_t begin, int64_t end) {
  const bool stays = a.drawn.source == Noise::portable || a.rows.predicts;
  for_each_row<T>(a, begin, end, stays ? kTile : int64_t{1} << 30, [](const Walk& walk, const Recipe<T>& recipe, int n) {
    const auto combine = [&](char* out, const Sum<T>& sum, bool draws) {
      const S* rows[kMaxTerms];
      for (int k = 0; k < sum.count; ++k) rows[k] = reinterpret_cast<const S*>(walk.address(*sum.read[k], sum.offset[k]));
      combine_row<T, S>(reinterpret_cast<S*>(out), rows, sum, walk, draws, recipe.counter, n);
    };
    if (recipe.predicts) combine(walk.address(walk.a.denoised, recipe.newest), recipe.prediction, false);
    combine(walk.address(walk.a.out), recipe.next, recipe.draws);
  });
}

// Anything else goes tile by tile through rows of type T.
template <typename T>
void step_in_tiles(const StepArgs& a, int64_t begin, int64_t end) {
  alignas(64) T buffers[kMaxTerms][kTile];
  alignas(64) T result[kTile];
  const int inner = a.ndim - 1;
  for_each_row<T>(a, begin, end, kTile, [&](const Walk& walk, const Recipe<T>& recipe, int n) {
    const auto combine = [&](const Operand& out, int64_t offset, const Sum<T>& sum, bool draws) {
      const T* rows[kMaxTerms];
      for (int k = 0; k < sum.count; ++k) {
        const Operand& o = *sum.read[k];
        rows[k] = load_row<T>(walk.address(o, sum.offset[k]), o.strides[inner], o.dtype, n, buffers[k]);
      }
      combine_row<T, T>(result, rows, sum, walk, draws, recipe.counter, n);
      store_row<T>(walk.address(out, offset), out.strides[inner], out.dtype, n, result);
    };
    if (recipe.predicts) combine(a.denoised, recipe.newest, recipe.prediction, false);
    combine(a.out, 0, recipe.next, recipe.draws);
  });
}

template <typename T>
void step_range(const StepArgs& a, int64_t begin, int64_t end) {
  const DType t = a.out.dtype;
  const auto in_place = [&](const Operand& o) { return !o.data || (o.dtype == t && o.strides[a.ndim - 1] == size_of(t)); };
  bool all = in_place(a.out) && in_place(a.denoised) && in_place(a.guide);
  for (int k = 0; k < a.num_terms; ++k) all &= in_place(a.terms[k]);
  if constexpr (sizeof(T) == 8) {
    if (all && t == DType::float64) return step_in_place<double, double>(a, begin, end);
  } else {
    if (all && t == DType::float32) return step_in_place<float, float>(a, begin, end);
    if (all && t == DType::bfloat16) return step_in_place<float, BFloat16>(a, begin, end);
    if (all && t == DType::float16) return step_in_place<float, Float16>(a, begin, end);
  }
  step_in_tiles<T>(a, begin, end);
}

inline void step(const StepArgs& args, int64_t begin, int64_t end) {
  args.float64 ? step_range<double>(args, begin, end) : step_range<float>(args, begin, end);
}

inline void torch_noise(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = torch_normal(seed, offset, (uint64_t)threads, (uint64_t)(first + i));
}
