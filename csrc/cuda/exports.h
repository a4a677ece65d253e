// The C interface (api.h) over kvs::gpu::Launcher, which a file defines before it includes this: with CUDA's launches
// (decode.cu), or thread by thread on the CPU (tests/cases/cuda_emulation.cpp).
const char* kvs_cuda_unsupported(const KvsLayout* layout) { return kvs::gpu::unsupported(*layout); }

int64_t kvs_cuda_workspace_floats(const KvsLayout* layout, int32_t num_reqs, int32_t splits) {
  return kvs::gpu::workspace_floats(*layout, num_reqs, splits);
}

const char* kvs_cuda_decode(const KvsLayout* layout, const KvsBatch* batch, const KvsArena* arena, const float* staged,
                            const KvsRows* query, const KvsRows* output, float* lse, const KvsLaunch* launch) {
  kvs::gpu::Launcher launcher;
  return kvs::gpu::decode(*layout, *batch, *arena, staged, *query, *output, lse, *launch, launcher);
}
