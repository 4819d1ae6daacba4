// What the vectorised kernels of er_sde_step.cu are told. Included where er_sde_rows.h is, after it.

constexpr int kThreads = 256;

// What step_vectors needs of StepArgs.
struct VectorArgs {
  const void* terms[kMaxTerms];
  const void* guide;
  void *denoised, *out;
  int64_t size;                      // of one sample; of the whole tensor where samples do not differ
  Coefficients<float> coefficients;  // of every sample, where the host knows them
  Rows rows;
  Drawn drawn;
};
