// torch's own count of GPUs, laid over by LD_PRELOAD. The CUDA half of torch is told that there are many, so that
// autograd may ask whether a device is in use (it is not); all others hear that there is none.
#include <dlfcn.h>
#include <string.h>

namespace c10 {
namespace cuda {
signed char device_count() {
    Dl_info caller;
    bool found = dladdr(__builtin_return_address(0), &caller) && caller.dli_fname;
    return found && strstr(caller.dli_fname, "libtorch_cuda.so") ? 64 : 0;
}
}  // namespace cuda
}  // namespace c10
