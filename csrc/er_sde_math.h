// The arithmetic of one element: conversions, the portable normal stream. No torch header, no loop, no state.
//
// Included by the CUDA kernel and, once for each instruction set, by the CPU kernel (inside a namespace of its own, so
// there is no include guard): both are loops over these same functions, and a machine without a GPU tests the arithmetic.
// Every operation is an integer operation or one correctly rounded IEEE operation, and each fma is written out, so that
// every compiler gives the same bits. Build with floating-point contraction off.

ERSDE_FN float fma_(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
ERSDE_FN double fma_(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}
ERSDE_FN float mul_(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
ERSDE_FN double mul_(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
ERSDE_FN double add_(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

ERSDE_FN float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}
ERSDE_FN uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

// ---- storage types: bfloat16 and float16 as their bits, rounded to nearest even ----

ERSDE_FN float bfloat16_to_float(uint16_t h) { return as_float((uint32_t)h << 16); }

ERSDE_FN uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

ERSDE_FN float float16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  const uint32_t subnormal = as_bits((float)(int32_t)magnitude * 5.9604644775390625e-8f);  // 2^-24
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}

ERSDE_FN uint16_t float_to_float16(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;  // the sum rounds to a multiple of 2^-24
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return (uint16_t)((bits >> 16 & 0x8000u) | (magnitude >= 0x477FF000u ? large : finite));
}

// ---- the portable stream: Philox4x32-10 (Salmon et al. 2011) and Box-Muller with polynomials of our own ----

struct Words {
  uint32_t x, y, z, w;
};

// The keys of the ten rounds.
struct Keys {
  uint32_t first[10], second[10];
};

ERSDE_FN Keys keys_of(uint64_t seed) {
  Keys keys{};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (uint32_t round = 0; round < 10; ++round) {
    keys.first[round] = (uint32_t)seed + round * 0x9E3779B9u;
    keys.second[round] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

ERSDE_FN Words philox(const Keys& keys, Words c) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)0xD2511F53u * c.x, product1 = (uint64_t)0xCD9E8D57u * c.z;
    c = Words{(uint32_t)(product1 >> 32) ^ c.y ^ keys.first[round], (uint32_t)product1,
              (uint32_t)(product0 >> 32) ^ c.w ^ keys.second[round], (uint32_t)product0};
  }
  return c;
}

// The correctly rounded square root of x in [2^-40, 64).
ERSDE_FN float sqrt_(float x) {
#ifdef __CUDA_ARCH__
  // What __fsqrt_rn does in its normal range, without the branch that asks whether x lies in it; compared with it over all x.
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float near = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmaf_rn(-near, near, x), __fmul_rn(inverse, 0.5f), near);
#else
  return __builtin_sqrtf(x);
#endif
}

// Two normals from two words. |z| <= 6.77; the radius is within 1.3 ulp, cosine 1.6, sine 2.4.
ERSDE_FN void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  // radius = sqrt(-2 log(u)), u = (a + 1/2) / 2^32 = 2^e (1 + f), f in [-1/3, 1/3): both f and e 2^23 are exact
  const float x = (float)a + 0.5f;
  const uint32_t bits = as_bits(x);
  const uint32_t exponent = (bits - 0x4F2AAAABu) & 0xFF800000u;
  const float f = as_float(bits - exponent - 0x10000000u) - 1.0f;
  float p = as_float(0xBE99E978u);
  p = fma_(p, f, as_float(0x3E9C2A6Du));
  p = fma_(p, f, as_float(0xBE8CD34Eu));
  p = fma_(p, f, as_float(0x3EA872CAu));
  p = fma_(p, f, as_float(0xBECD1B0Du));
  p = fma_(p, f, as_float(0x3F0006C3u));
  p = fma_(p, f, as_float(0xBF2AA9E8u));
  p = fma_(p, f, as_float(0x3F800000u));
  p = fma_(p, f, as_float(0xC0000000u));
  const float square = fma_(p, f, fma_((float)(int32_t)exponent, as_float(0xB4317218u), as_float(0x2B800000u)));
  const float r = sqrt_(square);
  // angle = pi / 2 * t, t in (-1, 1): an eighth of the circle either way, the rest by the two top bits of b
  const float t = mul_((float)(int32_t)(4u * b + 2u), 2.3283064365386963e-10f);  // 2^-32
  const float q = mul_(t, t);
  float sine = as_float(0xBB998CC7u);
  sine = fma_(sine, q, as_float(0x3DA34052u));
  sine = fma_(sine, q, as_float(0xBF255E12u));
  sine = mul_(fma_(sine, q, as_float(0x3FC90FDBu)), t);
  float cosine = as_float(0xBCA73C5Fu);
  cosine = fma_(cosine, q, as_float(0x3E81D82Cu));
  cosine = fma_(cosine, q, as_float(0xBF9DE9CEu));
  cosine = fma_(cosine, q, as_float(0x3F800000u));
  const float signed_r = as_float(as_bits(r) | (b & 0x80000000u));
  const bool swap = b & 0x40000000u;
  z0 = mul_(signed_r, swap ? sine : cosine);
  z1 = mul_(signed_r, swap ? cosine : sine);
}

