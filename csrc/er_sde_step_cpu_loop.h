// The CPU kernel for one instruction set: included once for each, inside its namespace and under its target pragma.
//
// Work goes tile by tile: every stream is a row of `width` numbers in the accumulation type, read in place where it is
// stored so, else converted into a buffer that stays in cache; the noise is one more such row. Then one loop combines them.

#include "er_sde_math.h"

constexpr int kTile = 1024;

ERSDE_FN float to_float(uint16_t bits, DType t) {
  return t == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

template <typename T>
inline T load_one(const char* p, DType t) {
  switch (t) {
    case DType::float32: { float v; __builtin_memcpy(&v, p, 4); return (T)v; }
    case DType::float64: { double v; __builtin_memcpy(&v, p, 8); return (T)v; }
    default: { uint16_t v; __builtin_memcpy(&v, p, 2); return (T)to_float(v, t); }
  }
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

// out = sum of w[k] * row[k], in this order, each product but the first fused into the sum. out may be one of the rows.
template <int K, typename T>
void combine(T* out, const T* const* rows, const T* weights, int n) {
  const T* row[K];
  T w[K];
  for (int k = 0; k < K; ++k) {
    row[k] = rows[k];
    w[k] = weights[k];
  }
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    T y = mul_(w[0], row[0][i]);
    for (int k = 1; k < K; ++k) y = fma_(w[k], row[k][i], y);
    out[i] = y;
  }
}

template <typename T>
void combine_any(T* out, const T* const* rows, const T* weights, int num_rows, int n) {
  switch (num_rows) {
    case 0: for (int i = 0; i < n; ++i) out[i] = 0; return;
    case 1: return combine<1, T>(out, rows, weights, n);
    case 2: return combine<2, T>(out, rows, weights, n);
    case 3: return combine<3, T>(out, rows, weights, n);
    case 4: return combine<4, T>(out, rows, weights, n);
    case 5: return combine<5, T>(out, rows, weights, n);
    case 6: return combine<6, T>(out, rows, weights, n);
    default: return combine<7, T>(out, rows, weights, n);
  }
}

inline void box_muller_row(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) box_muller(a[i], b[i], z0[i], z1[i]);
}

// Normals of `count` whole groups from `group` on, count <= kTile / 4. Three short loops, each of which vectorises within
// the registers of AVX2: words, pairs of normals from pairs of words, and the order in which the elements take them.
inline void normals_of_groups(float* z, uint64_t seed, uint32_t step, uint64_t sample, uint64_t group, int count) {
  constexpr int kGroups = kTile / 4;
  alignas(64) uint32_t words[4][kGroups];
  alignas(64) float normals[4][kGroups];
  const Words first = portable_counter(group, step, sample);
  for (int g = 0; g < count; ++g) {
    Words c = first;
    c.x += (uint32_t)g;
    c.w += (uint32_t)(c.x < first.x) << 24;  // the carry into the group's high bits
    const Words w = philox((uint32_t)seed, (uint32_t)(seed >> 32), c);
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

template <typename T>
void step_range(const StepArgs& a, int64_t begin, int64_t end) {
  alignas(64) T buffers[kMaxTerms][kTile];
  alignas(64) T result[kTile];
  alignas(64) float noise[kTile];
  T weights[kMaxTerms + 1];
  const Operand* terms[kMaxTerms];
  int num_terms = 0;
  for (int k = 0; k < a.num_terms; ++k) {
    if (a.weights[k] == 0) continue;
    weights[num_terms] = (T)a.weights[k];
    terms[num_terms++] = &a.terms[k];
  }
  const bool draws = a.noise == Noise::portable;
  if (draws) weights[num_terms] = (T)a.w_noise;

  const int inner = a.ndim - 1;
  int64_t index[kMaxDims];
  for (int64_t d = inner, rest = begin; d >= 0; --d) {
    index[d] = rest % a.sizes[d];
    rest /= a.sizes[d];
  }
  const DType in_place = sizeof(T) == 8 ? DType::float64 : DType::float32;
  // Rows that are all read and written in place need no tiles: longer ones let the processor prefetch across pages.
  const bool direct = a.out.dtype == in_place && a.out.strides[inner] == size_of(in_place);
  bool converts = draws || !direct;
  for (int k = 0; k < num_terms; ++k) {
    converts |= terms[k]->dtype != in_place || terms[k]->strides[inner] != size_of(in_place);
  }
  const int64_t longest = converts ? kTile : int64_t{1} << 30;
  for (int64_t e = begin; e < end;) {
    int64_t width = a.sizes[inner] - index[inner];
    if (width > end - e) width = end - e;
    if (width > longest) width = longest;
    const int n = (int)width;

    const T* rows[kMaxTerms + 1];
    for (int k = 0; k < num_terms; ++k) {
      const char* p = terms[k]->data;
      for (int d = 0; d < a.ndim; ++d) p += index[d] * terms[k]->strides[d];
      rows[k] = load_row<T>(p, terms[k]->strides[inner], terms[k]->dtype, n, buffers[k]);
    }
    if (draws) {
      int64_t position = a.first_position;
      for (int d = 0; d < a.ndim; ++d) position += index[d] * a.position_strides[d];
      const uint64_t seed = a.seeds ? (uint64_t)a.seeds[2 * index[0]] : a.seed;
      const uint64_t sample = a.seeds ? (uint64_t)a.seeds[2 * index[0] + 1] : (uint64_t)index[0];
      normals_of_range(noise, seed, a.step, sample, (uint64_t)position, n);
      rows[num_terms] = load_row<T>(reinterpret_cast<const char*>(noise), 4, DType::float32, n, result);
    }
    char* p = a.out.data;
    for (int d = 0; d < a.ndim; ++d) p += index[d] * a.out.strides[d];
    T* out = direct ? reinterpret_cast<T*>(p) : result;
    combine_any<T>(out, rows, weights, num_terms + draws, n);
    if (!direct) store_row<T>(p, a.out.strides[inner], a.out.dtype, n, result);

    e += n;
    index[inner] += n;
    for (int d = inner; d > 0 && index[d] == a.sizes[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

inline void step(const StepArgs& args, int64_t begin, int64_t end) {
  args.float64 ? step_range<double>(args, begin, end) : step_range<float>(args, begin, end);
}

inline void torch_noise(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = torch_normal(seed, offset, (uint64_t)threads, (uint64_t)(first + i));
}
