// The kernels' C interface, for callers that know no C++ and no torch: backends/library.py by ctypes, the C program of the tests.
//
// A step is an array of int64 words: `ersde_call` below, then the sizes of x, then (where `sharded`) shape and start of the whole
// sample without its batch, then the tensors. What changes here changes ERSDE_C_VERSION.
#pragma once
#include <stdint.h>

#define ERSDE_C_VERSION 2

#if defined(_WIN32)
#define ERSDE_API __declspec(dllexport)
#else
#define ERSDE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The columns of a row, behind which come the weights of the predictions.
enum ersde_column { ersde_counter, ersde_p_x, ersde_p_m, ersde_w_guide, ersde_w_noise, ersde_w_x, ersde_w_d };

// Everything is a word; addresses too, and what is absent is 0. See Rows and Drawn in er_sde_step.h.
struct ersde_call {
  int64_t dims;         // of x, below 12
  int64_t predictions;  // tensors of the history; with a ring 1
  int64_t guided, has_noise, predicts;  // whether there are a guide, a noise tensor and the prediction to be written
  int64_t cfg_pp;       // whether the row may weigh the guide too
  int64_t alone;        // whether x is a term though its weight is 0: noise alone
  int64_t sharded;
  int64_t row;          // of the table, on the host; or 0, and where samples find theirs:
  int64_t step;         // of that row, or -1
  int64_t table, columns, num_plans, num_steps, plan_index, step_index, index_stride;
  int64_t scales;       // float64 [batch], or 0
  int64_t ring, ring_stride;  // slots, bytes between them
  int64_t source;       // of drawn noise: 0 none, 1 portable, 2 torch's on CUDA
  int64_t seeds, seed, torch_threads, torch_offset;
  int64_t density;      // 0 none; the log-density 1 with the step, 2 of a next sample that is given, 3 its gradients
  int64_t mean;         // over the elements of a sample; or their sum
  int64_t log_prob;     // float64 [batch] to write; where gradients are wanted, what they are multiplied by
  int64_t sums;         // float64 [batch ersde_segments(elements of a sample)], for the kernels' own use
  int64_t wanted;       // gradients: bit 0 with respect to x, 1 + k to prediction k, ersde_of_guide to the guide, ersde_of_next to the next sample
};
// Each tensor is its address, its dtype (0 float32, 1 float64, 2 bfloat16, 3 float16) and its strides in elements. In this order:
// x, the history, the guide, the noise, the prediction (with a ring its first slot), the next sample, the gradients by their bits.
enum { ersde_of_guide = 8, ersde_of_next = 9 };

// What a step answers, where it is not 0.
enum ersde_answer {
  ersde_not_plain = 1,     // the call cannot be; nothing was written
  ersde_needs_kernel = 2,  // ersde_device.wanted is not loaded
  ersde_failed = 3,        // the driver refused the launch: ersde_device.error
  ersde_no_process = 4,    // what a plan's name or number is not known of
  ersde_no_scaler = 5,
  ersde_no_method = 6,
  ersde_no_order = 7,
};

// A CUDA device, for launches through its driver: what is loaded of its kernels.
enum { ersde_kernels = 164 };
struct ersde_device {
  void *launch, *capture_info;     // the driver's cuLaunchKernelEx and cuStreamGetCaptureInfo_v3
  int64_t index, multiprocessors, early;  // early: whether kernels may start while the one before ends
  int64_t wanted, error;
  void* kernels[ersde_kernels];    // CUfunction, by the numbers of ersde_kernel_name
};

ERSDE_API int ersde_version(void);

// Elements [begin, end) of a step on the CPU, in row-major order; an end below 0 is all. Threads may share out a call. With a density
// they are segments, of all samples one after another, and behind all of them ersde_log_prob_sums is called.
ERSDE_API int ersde_step(const int64_t* call, double scale, int64_t begin, int64_t end);
ERSDE_API int ersde_log_prob_sums(const int64_t* call, double scale);
ERSDE_API int64_t ersde_segments(int64_t size);

// The step on a CUDA device, whose context is current.
ERSDE_API int ersde_step_cuda(const int64_t* call, double scale, struct ersde_device* device, void* stream);

// The same for tensors that are Python's objects, which `api`, a DLPackExchangeAPI (DLPack 1), says all of. Behind the words of
// ersde_call, whose dims are not read, comes then the address of each object, and behind them the whole sample. Who calls holds the
// interpreter's lock. `words` takes the call that the functions above read, of at most ersde_most_words.
enum { ersde_most_words = 512 };
ERSDE_API int ersde_words(const int64_t* objects, const void* api, int64_t* words);
ERSDE_API int ersde_step_objects(const int64_t* objects, double scale, const void* api);
ERSDE_API int ersde_step_objects_cuda(const int64_t* objects, double scale, const void* api, struct ersde_device* device);

// The expression in C++ that names a kernel; the empty one where there is none.
ERSDE_API const char* ersde_kernel_name(int kernel);

// A plan's table and schedule, as PlanArgs of er_sde_plan.h; dtypes as above, names as Python's.
struct ersde_plan_call {
  int64_t num_steps, order, first_step, integration_points;
  const void *sigmas, *alphas;
  int64_t sigmas_dtype, alphas_dtype;
  const int32_t* orders;
  const double* etas;
  const char *process, *scaler, *method;
  double strength, node_scale, s_noise, guidance;
  double *table, *schedule;
};
ERSDE_API int ersde_plan(const struct ersde_plan_call* plan);
ERSDE_API int ersde_plan_cuda(const struct ersde_plan_call* plan, struct ersde_device* device, void* stream);

// Threads that torch.randn runs for n elements on a card, and how far it advances its generator's offset; the words of a call.
ERSDE_API int64_t ersde_torch_threads(int64_t n, int64_t multiprocessors, int64_t threads_each);
ERSDE_API int64_t ersde_torch_advance(int64_t n, int64_t threads, int64_t dtype);

// What torch.randn draws on a CUDA device, elements [first, first + n), as torch_noise_cpu of er_sde_step.h.
ERSDE_API void ersde_torch_noise(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n);

ERSDE_API void ersde_box_muller(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n);
ERSDE_API const char* ersde_instruction_set(void);
ERSDE_API int ersde_use_instruction_set(int set);

#ifdef __cplusplus
}
#endif
