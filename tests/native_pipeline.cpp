// The cluster's pipeline on host threads: blocks of several threads, a copy engine of its own per block that works when
// it likes, mbarriers with phases. Random shapes; built with thread sanitizer by test_native_cuda.py. A deadlock ends in
// the test's time limit, a wrong result or a race in exit code 1.
#include <atomic>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/cuda/pipeline.h"

using namespace rewardmap;

namespace {

constexpr int kThreads = 3;

// A transaction barrier: a phase ends when its copy has arrived. Waiting names the phase's parity, as on the GPU:
// a wait for parity p returns once the barrier's current phase has the other parity.
class Mbarrier {
 public:
  void complete() {
    std::lock_guard lock(mutex_);
    ++phase_;
    turned_.notify_all();
  }
  void wait(uint32_t parity) {
    std::unique_lock lock(mutex_);
    turned_.wait(lock, [&] { return (phase_ & 1) != parity; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable turned_;
  uint32_t phase_ = 0;
};

struct Problem {
  int cluster, clusters, vocab;
  int64_t rows;
  float factor;
  Objective objective;
  std::vector<float> logits, advantages, old_logprobs, ref_logprobs, logprobs, entropy;
  std::vector<int> targets;
};

struct Shared {  // of a block
  std::vector<float> stages[kStages];
  Mbarrier full[kStages];
  Partial slots[2][kMaxCluster], parts[kThreads];
  std::barrier<> threads{kThreads};
};

// Copies in order, in a thread of its own, after random delays; stores in groups that can be waited for.
class CopyEngine {
 public:
  explicit CopyEngine(unsigned seed) : random_(seed), thread_([this] { work(); }) {}
  ~CopyEngine() {
    push([] {}, true);
    thread_.join();
  }
  template <class F>
  void push(F job, bool last = false) {
    std::lock_guard lock(mutex_);
    jobs_.push_back({job, last});
    changed_.notify_all();
  }
  template <class F>
  void push_store(F job) {
    {
      std::lock_guard lock(mutex_);
      ++stores_begun_;
    }
    push([this, job] {
      job();
      std::lock_guard lock(mutex_);
      ++stores_done_;
      changed_.notify_all();
    });
  }
  void wait_stores(int64_t left) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stores_begun_ - stores_done_ <= left; });
  }

 private:
  struct Job {
    std::function<void()> run;
    bool last;
  };
  void work() {
    for (;;) {
      Job job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !jobs_.empty(); });
        job = jobs_.front();
        jobs_.pop_front();
      }
      if (job.last) return;
      if (random_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 200));
      job.run();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  int64_t stores_begun_ = 0, stores_done_ = 0;
  std::minstd_rand random_;
  std::thread thread_;
};

struct Cluster {
  std::vector<std::unique_ptr<Shared>> blocks;
  std::vector<std::unique_ptr<CopyEngine>> loads, stores;  // on the GPU too, nothing orders a load after a store
  std::barrier<> barrier;
  explicit Cluster(const Problem& p, unsigned seed) : barrier(p.cluster * kThreads) {
    for (int b = 0; b < p.cluster; ++b) {
      blocks.push_back(std::make_unique<Shared>());
      for (auto& stage : blocks.back()->stages) stage.assign(p.vocab / p.cluster, NAN);
      loads.push_back(std::make_unique<CopyEngine>(seed + 2 * b));
      stores.push_back(std::make_unique<CopyEngine>(seed + 2 * b + 1));
    }
  }
};

struct Block {
  Problem& p;
  Cluster& cluster;
  int rank, thread;
  Shared& own() { return *cluster.blocks[rank]; }
  int part() const { return p.vocab / p.cluster; }
  float* row_part(int64_t row) { return p.logits.data() + row * p.vocab + rank * part(); }

  bool leader() const { return thread == 0; }
  void load(int stage, int64_t row) {
    cluster.loads[rank]->push([this, stage, from = row_part(row), to = &own()] {
      std::copy(from, from + to->stages[stage].size(), to->stages[stage].begin());
      to->full[stage].complete();
    });
  }
  void wait_loaded(int stage, uint32_t phase) { own().full[stage].wait(phase); }
  Partial reduce(int stage, int64_t row) {
    Partial mine = no_partial();
    for (int i = thread; i < part(); i += kThreads) {
      const float y = own().stages[stage][i] * p.factor;
      add(mine, y);
      if (rank * part() + i == p.targets[row]) mine.picked = y;
    }
    own().parts[thread] = mine;
    sync();
    Partial all = no_partial();
    if (leader())
      for (const Partial& each : own().parts) all = combine(all, each);
    return all;
  }
  void publish(int slot, const Partial& partial) {
    for (auto& block : cluster.blocks) block->slots[slot][rank] = partial;
  }
  void cluster_barrier() { cluster.barrier.arrive_and_wait(); }
  void finish(int stage, int slot, int64_t row) {
    Partial whole = no_partial();
    for (int b = 0; b < p.cluster; ++b) whole = combine(whole, own().slots[slot][b]);
    const RowInputs in{p.advantages[row], p.old_logprobs[row], p.ref_logprobs[row], 0.0f};
    const RowResult r = row_result(whole, p.objective, in, static_cast<float>(p.rows));
    for (int i = thread; i < part(); i += kThreads) {
      float& z = own().stages[stage][i];
      z = gradient_of(r, z * p.factor, p.factor, rank * part() + i == p.targets[row]);
    }
    if (rank == 0 && leader()) {
      p.logprobs[row] = r.logprob;
      p.entropy[row] = r.entropy;
    }
  }
  void sync() { own().threads.arrive_and_wait(); }
  void store(int stage, int64_t row) {
    cluster.stores[rank]->push_store([this, stage, to = row_part(row), from = &own()] {
      std::copy(from->stages[stage].begin(), from->stages[stage].end(), to);
    });
  }
  template <int left>
  void wait_stores_read() {
    cluster.stores[rank]->wait_stores(left);
  }
  void wait_stores_done() { cluster.stores[rank]->wait_stores(0); }
};

