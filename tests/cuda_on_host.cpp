// The CUDA kernel as a C++ library with one plain entry, for cuda_on_host_cases.py.
#include "../csrc/er_sde_step.cu"

using namespace ersde;

// Operand k has dtypes[k], data[k] and strides[k ndim ...] in bytes; the last operand is out, the first num_terms are terms.
extern "C" void run_step(int ndim, const int64_t* sizes, int num_terms, void* const* data, const int32_t* dtypes,
                         const int64_t* strides, const double* weights, int noise, double w_noise, const double* table,
                         const int64_t* row, const int64_t* position_strides, int64_t first_position, const int64_t* seeds,
                         uint64_t seed, uint32_t step, int64_t torch_threads, uint64_t torch_offset, int multiprocessors) {
  StepArgs a{};
  a.ndim = ndim;
  a.numel = 1;
  for (int d = 0; d < ndim; ++d) {
    a.sizes[d] = sizes[d];
    a.position_strides[d] = position_strides[d];
    a.numel *= sizes[d];
  }
  a.num_terms = num_terms;
  for (int k = 0; k <= num_terms; ++k) {
    Operand& o = k < num_terms ? a.terms[k] : a.out;
    o.data = static_cast<char*>(data[k]);
    o.dtype = static_cast<DType>(dtypes[k]);
    a.float64 |= o.dtype == DType::float64;
    for (int d = 0; d < ndim; ++d) o.strides[d] = strides[k * ndim + d];
    if (k < num_terms) {
      a.weights[k] = weights[k];
      a.columns[k] = k;
    }
  }
  a.table = table;
  a.row = row;
  a.num_columns = num_terms + 1;
  a.noise = static_cast<Noise>(noise);
  a.w_noise = w_noise;
  a.first_position = first_position;
  a.seeds = seeds;
  a.seed = seed;
  a.step = step;
  a.torch_threads = torch_threads;
  a.torch_offset = torch_offset;
  if (a.numel) step_cuda(a, multiprocessors, nullptr);
}

extern "C" void run_box_muller(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
  for (int64_t i = 0; i < n; ++i) box_muller(a[i], b[i], z0[i], z1[i]);
}
