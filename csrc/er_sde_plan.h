// A row of a plan's table from the schedule, in float64: what weights.py does on the host, step by step, for plans
// that are built where their sigmas lie. See there for the formulas and their sources. No torch header.
//
// A row is the work of a few lanes that share out the points of its integrals: a warp on a GPU, one lane on a CPU. What the
// host would refuse is a row of NaN: nothing here can raise.
#pragma once
#include "er_sde_step.h"

#ifdef __CUDACC__
#define ERSDE_PLAN_FN __host__ __device__ inline
#else
#define ERSDE_PLAN_FN inline
#endif

namespace ersde {

enum class Process : int32_t { given, ve, vp, flow };               // where alphas come from
enum class Scaler : int32_t { sde, sde_1, sde_4, sde_5 };            // the functional forms of noise_scaler.py
enum class Method : int32_t { taylor, newton };

#ifndef __CUDACC_RTC__  // their names in Python
constexpr std::pair<const char*, Process> kProcesses[] = {{"ve", Process::ve}, {"vp", Process::vp}, {"flow", Process::flow}};
constexpr std::pair<const char*, Scaler> kScalers[] = {
    {"sde", Scaler::sde}, {"sde_1", Scaler::sde_1}, {"sde_4", Scaler::sde_4}, {"sde_5", Scaler::sde_5}};
constexpr std::pair<const char*, Method> kMethods[] = {{"taylor", Method::taylor}, {"newton", Method::newton}};
#endif

struct PlanArgs {
  int64_t num_steps;
  const void* sigmas;  // [num_steps + 1]
  DType sigmas_dtype;
  const void* alphas;  // the same, or nullptr
  DType alphas_dtype;
  Process process;
  int order;              // the largest
  const int32_t* orders;  // [num_steps], or nullptr where all are alike
  Scaler scaler;
  double strength;     // the scaler's own times eta, where that is one number
  const double* etas;  // [num_steps], or nullptr where it is
  Method method;
  double node_scale;
  int integration_points;  // 0: exact
  double s_noise;
  double guidance;  // at least 0: chooses order and node_scale of each step, instead of those above
  uint32_t first_step;
  double* table;     // [num_steps, kWD + order]
  double* schedule;  // [3, num_steps + 1]: sigmas, alphas, er_lambdas
};

namespace {

constexpr double kEps = 2.220446049250313e-16;

struct Level {
  double sigma, alpha, l;
};

ERSDE_PLAN_FN double number(const void* p, DType t, int64_t i) {
  if (t == DType::float64) return static_cast<const double*>(p)[i];
  if (t == DType::float32) return (double)static_cast<const float*>(p)[i];
  return (double)NAN;
}

// Four ulps of a number's own precision, relative: float32's where that holds the number, whatever carries it here.
ERSDE_PLAN_FN double rounding(double v) { return 4 * ((double)(float)v == v ? 0x1p-23 : kEps); }

// A level from 0 to `largest` where rounding alone put it outside.
ERSDE_PLAN_FN double bounded(double v, double largest) {
  if (v < 0 && v >= -rounding(v)) return 0;
  return v > largest && v <= largest + rounding(v) ? largest : v;
}

// A level of the schedule; NaN where it is none.
ERSDE_PLAN_FN Level level_of(const PlanArgs& a, int64_t i) {
  const double largest = a.process == Process::vp || a.process == Process::flow ? 1 : (double)INFINITY;
  Level v{bounded(number(a.sigmas, a.sigmas_dtype, i), largest), (double)NAN, 0};
  switch (a.process) {
    case Process::given: v.alpha = bounded(number(a.alphas, a.alphas_dtype, i), (double)INFINITY); break;
    case Process::ve: v.alpha = 1; break;
    case Process::vp: v.alpha = sqrt((1 - v.sigma) * (1 + v.sigma)); break;
    case Process::flow: v.alpha = 1 - v.sigma; break;
  }
  const bool fits = v.sigma >= 0 && v.alpha >= 0 && v.sigma + v.alpha < (double)INFINITY && v.sigma + v.alpha > 0;
  v.l = fits ? v.sigma / v.alpha : (double)NAN;
  return v;
}

// Whether t is the level s again, up to rounding.
ERSDE_PLAN_FN bool repeats(const PlanArgs& a, const Level& s, const Level& t) {
  const auto close = [](double v, double w) { return fabs(v - w) <= fmin(rounding(v), rounding(w)) * v; };
  if (!(s.l >= 0 && t.l >= 0)) return false;  // NaN
  return close(s.sigma, t.sigma) && (a.process != Process::given || close(s.alpha, t.alpha));
}

// log(a / b) for a >= b > 0, to full relative precision where they are close.
ERSDE_PLAN_FN double log_ratio(double a, double b) { return a < 2 * b ? log1p((a - b) / b) : log(a) - log(b); }

// Growth of log(phi(l) / l) from l to l exp(y): noise_scaler.py, in the same forms.
ERSDE_PLAN_FN double full_growth(Scaler scaler, double l, double y) {
  switch (scaler) {
    case Scaler::sde: return y;
    case Scaler::sde_1: {
      const double inverse = 1 / l;
      return log1p(-exp(-inverse * exp(-y)) * expm1(inverse * expm1(-y)) / (exp(-inverse) + 10));
    }
    case Scaler::sde_4: {
      const double v = 100 * pow(l, 1.5);
      return log1p(log1p(v / (1 + v) * expm1(1.5 * y)) / log1p(v)) - 0.1 * y;
    }
    case Scaler::sde_5: {
      const double power = pow(l, 0.3), growth = power * expm1(0.3 * y);
      if (growth < 1) return log1p(expm1(growth) / (1 + 10 * exp(-power)));
      return growth + log1p(10 * exp(-power - growth)) - log1p(10 * exp(-power));
    }
  }
  return (double)NAN;
}

// The scaler of a step at its strength, where 0 is the ODE, of an infinite distance too.
struct Psi {
  Scaler scaler;
  double strength;
  ERSDE_PLAN_FN double log_growth(double l, double y) const { return strength == 0 ? 0 : strength * full_growth(scaler, l, y); }
};
ERSDE_PLAN_FN Psi psi_of_step(const PlanArgs& a, int64_t i) { return {a.scaler, a.etas ? a.strength * a.etas[i] : a.strength}; }

struct Choice {
  int order;
  double node_scale;
};

// The order and node_scale of step i, from l_s to l_t; choice.py says why.
ERSDE_PLAN_FN Choice choice_of_step(const PlanArgs& a, int64_t i, double l_s, double l_t) {
  if (!(a.guidance >= 0)) return {a.orders ? a.orders[i] : a.order, a.node_scale};
  return l_s > 1 && a.guidance >= 2 ? Choice{2, 4 * a.guidance * l_s / l_t} : Choice{3, 10};
}

// u(a) - u(b) for u(l) = l / (1 + l / scale), without cancellation.
ERSDE_PLAN_FN double u_difference(double a, double b, double scale) {
  if (std::isinf(scale)) return a - b;
  if (std::isinf(b)) return -scale / (1 + a / scale);
  if (std::isinf(a)) return scale / (1 + b / scale);
  return (a - b) / ((1 + a / scale) * (1 + b / scale));
}

// Gauss-Legendre nodes and weights of 16 points on [-1, 1], the upper half.
ERSDE_PLAN_FN void gauss_point(int i, double& x, double& w) {
  const double nodes[8] = {0.09501250983763744, 0.2816035507792589, 0.45801677765722737, 0.6178762444026438,
                           0.755404408355003,   0.8656312023878318, 0.9445750230732326,  0.9894009349916499};
  const double weights[8] = {0.1894506104550685,  0.18260341504492358, 0.16915651939500254, 0.14959598881657674,
                             0.12462897125553388, 0.09515851168249279, 0.062253523938647894, 0.027152459411754096};
  x = i < 8 ? -nodes[7 - i] : nodes[i - 8];
  w = weights[i < 8 ? 7 - i : i - 8];
}

// The points of `integral from l_t to l_s of (1 - phi_t / phi(l)) f(l) dl`: f(l, weight) for those of this lane.
template <typename Lanes, typename F>
ERSDE_PLAN_FN void for_each_point(const PlanArgs& a, const Psi& psi, double l_s, double l_t, double node_scale,
                                  const Lanes& lanes, const F& f) {
  if (a.integration_points) {
    // Existing samplers sum only the 1 / phi part, from the left; the rest two nodes integrate exactly for linear functions.
    const double h = (l_s - l_t) / a.integration_points;
    if (lanes.index() == 0) {
      f(l_t, (l_s - l_t) / 2);
      f(l_s, (l_s - l_t) / 2);
    }
    for (int k = lanes.index(); k < a.integration_points; k += lanes.count()) {
      const double l = l_t + h * k, y = log_ratio(l, l_t);
      f(l, -h * exp(-(y + psi.log_growth(l_t, y))));
    }
    return;
  }
  double reach = log_ratio(l_s, l_t);
  if (!std::isinf(node_scale)) reach = fmin(reach, log(1e17) + log(fmax(l_t, node_scale)) - log(l_t));
  const int panels = (int)fmax(ceil(reach / 2), 1.0);
  const double width = reach / panels;
  for (int p = lanes.index(); p < 16 * panels; p += lanes.count()) {
    double x, w;
    gauss_point(p % 16, x, w);
    const double y = width * (p / 16 + (1 + x) / 2), l = l_t * exp(y);
    f(l, -expm1(-(y + psi.log_growth(l_t, y))) * l * width / 2 * w);
  }
}

// The paper's rule, less the order-1 term, into d[0 ... n - 1].
template <typename Lanes>
ERSDE_PLAN_FN void taylor(const PlanArgs& a, const Psi& psi, const double* nodes, int n, double l_t, const Lanes& lanes,
                          double* d) {
  const double l_s = nodes[0];
  double c_1 = 0, c_2 = 0;
  for_each_point(a, psi, l_s, l_t, a.node_scale, lanes, [&](double l, double w) {
    c_1 -= w;
    c_2 -= w * (l - l_s);
  });
  c_1 = lanes.sum(c_1);
  c_2 = lanes.sum(c_2);
  const double g_1 = l_s - nodes[1], k = c_1 / g_1;
  d[0] = k;
  d[1] = -k;
  if (n == 2) return;
  const double g_2 = nodes[1] - nodes[2], e = 2 * c_2 / (g_1 + g_2);
  d[0] = k + e / g_1;
  d[1] = -(k + e * (1 / g_1 + 1 / g_2));
  d[2] = e / g_2;
}

// Less the order-1 term: -integral of (1 - phi_t / phi) dL_j(u(l)) for every Lagrange basis polynomial L_j on the nodes.
template <typename Lanes>
ERSDE_PLAN_FN void newton(const PlanArgs& a, const Psi& psi, const double* nodes, int n, double l_t, double node_scale,
                          const Lanes& lanes, double* d) {
  for (int j = 0; j < n; ++j) d[j] = 0;
  for_each_point(a, psi, nodes[0], l_t, node_scale, lanes, [&](double l, double w) {
    const double slope = 1 + l / node_scale;
    double from[kMaxPredictions];
    for (int k = 0; k < n; ++k) from[k] = u_difference(l, nodes[k], node_scale);
    for (int j = 0; j < n; ++j) {
      double derivative = 0;
      for (int m = 0; m < n; ++m) {
        if (m == j) continue;
        double product = 1;
        for (int k = 0; k < n; ++k) product *= k == j || k == m ? 1 : from[k];
        derivative += product;
      }
      d[j] -= w * derivative / (slope * slope);
    }
  });
  for (int j = 0; j < n; ++j) {
    double denominator = 1;
    for (int k = 0; k < n; ++k) denominator *= k == j ? 1 : u_difference(nodes[j], nodes[k], node_scale);
    d[j] = lanes.sum(d[j]) / denominator;
  }
}

// The weights of step i into a row of zeros; false where the host would refuse the step.
template <typename Lanes>
ERSDE_PLAN_FN bool weights_of_step(const PlanArgs& a, int64_t i, const Lanes& lanes, double* row) {
  const Level s = level_of(a, i), t = level_of(a, i + 1);
  const Psi psi = psi_of_step(a, i);
  if (a.etas && !(a.etas[i] >= 0 && a.etas[i] < (double)INFINITY)) return false;
  double* w_d = row + kWD;
  if (repeats(a, s, t) || s.l == t.l) {
    row[kWX] = repeats(a, s, t) ? 1 : s.alpha > 0 ? t.alpha / s.alpha : t.sigma / s.sigma;
    return true;
  }
  if (!(t.l < s.l)) return false;
  if (t.l == 0) {
    w_d[0] = t.alpha;
    return true;
  }
  if (std::isinf(s.l) && psi.scaler == Scaler::sde_4 && psi.strength != 0) return false;
  const double distance = log_ratio(s.l, t.l);
  double log_rho = -psi.log_growth(t.l, distance);
  if (!(log_rho <= 8 * kEps)) return false;
  if (log_rho >= -8 * kEps) log_rho = 0;
  row[kWX] = t.sigma / s.sigma * exp(log_rho);
  row[kWNoise] = a.s_noise * t.sigma * sqrt(fabs(expm1(2 * log_rho)));
  const double total = -t.alpha * expm1(log_rho - distance);
  w_d[0] = total;

  double nodes[kMaxPredictions], d[kMaxPredictions];
  Level newer = t;
  int slots[kMaxPredictions], n = 0;
  const Choice choice = choice_of_step(a, i, s.l, t.l);
  for (int slot = 0; slot < choice.order && slot <= i; ++slot) {  // of repeated nodes the newest counts
    const Level v = level_of(a, i - slot);
    const bool again = repeats(a, v, newer) || v.l == newer.l;
    if (!again && !(v.l > newer.l)) return false;
    if (slot == 0 || (!again && (!std::isinf(v.l) || !std::isinf(choice.node_scale)))) {
      nodes[n] = v.l;
      slots[n++] = slot;
    }
    newer = v;
  }
  if (n > 1) {
    switch (a.method) {
      case Method::taylor: taylor(a, psi, nodes, n, t.l, lanes, d); break;
      case Method::newton: newton(a, psi, nodes, n, t.l, choice.node_scale, lanes, d); break;
    }
    for (int j = 0; j < n; ++j) w_d[slots[j]] += t.alpha * d[j];
  }
  double sum = 0, size = 0;
  for (int j = 0; j < a.order; ++j) {
    sum += w_d[j];
    size += fabs(w_d[j]);
  }
  return fabs(sum - total) <= 1e-10 * size && std::isfinite(row[kWX]) && std::isfinite(size) && std::isfinite(row[kWNoise]);
}

// Row i of the table and level i of the schedule; with the last row also the last level. The first lane writes.
template <typename Lanes>
ERSDE_PLAN_FN void plan_row(const PlanArgs& a, int64_t i, const Lanes& lanes) {
  double row[kMaxColumns] = {};
  const bool fits = weights_of_step(a, i, lanes, row);
  if (lanes.index() != 0) return;
  row[kCounter] = (double)(a.first_step + (uint32_t)i);
  row[kPM] = 1;  // of a prediction itself; table.py puts other types in
  double* out = a.table + i * (kWD + a.order);
  for (int c = 0; c < kWD + a.order; ++c) out[c] = fits || c < kWNoise ? row[c] : (double)NAN;
  for (int64_t k = i; k <= i + (i == a.num_steps - 1); ++k) {
    const Level at = level_of(a, k);
    a.schedule[k] = at.sigma;
    a.schedule[a.num_steps + 1 + k] = at.alpha;
    a.schedule[2 * (a.num_steps + 1) + k] = at.l;
  }
}

struct OneLane {
  ERSDE_PLAN_FN int index() const { return 0; }
  ERSDE_PLAN_FN int count() const { return 1; }
  ERSDE_PLAN_FN double sum(double v) const { return v; }
};

}  // namespace

void plan_cpu(const PlanArgs& args);

// The whole plan on the current CUDA device; nullptr, or what the launch said. `stream` is a cudaStream_t.
const char* plan_cuda(const PlanArgs& args, void* stream);

}  // namespace ersde
