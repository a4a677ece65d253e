// C interface of the CUDA kernels: the structs of csrc/kvserve.h, whose pointers are the device's here.
// kvserve/attention/cuda.py calls it through ctypes. Built by scripts/build_cuda.py.
#pragma once
#include "../kvserve.h"

#pragma GCC visibility push(default)
extern "C" {

struct KvsLaunch {
  int32_t splits;    // of each sequence
  int32_t warps;     // of a block: 1, 2 or 4; 0: as many as fit
  int32_t stages;    // pages that a warp has in flight: 2 to 4; 0: as many as fit, up to 3
  float* workspace;  // of the device: kvs_cuda_workspace_floats(...)
  void* stream;      // cudaStream_t of the current device
};

// Null, or why these kernels cannot serve a layer and what does.
const char* kvs_cuda_unsupported(const KvsLayout*);
int64_t kvs_cuda_workspace_floats(const KvsLayout*, int32_t num_reqs, int32_t splits);
// Attention of the requests that bring exactly one token; rows of the others are not written. Arguments as kvs_attend's
// in csrc/kvserve.h; query and output have the dtype of dense slots. Reads no data back: may be captured in a graph.
// Returns null, or what is wrong.
const char* kvs_cuda_decode(const KvsLayout*, const KvsBatch*, const KvsArena*, const float* staged,
                            const KvsRows* query, const KvsRows* output, float* lse, const KvsLaunch*);
// What it was built from and for: a digest of the sources, then the targets (scripts/build_cuda.py).
const char* kvs_cuda_built();
}
#pragma GCC visibility pop