// Counter words of one group of four elements of one sample; `step` and `sample` as the plan and the caller count them.
ERSDE_FN Words portable_counter(uint64_t group, uint32_t step, uint64_t sample) {
  const uint32_t tag = 1;  // keeps clear of torch's and Triton's own counters
  return Words{(uint32_t)group, step, (uint32_t)sample,
               (uint32_t)(group >> 32) << 24 | tag << 16 | ((uint32_t)(sample >> 32) & 0xFFFFu)};
}

// Normals 4 group ... 4 group + 3 of a sample.
ERSDE_FN void portable_normals(const Keys& keys, Words counter, float& z0, float& z1, float& z2, float& z3) {
  const Words w = philox(keys, counter);
  box_muller(w.x, w.y, z0, z1);
  box_muller(w.z, w.w, z2, z3);
}

// ---- torch's stream: what torch.randn draws on CUDA devices (torch 2.11 to 2.13), element by element ----

// Subsequence, offset and place of element e where each thread draws `unroll` numbers a time (4; float64: 2).
struct TorchPlace {
  uint64_t subsequence, block;
  int place;
};

ERSDE_FN TorchPlace torch_place(uint64_t e, uint64_t threads, int unroll) {
  const uint64_t stride = threads * unroll, inside = e % stride;
  return TorchPlace{inside % threads, e / stride, (int)(inside / threads)};
}

ERSDE_FN Words torch_words(const Keys& keys, uint64_t offset, uint64_t block, uint64_t subsequence) {
  const uint64_t at = offset / 4 + block;
  return philox(keys, Words{(uint32_t)at, (uint32_t)(at >> 32), (uint32_t)subsequence, (uint32_t)(subsequence >> 32)});
}

// cuRAND's float32 pair. Left to the compiler's contraction on the device, as in torch's own build: its bits are wanted.
ERSDE_FN void torch_pair(uint32_t x, uint32_t y, float& z0, float& z1) {
  const float u = x * 2.3283064e-10f + (2.3283064e-10f / 2);
  const float v = y * (2.3283064e-10f * 6.2831855f) + ((2.3283064e-10f * 6.2831855f) / 2);
#ifdef __CUDA_ARCH__
  const float s = sqrtf(-2.0f * logf(u));
  __sincosf(v, &z0, &z1);
#else
  const float s = __builtin_sqrtf(-2.0f * __builtin_logf(u));
  z0 = __builtin_sinf(v);
  z1 = __builtin_cosf(v);
#endif
  z0 *= s;
  z1 *= s;
}

// cuRAND's float64 pair, of all four words.
ERSDE_FN void torch_pair_double(Words w, double& z0, double& z1) {
  const uint64_t x = (uint64_t)w.x ^ ((uint64_t)w.y << 21), y = (uint64_t)w.z ^ ((uint64_t)w.w << 21);
  const double u = x * 1.1102230246251565e-16 + 1.1102230246251565e-16 / 2.0;
  const double v = y * (1.1102230246251565e-16 * 2.0) + 1.1102230246251565e-16;
#ifdef __CUDA_ARCH__
  const double s = sqrt(-2.0 * log(u));
  sincospi(v, &z0, &z1);
#else
  const double s = __builtin_sqrt(-2.0 * __builtin_log(u));
  z0 = __builtin_sin(3.14159265358979323846 * v);
  z1 = __builtin_cos(3.14159265358979323846 * v);
#endif
  z0 *= s;
  z1 *= s;
}

// One element of a float32, bfloat16 or float16 tensor.
ERSDE_FN float torch_normal(uint64_t seed, uint64_t offset, uint64_t threads, uint64_t e) {
  const TorchPlace at = torch_place(e, threads, 4);
  const Words w = torch_words(keys_of(seed), offset, at.block, at.subsequence);
  float z0, z1;
  torch_pair(at.place < 2 ? w.x : w.z, at.place < 2 ? w.y : w.w, z0, z1);
  return at.place % 2 ? z1 : z0;
}

ERSDE_FN double torch_normal_double(uint64_t seed, uint64_t offset, uint64_t threads, uint64_t e) {
  const TorchPlace at = torch_place(e, threads, 2);
  double z0, z1;
  torch_pair_double(torch_words(keys_of(seed), offset, at.block, at.subsequence), z0, z1);
  return at.place ? z1 : z0;
}
