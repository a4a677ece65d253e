// The CUDA kernels' launches and C interface.
#include <cuda_runtime.h>

#include "dispatch.h"

namespace kvs::gpu {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool IS_BLACKWELL = true;
#else
constexpr bool IS_BLACKWELL = false;
#endif

// Blocks of a multiprocessor, as far as registers go: as many as need no spills (scripts/build_cuda.py checks that).
template <class Shape>
constexpr int blocks() {
  const bool takes_more = IS_BLACKWELL && Shape::KEY_BITS == 2 && !Shape::Number::NARROW;
  return (Shape::DIM == 64 ? 4 : 3) - takes_more;
}

template <class Shape>
__global__ void __launch_bounds__(32 * MAX_WARPS, blocks<Shape>())
    decode_kernel(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(64) uint8_t shared[];
  decode_block<Shape>(arguments, shared);
}

template <class Shape>
__global__ void __launch_bounds__(32) combine_kernel(const __grid_constant__ DecodeArguments arguments) {
  combine_block<Shape>(arguments);
}

struct Launcher {
  template <class Shape>
  const char* run(DecodeArguments arguments, const KvsLaunch& launch) {
    const KvsLayout& layout = arguments.layout;
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error) return cudaGetErrorString(error);
    const Block block = fitting_block<Shape>(layout, launch, limit);
    if (!block.shared_bytes) return "a page does not fit into shared memory with these warps and stages; use Triton";
    arguments.stages = block.stages;
    auto* const kernel = decode_kernel<Shape>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(block.shared_bytes));
    if (error) return cudaGetErrorString(error);
    const auto stream = static_cast<cudaStream_t>(launch.stream);
    const dim3 shares(arguments.splits * head_tiles(layout), layout.num_kv_heads, arguments.batch.num_reqs);
    kernel<<<shares, 32 * block.warps, block.shared_bytes, stream>>>(arguments);
    const dim3 rows(layout.num_heads, 1, arguments.batch.num_reqs);
    combine_kernel<Shape><<<rows, 32, 0, stream>>>(arguments);
    error = cudaGetLastError();
    return error ? cudaGetErrorString(error) : nullptr;
  }
};

}  // namespace
}  // namespace kvs::gpu

#include "exports.h"

#ifndef KVS_CUDA_BUILT
#define KVS_CUDA_BUILT ""
#endif
const char* kvs_cuda_built() { return KVS_CUDA_BUILT; }
