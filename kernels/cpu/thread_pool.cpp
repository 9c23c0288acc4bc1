#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace flashmoe {
namespace {

// How long a helper looks for the next job before it sleeps. Waking a sleeper takes 5 to 50 microseconds here; the
// Python code between two native calls of a layer takes about 20 (docs/kernels.md).
constexpr std::chrono::microseconds kSpin{30};

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : stretches_(size_t(threads)) {
  for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { help(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::run_job(int64_t items, Function function, const void* context) {
  if (items <= 1 || helpers_.empty()) {
    for (int64_t i = 0; i < items; i++) function(context, i);
    return;
  }
  function_ = function, context_ = context;
  const int64_t n = threads();
  for (int64_t i = 0; i < n; i++) {
    stretches_[size_t(i)].next.store(items * i / n);
    stretches_[size_t(i)].end = items * (i + 1) / n;
  }
  epoch_.fetch_add(1);  // odd: open
  if (sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep has either seen the epoch or waits
    wake_.notify_all();
  }
  take_items(0);
  epoch_.fetch_add(1);  // even: closed; who comes now leaves again at once
  for (int spins = 0; inside_.load() != 0; spins++) {
    if (spins < 2000) relax();
    else std::this_thread::yield();  // a helper was taken off its processor in the middle of an item
  }
}

void ThreadPool::take_items(int thread) {
  const size_t n = stretches_.size();
  for (size_t i = 0; i < n; i++) {
    Stretch& stretch = stretches_[(size_t(thread) + i) % n];
    for (int64_t item; (item = stretch.next.fetch_add(1)) < stretch.end;) function_(context_, item);
  }
}

void ThreadPool::help(int thread) {
  uint64_t seen = 0;
  while (wait_for_job(seen)) {
    inside_.fetch_add(1);
    const uint64_t epoch = epoch_.load();
    if (epoch % 2 == 1) take_items(thread);
    inside_.fetch_sub(1);
    seen = epoch;
  }
}

// False when the pool ends.
bool ThreadPool::wait_for_job(uint64_t seen) {
  const auto is_new = [&] {
    const uint64_t epoch = epoch_.load();
    return epoch % 2 == 1 && epoch != seen;
  };
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 32; i++) {
      if (is_new()) return true;
      relax();
    }
    if (stop_.load()) return false;
  } while (std::chrono::steady_clock::now() - begin < kSpin);
  std::unique_lock<std::mutex> lock(mutex_);
  sleeping_.fetch_add(1);
  wake_.wait(lock, [&] { return stop_.load() || is_new(); });
  sleeping_.fetch_sub(1);
  return !stop_.load();
}

}  // namespace flashmoe
