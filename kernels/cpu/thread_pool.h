// A few threads that share out the items of one job after another.
//
// Each thread begins with a stretch of neighbouring items, so that what it prefetches is what it reads next, and helps
// with the others' when it is through: a thread that the system holds up does fewer. The caller works along. Between jobs
// the helpers look for the next one for a few microseconds, then sleep: nothing spins beside an idle program.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace flashmoe {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return int(helpers_.size()) + 1; }

  // work(item) for every item in [0, items), in any order and from any thread; returns when all are done.
  template <class Work>
  void run(int64_t items, const Work& work) {
    run_job(items, [](const void* context, int64_t item) { (*static_cast<const Work*>(context))(item); }, &work);
  }

 private:
  using Function = void (*)(const void* context, int64_t item);

  void run_job(int64_t items, Function function, const void* context);
  void help(int thread);
  void take_items(int thread);
  bool wait_for_job(uint64_t seen);

  // A job is open while the epoch is odd. Its fields change only while it is closed and no helper is inside.
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> inside_{0};
  struct alignas(64) Stretch {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Stretch> stretches_;  // one a thread
  Function function_ = nullptr;
  const void* context_ = nullptr;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace flashmoe
