// The log-density on the CPU for one instruction set: included behind er_sde_step_cpu_loop.h. Segment by segment, in float64; what
// the step of a segment has just read and written is still in cache.

// mean = w * row, or added to it.
template <typename S>
inline void add_to_mean(double* mean, const S* row, double w, int n, bool first) {
  if (first) {
    ERSDE_INDEPENDENT
    for (int i = 0; i < n; ++i) mean[i] = mul_(w, (double)widen(row[i]));
  } else {
    ERSDE_INDEPENDENT
    for (int i = 0; i < n; ++i) mean[i] = add_(mean[i], mul_(w, (double)widen(row[i])));
  }
}

// Calls f with a row of n elements in its storage type; one that is not contiguous goes through the buffer.
template <typename F>
inline void with_row(const char* p, int64_t stride, DType t, int n, double* buffer, const F& f) {
  if (stride != size_of(t)) return f(load_row<double>(p, stride, t, n, buffer));
  switch (t) {
    case DType::float32: return f(reinterpret_cast<const float*>(p));
    case DType::float64: return f(reinterpret_cast<const double*>(p));
    case DType::bfloat16: return f(reinterpret_cast<const BFloat16*>(p));
    case DType::float16: return f(reinterpret_cast<const Float16*>(p));
  }
}

// The sum of a segment's squares: of four neighbours in each of 32 lanes, eight times over, then halves of the lanes.
inline double sum_of_squares(const double* residual) {
  double lanes[32];
  for (int turn = 0; turn < 8; ++turn) {
    const double* r = residual + 128 * turn;
    for (int l = 0; l < 32; ++l) {
      const double a = mul_(r[4 * l], r[4 * l]), b = mul_(r[4 * l + 1], r[4 * l + 1]);
      const double c = mul_(r[4 * l + 2], r[4 * l + 2]), d = mul_(r[4 * l + 3], r[4 * l + 3]);
      const double quad = add_(add_(a, b), add_(c, d));
      lanes[l] = turn ? add_(lanes[l], quad) : quad;
    }
  }
  for (int half = 16; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = add_(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

// What is known of one sample.
struct SampleDensity {
  Gaussian gaussian;
  int slot;
  double gradient;  // of its log-density, over the standard deviation

  SampleDensity(const LogProbArgs& a, int64_t b) : gaussian(gaussian_of(a.step.rows, b)), slot(ring_slot(a.step.rows)), gradient(0) {
    if (a.what == Density::gradients) gradient = mul_(a.log_prob[b], gaussian.inverse);
  }
};

// (next sample - mean) / std of the n elements from where the walk stands.
inline void residual_of(double* residual, const LogProbArgs& a, const SampleDensity& of, const Walk& walk, int n) {
  const StepArgs& s = a.step;
  const int inner = s.ndim - 1;
  alignas(64) double mean[kSegment], buffer[kSegment];
  bool first = true;
  const auto add = [&](const Operand& o, int64_t bytes, double w) {
    if (w == 0) return;
    with_row(walk.address(o, bytes), o.strides[inner], o.dtype, n, buffer, [&](auto row) { add_to_mean(mean, row, w, n, first); });
    first = false;
  };
  for (int k = 0; k < s.num_terms; ++k) add(s.terms[k], term_offset(s.rows, of.slot, k), of.gaussian.w[k]);
  add(s.guide, 0, of.gaussian.guide);
  for (int i = 0; first && i < n; ++i) mean[i] = 0;
  with_row(walk.address(s.out), s.out.strides[inner], s.out.dtype, n, buffer, [&](auto row) {
    const double inverse = of.gaussian.inverse;
    ERSDE_INDEPENDENT
    for (int i = 0; i < n; ++i) residual[i] = mul_((double)widen(row[i]) - mean[i], inverse);
  });
}

// A row of factor * residual, in the type of the gradient.
inline void put_gradient(const Operand& o, const Walk& walk, double factor, const double* residual, int n) {
  alignas(64) double row[kSegment];
  ERSDE_INDEPENDENT
  for (int i = 0; i < n; ++i) row[i] = mul_(factor, residual[i]);
  char* p = walk.address(o);
  const int64_t stride = o.strides[walk.a.ndim - 1];
  if (stride == 4 && o.dtype == DType::float32) {
    float* f = reinterpret_cast<float*>(p);
    for (int i = 0; i < n; ++i) f[i] = (float)row[i];
  } else {
    store_row<double>(p, stride, o.dtype, n, row);
  }
}

inline void put_gradients(const LogProbArgs& a, const SampleDensity& of, const Walk& walk, const double* residual, int n) {
  const auto put = [&](const Operand& o, double w) {
    if (o.data) put_gradient(o, walk, mul_(of.gradient, w), residual, n);
  };
  for (int k = 0; k < kMaxTerms; ++k) put(a.gradients[k], of.gaussian.w[k]);  // 0 where the step does not read it
  put(a.gradients[kMaxTerms], of.gaussian.guide);
  put(a.gradients[kMaxTerms + 1], -1);
}

// Segments [begin, end) of all samples.
inline void log_prob(const LogProbArgs& a, int64_t begin, int64_t end) {
  const int64_t size = a.step.numel / a.step.sizes[0], segments = segments_of(size);
  alignas(64) double residual[kSegment];
  int64_t sample = begin / segments;
  SampleDensity of(a, sample);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / segments, first = at % segments * kSegment;
    const int64_t last = first + kSegment < size ? first + kSegment : size;
    if (b != sample) of = SampleDensity(a, sample = b);
    if (a.what == Density::of_step) step(a.step, b * size + first, b * size + last);
    Walk walk(a.step, b * size + first);
    for (int64_t p = first; p < last;) {
      const int n = (int)(walk.left_in_row() < last - p ? walk.left_in_row() : last - p);
      residual_of(residual + (p - first), a, of, walk, n);
      if (a.what == Density::gradients) put_gradients(a, of, walk, residual + (p - first), n);
      walk.advance(n);
      p += n;
    }
    if (a.what == Density::gradients) continue;
    for (int64_t p = last - first; p < kSegment; ++p) residual[p] = 0;
    a.sums[at] = sum_of_squares(residual);
  }
}
