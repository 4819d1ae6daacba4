// What kernels are told beside StepArgs and LogProbArgs. Included where er_sde_rows.h is, after it.

constexpr int kThreads = 256;

// What step_vectors needs of StepArgs.
struct VectorArgs {
  const void* terms[kMaxTerms];
  const void* guide;
  void *denoised, *out;
  int64_t size;                      // of one row, which is a whole sample but of shards; of the whole tensor where samples do not differ
  unsigned rows_of_sample;
  int64_t first_group, groups_between_rows;  // of the portable stream: where a sample's rows begin in it
  Coefficients<float> coefficients;  // of every sample, where the host knows them
  Rows rows;
  Drawn drawn;
};

// What log_prob_vectors needs of LogProbArgs.
struct LogProbVectorArgs {
  VectorArgs step;
  Gaussian gaussian;  // of every sample, where the host knows it
  int num_terms;
  bool by_warps;  // whether a segment is a warp's, or a block's
  int64_t batch;
  const double* log_prob;  // what gradients are multiplied by
  double* sums;
  void* gradients[kMaxTerms + 2];
};

struct LogProbSumsArgs {
  Rows rows;
  Gaussian gaussian;
  const double* sums;
  double* log_prob;
  int64_t size;
  bool mean;
};