bool near(double got, double wanted, double scale) { return std::fabs(got - wanted) <= 2e-5 * scale + 2e-7; }

// The definition in double precision, one row after the other.
bool equals_definition(const Problem& p, const std::vector<float>& logits) {
  for (int64_t n = 0; n < p.rows; ++n) {
    double top = -INFINITY, total = 0.0, entropy = 0.0;
    std::vector<double> y(p.vocab);
    for (int v = 0; v < p.vocab; ++v) top = std::max(top, y[v] = static_cast<double>(logits[n * p.vocab + v]) * p.factor);
    for (const double each : y) total += std::exp(each - top);
    for (double& each : y) each -= top + std::log(total);
    for (const double each : y) entropy -= std::exp(each) > 0 ? std::exp(each) * each : 0.0;
    const double logprob = y[p.targets[n]];
    if (!near(p.logprobs[n], logprob, std::fabs(logprob)) || !near(p.entropy[n], entropy, 1.0)) return false;
    const RowInputs in{p.advantages[n], p.old_logprobs[n], p.ref_logprobs[n], 0.0f};
    const double c = coefficient(p.objective, static_cast<float>(logprob), in) / static_cast<double>(p.rows);
    const double e = -p.objective.entropy_coef / static_cast<double>(p.rows);
    for (int v = 0; v < p.vocab; ++v) {
      const double prob = std::exp(y[v]), bent = prob > 0 ? prob * (y[v] + entropy) : 0.0;
      const double wanted = p.factor * (c * ((v == p.targets[n] ? 1.0 : 0.0) - prob) - e * bent);
      if (!near(p.logits[n * p.vocab + v], wanted, std::fabs(c) + std::fabs(e))) return false;
    }
  }
  return true;
}

bool run(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p{};
  p.cluster = 1 + seed % kMaxCluster;
  p.clusters = 1 + random() % 3;
  p.vocab = p.cluster * (1 + random() % 24);
  p.rows = random() % 14;  // none, fewer than clusters, fewer and more than stages
  p.factor = 1.0f / (0.5f + 0.25f * (random() % 4));
  p.objective.kind = static_cast<Kind>(random() % 4);
  p.objective.kl = static_cast<Kl>(random() % 4);
  p.objective.has_old = true;
  p.objective.clip_low = 0.8f;
  p.objective.clip_high = 1.2f;
  p.objective.kl_coef = 0.1f;
  p.objective.entropy_coef = random() % 2 ? 0.01f : 0.0f;
  p.objective.tau_positive = p.objective.tau_negative = 1.0f;
  for (int64_t i = 0; i < p.rows * p.vocab; ++i) p.logits.push_back(3.0f * normal(random));
  for (int64_t n = 0; n < p.rows; ++n) {
    p.targets.push_back(random() % p.vocab);
    p.advantages.push_back(normal(random));
    p.old_logprobs.push_back(-3.0f + 0.1f * normal(random));
    p.ref_logprobs.push_back(-3.0f + 0.1f * normal(random));
    for (int v = 0; v < p.vocab; v += 5)
      if (n % 3 == 0 && v != p.targets[n]) p.logits[n * p.vocab + v] = -INFINITY;
  }
  p.logprobs.assign(p.rows, NAN);
  p.entropy.assign(p.rows, NAN);
  const std::vector<float> given = p.logits;
  {
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::thread> threads;
    for (int c = 0; c < p.clusters; ++c) {
      clusters.push_back(std::make_unique<Cluster>(p, seed + 100 * c));
      for (int rank = 0; rank < p.cluster; ++rank)
        for (int t = 0; t < kThreads; ++t)
          threads.emplace_back([&p, &cluster = *clusters.back(), c, rank, t] {
            Block block{p, cluster, rank, t};
            run_pipeline(Schedule{p.rows, c, p.clusters}, block);
          });
    }
    for (std::thread& each : threads) each.join();
  }
  if (equals_definition(p, given)) return true;
  std::printf("seed %u: cluster %d x %d, V %d, N %lld differs from the definition\n", seed, p.cluster, p.clusters,
              p.vocab, static_cast<long long>(p.rows));
  return false;
}

}  // namespace

int main(int count, char** values) {
  const unsigned seeds = count > 1 ? std::strtoul(values[1], nullptr, 10) : 64;
  for (unsigned seed = 0; seed < seeds; ++seed)
    if (!run(seed)) return 1;
  std::printf("%u shapes equal the definition\n", seeds);
}
