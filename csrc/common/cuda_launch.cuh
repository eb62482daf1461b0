// What every CUDA launcher does: run on the tensors' device and stream, and raise what the runtime reports.
//
//   const Launch launch("assign", stream);
//   kernel<<<blocks, threads, shared, launch.stream()>>>(...);
//   launch.check();
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace dndetr {

class Launch {
 public:
  Launch(const char* op, Stream stream) : op_(op), stream_(static_cast<cudaStream_t>(stream.handle)) {
    raise(cudaGetDevice(&previous_));
    // This runtime is linked statically, apart from torch's: the device must be current here too.
    if (previous_ != stream.device) raise(cudaSetDevice(stream.device));
    changed_ = previous_ != stream.device;
  }
  ~Launch() {
    if (changed_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes of shared memory that a block may ask for.
  std::int64_t most_shared() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  // The architecture that a kernel's code, as it runs here, was compiled for, such as 80.
  template <class Kernel>
  int compiled_for(Kernel* kernel) const {
    cudaFuncAttributes found{};
    raise(cudaFuncGetAttributes(&found, kernel));
    return found.ptxVersion;
  }

  // After each launch, and around each call of the runtime.
  void check() const { raise(cudaGetLastError()); }
  void raise(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps an error until it is asked, and would hold it against the next launch
    throw std::runtime_error(std::string(op_) + ": CUDA says " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int device = 0, value = 0;
    raise(cudaGetDevice(&device));
    raise(cudaDeviceGetAttribute(&value, which, device));
    return value;
  }

  const char* op_;
  cudaStream_t stream_;
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace dndetr
