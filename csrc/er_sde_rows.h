// The coefficients of one sample's step, from its row of a plan's table. Included where er_sde_math.h is, after it.

// Calls f with the constant k as its type, where k is first ... last; whether it is.
template <int first, int last, typename F>
inline bool with_constant(int k, const F& f) {
  if constexpr (first <= last) {
    if (k != first) return with_constant<first + 1, last>(k, f);
    f(std::integral_constant<int, first>());
    return true;
  }
  return false;
}

template <typename A>
struct Coefficients {
  A w[kMaxTerms];    // of each term
  A p[3];            // of x, the model's output and the guide in the prediction
  A noise;           // of noise that is drawn
  uint32_t counter;  // of the portable stream
};

// nullptr where the plan or the step of sample b does not exist.
ERSDE_FN const double* row_of(const Rows& r, int64_t b) {
  if (!r.table) return r.row;
  if (!r.step_index) return r.table;
  const int64_t at = b * r.index_stride, plan = r.plan_index ? r.plan_index[at] : 0, step = r.step_index[at];
  if (plan < 0 || plan >= r.num_plans || step < 0 || step >= r.num_steps) return nullptr;
  return r.table + (plan * r.num_steps + step) * r.num_columns;
}

// Whether every sample has the same coefficients, and the host knows them: nothing then lies in the memory of the tensors.
ERSDE_FN bool known_to_host(const Rows& r) { return !r.table && !r.scales; }

// K terms, so that a GPU holds them in registers. What the table does not say is NaN, and nothing is left out silently.
template <typename A, int K>
ERSDE_FN Coefficients<A> coefficients_of(const Rows& r, int64_t b) {
  const double* row = row_of(r, b);
  bool given = row != nullptr;
  for (int column = kWD + r.predictions; given && column < r.num_columns; ++column) given = row[column] == 0;
  const A missing = (A)as_float(0x7FC00000u);
  Coefficients<A> c{};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < K; ++k) c.w[k] = r.columns[k] < 0 ? A(0) : given ? (A)row[r.columns[k]] : missing;
  c.noise = given ? (A)row[kWNoise] : missing;
  c.counter = row ? (uint32_t)row[kCounter] : 0u;
  if (r.predicts) {
    const double scale = r.scales ? r.scales[b] : r.scale, p_m = row ? row[kPM] : (double)missing;
    c.p[0] = row ? (A)row[kPX] : missing;
    c.p[1] = (A)(r.guided ? p_m * scale : p_m);
    c.p[2] = (A)(r.guided ? p_m * (1 - scale) : 0);
  }
  return c;
}

// Ring of predictions: the slot of the current step, and the bytes from the ring's start to the prediction `age` steps older.
ERSDE_FN int ring_slot(const Rows& r) {
  if (!r.ring) return 0;
  const int slot = (int)(*r.step_index % r.ring);
  return slot < 0 ? slot + r.ring : slot;
}
ERSDE_FN int64_t ring_offset(const Rows& r, int slot, int age) {
  return (int64_t)(slot - age + (slot < age ? r.ring : 0)) * r.ring_stride;
}
// Bytes from where term k begins to what this step reads of it: earlier predictions may lie in the ring.
ERSDE_FN int64_t term_offset(const Rows& r, int slot, int k) {
  return r.ring && k > 1 && k <= r.predictions ? ring_offset(r, slot, k - 1) : 0;
}

// The Gaussian that a step draws from: its mean is the sum of w[k] term[k], with a model's output unrounded, behind which comes the
// guide's share. Added and multiplied apart, without fma, as PyTorch's operators do: the reference has the same bits.
struct Gaussian {
  double w[kMaxTerms], guide;
  double inverse, log_std;  // of its standard deviation: NaN where the step adds no noise
};

ERSDE_FN Gaussian gaussian_of(const Rows& r, int64_t b) {
  const auto c = coefficients_of<double, kMaxTerms>(r, b);
  Gaussian g{};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < kMaxTerms; ++k) {
    if (r.columns[k] == kWGuide) g.guide = c.w[k];
    else if (r.columns[k] != kWNoise) g.w[k] = c.w[k];
  }
  if (r.predicts) {
    g.w[0] = add_(g.w[0], mul_(g.w[1], c.p[0]));
    g.guide = add_(g.guide, mul_(g.w[1], c.p[2]));
    g.w[1] = mul_(g.w[1], c.p[1]);
  }
  const double std = c.noise > 0 ? c.noise : (double)NAN;
  g.inverse = 1 / std;
  g.log_std = log(std);
  return g;
}

// The log-density of a sample of `size` elements, or its mean over them, from the sum of the squares of (sample - mean) / std.
ERSDE_FN double log_prob_of(const Gaussian& g, double squares, int64_t size, bool mean) {
  constexpr double kHalfLogTwoPi = 0.9189385332046728;
  const double density = add_(-squares / 2, -mul_((double)size, add_(g.log_std, kHalfLogTwoPi)));
  return mean ? density / (double)size : density;
}
