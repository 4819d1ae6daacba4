// The library of kernels without Python and torch, for machines that are emulated: reads calls, one a line, and prints bits in
// hexadecimal, one line for each. `kernels_program LIBRARY`:
//
//   set K                                      the K-th instruction set; prints its name, or -
//   noise SEED STEP SAMPLE FIRST N             N normals of the portable stream, float32
//   pair A B                                   two normals of two words
//   plan STEPS ORDER POINTS SCALER STRENGTH METHOD NODE_SCALE S_NOISE SIGMA... ALPHA...   the table, float64
//   step DTYPE PREDICTIONS SEED N W... X... HISTORY... NOISE...  the next sample; W are the columns of the table's row, a SEED
//                                              other than - takes the place of NOISE; DTYPE is of X and of the result, too
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../csrc/er_sde_c.h"

#ifdef _WIN32
#include <windows.h>
static void* function_of(void* library, const char* name) { return (void*)GetProcAddress((HMODULE)library, name); }
static void* open_library(const char* path) { return (void*)LoadLibraryA(path); }
#else
#include <dlfcn.h>
static void* function_of(void* library, const char* name) { return dlsym(library, name); }
static void* open_library(const char* path) { return dlopen(path, RTLD_NOW); }
#endif

enum { most = 1 << 14, columns_most = 16 };
static const int sizes[] = {4, 8, 2, 2};  // of the dtypes

static void word(char* into) {
  if (scanf("%63s", into) != 1) exit(3);
}
static int64_t integer(void) {
  char text[64];
  word(text);
  return (int64_t)strtoull(text, NULL, 0);
}
static double real(void) {
  char text[64];
  word(text);
  return strtod(text, NULL);
}
static void read_bits(char* into, int64_t n, int size) {
  char text[64];
  for (int64_t k = 0; k < n; ++k) {
    word(text);
    const uint64_t bits = strtoull(text, NULL, 16);
    memcpy(into + k * size, &bits, size);
  }
}
static void print_bits(const char* from, int64_t n, int size) {
  for (int64_t k = 0; k < n; ++k) {
    uint64_t bits = 0;
    memcpy(&bits, from + k * size, size);
    printf("%s%0*" PRIx64, k ? " " : "", 2 * size, bits);
  }
  printf("\n");
}

// The words of a call: its head, sizes [1, n], the whole sample and where x starts in it, then tensors.
struct call {
  struct ersde_call head;
  int64_t words[64];
  int count;
};
static void add_tensor(struct call* c, const void* data, int64_t dtype, int64_t n) {
  const int64_t words[] = {(int64_t)(intptr_t)data, dtype, n, 1};
  memcpy(c->words + c->count, words, sizeof words);
  c->count += 4;
}
static struct call call_of(int64_t n, int64_t first, const double* row, int64_t columns) {
  struct call c = {{0}, {1, n, first + n, first}, 4};
  c.head.dims = 2;
  c.head.sharded = 1;
  c.head.row = (int64_t)(intptr_t)row;
  c.head.step = -1;
  c.head.columns = columns;
  c.head.num_plans = c.head.num_steps = 1;
  return c;
}

static char buffers[8][most * 8], result[most * 8];

int main(int argc, char** argv) {
  void* library = argc == 2 ? open_library(argv[1]) : NULL;
  if (!library) return fprintf(stderr, "%s does not load\n", argc == 2 ? argv[1] : "no library"), 2;
#define TAKE(name) __typeof__(&ersde_##name) name = (__typeof__(&ersde_##name))function_of(library, "ersde_" #name)
  TAKE(version);
  TAKE(step);
  TAKE(plan);
  TAKE(box_muller);
  TAKE(instruction_set);
  TAKE(use_instruction_set);
  if (version() != ERSDE_C_VERSION) return 2;

  char what[64];
  double row[columns_most];
  while (scanf("%63s", what) == 1) {
    int answer = 0;
    if (!strcmp(what, "set")) {
      printf("%s\n", use_instruction_set((int)integer()) ? instruction_set() : "-");
    } else if (!strcmp(what, "pair")) {
      uint32_t words[2];
      float normals[2];
      for (int k = 0; k < 2; ++k) words[k] = (uint32_t)integer();
      box_muller(words, words + 1, normals, normals + 1, 1);
      print_bits((char*)normals, 2, 4);
    } else if (!strcmp(what, "noise")) {
      const int64_t seed = integer(), step_number = integer(), sample = integer(), first = integer(), n = integer();
      const int64_t seeds[] = {seed, sample};
      const double nothing[ersde_w_d] = {[ersde_counter] = (double)step_number, [ersde_w_noise] = 1};
      struct call c = call_of(n, first, nothing, ersde_w_d);
      c.head.alone = 1;
      c.head.source = 1;
      c.head.seeds = (int64_t)(intptr_t)seeds;
      add_tensor(&c, result, 0, n);
      add_tensor(&c, result, 0, n);
      answer = step((int64_t*)&c, 0, 0, -1);
      print_bits(result, n, 4);
    } else if (!strcmp(what, "step")) {
      const int64_t dtype = integer(), predictions = integer();
      char seed[64];
      word(seed);
      const int64_t n = integer(), columns = ersde_w_d + predictions;
      for (int64_t k = 0; k < columns; ++k) row[k] = real();
      struct call c = call_of(n, 0, row, columns);
      c.head.predictions = predictions;
      c.head.has_noise = seed[0] == '-';
      c.head.source = seed[0] != '-';
      c.head.seed = (int64_t)strtoull(seed, NULL, 0);
      for (int64_t k = 0; k < 1 + predictions + c.head.has_noise; ++k) {
        read_bits(buffers[k], n, sizes[dtype]);
        add_tensor(&c, buffers[k], dtype, n);
      }
      add_tensor(&c, result, dtype, n);
      answer = step((int64_t*)&c, 0, 0, -1);
      print_bits(result, n, sizes[dtype]);
    } else if (!strcmp(what, "plan")) {
      static double levels[2][most], schedule[3 * most];
      char scaler[64], method[64];
      struct ersde_plan_call c = {0};
      c.num_steps = integer();
      c.order = integer();
      c.integration_points = integer();
      word(scaler);
      c.strength = real();
      word(method);
      c.node_scale = real();
      c.s_noise = real();
      for (int k = 0; k < 2; ++k) {
        for (int64_t i = 0; i <= c.num_steps; ++i) levels[k][i] = real();
      }
      c.sigmas = levels[0];
      c.alphas = levels[1];
      c.sigmas_dtype = c.alphas_dtype = 1;
      c.process = "";
      c.scaler = scaler;
      c.method = method;
      c.guidance = -1;
      c.table = (double*)result;
      c.schedule = schedule;
      answer = plan(&c);
      print_bits(result, c.num_steps * (ersde_w_d + c.order), 8);
    } else {
      return fprintf(stderr, "no call: %s\n", what), 3;
    }
    if (answer) return fprintf(stderr, "%s was refused: %d\n", what, answer), 1;
  }
  return 0;
}
