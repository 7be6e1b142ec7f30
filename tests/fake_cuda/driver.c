/* In the place of NVIDIA's driver library: every call fails, as without a device; torch looks these names up when it
   is loaded or when it first meets a CUDA tensor. */
typedef int Result;
static const Result no_device = 100;
#define CALL(name) Result name(void) { return no_device; }
CALL(cuCtxGetCurrent)
CALL(cuCtxSetCurrent)
CALL(cuDeviceGet)
CALL(cuDeviceGetAttribute)
CALL(cuDevicePrimaryCtxRetain)
CALL(cuFuncGetAttribute)
CALL(cuFuncSetAttribute)
CALL(cuFuncSetCacheConfig)
CALL(cuGetErrorString)
CALL(cuLaunchCooperativeKernel)
CALL(cuLaunchKernel)
CALL(cuLinkAddData_v2)
CALL(cuLinkComplete)
CALL(cuLinkCreate_v2)
CALL(cuModuleGetFunction)
CALL(cuModuleLoad)
CALL(cuModuleLoadData)
CALL(cuModuleLoadDataEx)
CALL(cuModuleUnload)
CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor)
CALL(cuPointerGetAttribute)
CALL(cuTensorMapEncodeTiled)
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    if (active) *active = 0;
    return 0;
}
