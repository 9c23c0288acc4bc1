// Plain reading by a number of threads, as fast as they can: what scripts/bench_kernels.py holds the kernels against.
// Compiled there with -O3 -march=native -pthread.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { kStep = 256, kPart = 1 << 18, kMostThreads = 256 };

typedef uint64_t line_t __attribute__((vector_size(64), aligned(1), may_alias));

struct job {
  const uint8_t* begin;
  int64_t bytes;
  _Atomic int64_t next;
  _Atomic uint64_t sum;
};

static uint64_t read_part(const uint8_t* p, int64_t bytes) {
  line_t sum[4] = {{0}, {0}, {0}, {0}};
  for (int64_t i = 0; i + kStep <= bytes; i += kStep) {
    for (int j = 0; j < 4; j++) __builtin_prefetch(p + i + 2048 + 64 * j);
    for (int j = 0; j < 4; j++) sum[j] += *(const line_t*)(p + i + 64 * j);
  }
  const line_t all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

static void* read_parts(void* argument) {
  struct job* job = argument;
  int64_t at;
  while ((at = atomic_fetch_add(&job->next, kPart)) < job->bytes)
    atomic_fetch_add(&job->sum, read_part(job->begin + at, job->bytes - at < kPart ? job->bytes - at : kPart));
  return 0;
}

uint64_t read_plain(const uint8_t* begin, int64_t bytes, int threads) {
  struct job job = {begin, bytes, 0, 0};
  pthread_t helpers[kMostThreads];
  int started = 0;
  while (started + 1 < threads && started < kMostThreads &&
         pthread_create(&helpers[started], 0, read_parts, &job) == 0)
    started++;
  read_parts(&job);
  for (int i = 0; i < started; i++) pthread_join(helpers[i], 0);
  return job.sum;
}
