// The CUDA kernels of csrc/cuda/ on the CPU, thread by thread (lanes_host.h), behind the same C interface.
#include <algorithm>

#include "../../csrc/cuda/dispatch.h"

namespace kvs::gpu {
namespace {

std::string failure;

struct Launcher {
  template <class Prepare, class Body>
  bool run_grid(Place grid, int threads, Prepare prepare, Body body) {
    Place place;
    for (place.z = 0; place.z < grid.z; ++place.z)
      for (place.y = 0; place.y < grid.y; ++place.y)
        for (place.x = 0; place.x < grid.x; ++place.x) {
          prepare();
          if (!(failure = host::Block(place, threads, body).run()).empty()) return false;
        }
    return true;
  }

  template <class Shape>
  const char* run(DecodeArguments arguments, const KvsLaunch& launch) {
    const KvsLayout& layout = arguments.layout;
    const Block block = fitting_block<Shape>(layout, launch, 101376);  // what sm_89 has, the least of the targets
    if (!block.shared_bytes) return "a page does not fit into shared memory with these warps and stages; use Triton";
    arguments.stages = block.stages;
    std::vector<Words> shared(block.shared_bytes / sizeof(Words) + 8);
    auto* const base = reinterpret_cast<uint8_t*>((uintptr_t(shared.data()) + 63) / 64 * 64);
    const Place shares{arguments.splits * head_tiles(layout), layout.num_kv_heads, arguments.batch.num_reqs};
    const auto poison = [&] { std::memset(base, 0xFF, block.shared_bytes); };
    const auto body = [&] { decode_block<Shape>(arguments, base); };
    if (!run_grid(shares, 32 * block.warps, poison, body)) return failure.c_str();
    const Place rows{layout.num_heads, 1, arguments.batch.num_reqs};
    return run_grid(rows, 32, [] {}, [&] { combine_block<Shape>(arguments); }) ? nullptr : failure.c_str();
  }
};

}  // namespace
}  // namespace kvs::gpu

#include "../../csrc/cuda/exports.h"
