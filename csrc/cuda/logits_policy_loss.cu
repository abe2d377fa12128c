// logits_policy_loss on Hopper: one read and one write of a row of bfloat16 logits that no single multiprocessor's
// shared memory holds. The blocks of a cluster share it; pipeline.h says in what order. Experimental: no GPU result yet.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernel_arguments.h"
#include "pipeline.h"

namespace rewardmap {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32, kVector = 8;  // bfloat16 values in 16 bytes

struct Control {
  alignas(8) uint64_t full[kStages];
  Partial slots[2][kMaxCluster], warps[kWarps];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ Partial from_lane(const Partial& p, int mask) {
  return {__shfl_xor_sync(~0u, p.top, mask), __shfl_xor_sync(~0u, p.total, mask), __shfl_xor_sync(~0u, p.moment, mask),
          __shfl_xor_sync(~0u, p.picked, mask)};
}

// The larger index comes second in every pair, so that both lanes add in one order.
__device__ __forceinline__ Partial warp_sum(Partial mine) {
  for (int mask = 1; mask < 32; mask *= 2) {
    const Partial other = from_lane(mine, mask);
    mine = (threadIdx.x & mask) ? combine(other, mine) : combine(mine, other);
  }
  return mine;
}

struct Block {
  const KernelArguments& a;
  char* stages;
  Control* control;
  int part;     // elements of a row in this block
  int64_t begin;  // their first column
  uint32_t bytes;

  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ uint4* stage(int s) const { return reinterpret_cast<uint4*>(stages + static_cast<size_t>(s) * bytes); }
  __device__ __nv_bfloat16* row_part(int64_t row) const {
    return static_cast<__nv_bfloat16*>(a.logits) + row * a.stride + begin;
  }
  __device__ float factor(int64_t row) const { return 1.0f / (a.temperatures ? a.temperatures[row] : a.temperature); }
  __device__ bool on(int64_t row) const { return !a.keep || a.keep[row]; }

  __device__ void load(int s, int64_t row) {
    const uint32_t barrier = shared_address(&control->full[s]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(stage(s))),
        "l"(__cvta_generic_to_global(row_part(row))), "r"(bytes), "r"(barrier)
        : "memory");
  }

  __device__ void wait_loaded(int s, uint32_t phase) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "WAIT:\n mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        " @done bra READY;\n bra WAIT;\n"
        "READY:\n}" ::"r"(shared_address(&control->full[s])),
        "r"(phase)
        : "memory");
  }

  __device__ Partial reduce(int s, int64_t row) {
    Partial mine = no_partial();
    if (on(row)) {  // the same for every thread of the cluster
      const float f = factor(row);
      const uint4* values = stage(s);
      for (int i = threadIdx.x; i < part / kVector; i += kThreads) {
        const uint4 packed = values[i];
        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
        float y[kVector], top = -INFINITY;
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k) {
          const float2 pair = __bfloat1622float2(pairs[k]);
          y[2 * k] = pair.x * f;
          y[2 * k + 1] = pair.y * f;
          top = fmaxf(top, fmaxf(y[2 * k], y[2 * k + 1]));
        }
        if (top > mine.top) {
          const float down = mine.top == -INFINITY ? 0.0f : mine.top - top, left = __expf(down);
          mine.moment = left * (mine.moment + down * mine.total);
          mine.total *= left;
          mine.top = top;
        }
        const float pivot = mine.top == -INFINITY ? 0.0f : mine.top;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float gap = clamp(y[k] - pivot, -100.0f, 0.0f), e = __expf(gap);
          mine.total += e;
          mine.moment = fmaf(e, gap, mine.moment);
        }
      }
      const int64_t target = a.targets[row] - begin;
      if (leader() && target >= 0 && target < part)
        mine.picked = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(values)[target]) * f;
    }
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) control->warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32) mine = warp_sum(threadIdx.x < kWarps ? control->warps[threadIdx.x] : no_partial());
    return mine;
  }

  __device__ void publish(int slot, const Partial& partial) {
    cg::cluster_group cluster = cg::this_cluster();
    Partial* own = &control->slots[slot][cluster.block_rank()];
    for (unsigned peer = 0; peer < cluster.num_blocks(); ++peer) *cluster.map_shared_rank(own, peer) = partial;
  }

  __device__ void cluster_barrier() { cg::this_cluster().sync(); }

  __device__ void finish(int s, int slot, int64_t row) {
    uint4* values = stage(s);
    RowResult r{};
    float f = 0.0f;
    if (on(row)) {
      Partial whole = no_partial();
      for (unsigned b = 0; b < cg::this_cluster().num_blocks(); ++b) whole = combine(whole, control->slots[slot][b]);
      const Objective& o = a.objective;
      const RowInputs in{a.advantages[row], o.has_old ? a.old_logprobs[row] : 0.0f,
                         o.kl == Kl::none ? 0.0f : a.ref_logprobs[row],
                         o.importance == Importance::none ? 0.0f : a.rollout_logprobs[row]};
      r = row_result(whole, o, in, a.normalizer[row * a.normalizer_stride]);
      f = factor(row);
    }
    const bool zero = r.c == 0.0f && r.e == 0.0f;  // whatever the row holds
    const float constant = -f * (r.c + r.e * r.entropy), slope = -f * r.e;
    for (int i = threadIdx.x; i < part / kVector; i += kThreads) {
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (!zero) {
        packed = values[i];
        __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k) {
          const float2 z = __bfloat1622float2(pairs[k]);
          const float x = clamp(fmaf(z.x, f, r.shift), -100.0f, 100.0f), y = clamp(fmaf(z.y, f, r.shift), -100.0f, 100.0f);
          pairs[k] = __floats2bfloat162_rn(__expf(x) * fmaf(slope, x, constant), __expf(y) * fmaf(slope, y, constant));
        }
      }
      values[i] = packed;
    }
    const int64_t target = a.targets[row] - begin;
    if (target >= 0 && target < part && !zero) {
      // By the thread that wrote the vector around it, so that the two stores have an order.
      if (threadIdx.x == target / kVector % kThreads)
        reinterpret_cast<__nv_bfloat16*>(values)[target] =
            __float2bfloat16_rn(gradient_of(r, r.logprob - r.shift, f, true));
    }
    if (leader() && cg::this_cluster().block_rank() == 0) {
      a.logprobs[row] = r.logprob;
      a.entropy[row] = r.entropy;
      a.d_logprob[row] = r.c;
    }
  }

  __device__ void sync() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what was written is what the bulk copy reads
    __syncthreads();
  }

  __device__ void store(int s, int64_t row) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(
            __cvta_generic_to_global(row_part(row))),
        "r"(shared_address(stage(s))), "r"(bytes)
        : "memory");
  }

  template <int left>
  __device__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(left) : "memory");
  }
  __device__ void wait_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
};

__global__ void __launch_bounds__(kThreads, 1) logits_policy_loss_kernel(const __grid_constant__ KernelArguments a) {
  extern __shared__ __align__(128) char stages[];
  __shared__ Control control;
  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), part = static_cast<int>(a.vocab / blocks);
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : control.full)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  cluster.sync();
  Block block{a, stages, &control, part, static_cast<int64_t>(cluster.block_rank()) * part, static_cast<uint32_t>(part) * 2};
  run_pipeline(Schedule{a.rows, blockIdx.x / blocks, gridDim.x / blocks}, block);
}

}  // namespace
}  // namespace rewardmap

// Launches on `stream`; 0, or the CUDA error. Shared memory and cluster size as native_cuda.py plans them.
extern "C" int rewardmap_logits_policy_loss(const rewardmap::KernelArguments* a, int cluster, void* stream) {
  using namespace rewardmap;
  const int bytes = static_cast<int>(a->vocab / cluster) * 2 * kStages;
  cudaError_t error =
      cudaFuncSetAttribute(logits_policy_loss_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.gridDim = dim3(cluster);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;  // that fit at once: processors left over by the size of a cluster stay idle
  error = cudaOccupancyMaxActiveClusters(&clusters, logits_policy_loss_kernel, &config);
  if (error != cudaSuccess) return error;
  if (clusters < 1) return cudaErrorLaunchOutOfResources;
  config.gridDim = dim3(static_cast<unsigned>(clusters) * cluster);
  return cudaLaunchKernelEx(&config, logits_policy_loss_kernel, *a);
}

// 0, or the CUDA error for which the kernel cannot run here: an old driver, another GPU.
extern "C" int rewardmap_cuda_check() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, rewardmap::logits_policy_loss_kernel);
}

extern "C" const char* rewardmap_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int rewardmap_arguments_bytes() { return sizeof(rewardmap::KernelArguments); }
