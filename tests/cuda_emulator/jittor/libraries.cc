// The driver, CUDA's runtime, cuBLAS and cuRAND with a card that is this processor.
//
// The card's memory can be read while a kernel runs and a copy is made, and at no other time: host code that
// follows a pointer of the card ends with a segmentation fault, as it would on a machine with a card.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <curand.h>
// The real names, which jlora's header for Jittor replaces.
#undef cudaDeviceProp
#undef cudaGetDeviceProperties
#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>

namespace {
constexpr size_t all = (size_t)64 << 30, page = 4096;
struct Card {
    std::recursive_mutex alone;  // kernels and copies run one after the other
    char* memory;
    size_t used = 0, held = 0, most = all, open = 0;  // held: without what was given back
    std::map<void*, size_t> sizes;
    std::multimap<size_t, void*> freed;
    Card() {
        memory = (char*)mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        if (const char* mib = std::getenv("EMULATED_CARD_MIB")) most = (size_t)std::atoll(mib) << 20;
    }
    void* allocate(size_t bytes) {
        const std::lock_guard<std::recursive_mutex> lock(alone);
        bytes = std::max<size_t>((bytes + page - 1) / page * page, page);
        if (held + bytes > most) return nullptr;
        void* found = nullptr;
        auto place = freed.find(bytes);
        if (place != freed.end()) found = place->second, freed.erase(place);
        else if (used + bytes <= all) found = memory + used, used += bytes;
        else return nullptr;
        sizes[found] = bytes, held += bytes;
        return found;
    }
    bool free(void* at) {
        const std::lock_guard<std::recursive_mutex> lock(alone);
        auto found = sizes.find(at);
        if (found == sizes.end()) return false;
        madvise(at, found->second, MADV_DONTNEED);
        freed.emplace(found->second, at), held -= found->second;
        sizes.erase(found);
        return true;
    }
};
Card& card() {
    static Card& one = *new Card;  // operators may run while the program ends
    return one;
}
}  // namespace

extern "C" void emulator_open() {
    card().alone.lock();
    if (!card().open++ && card().used) mprotect(card().memory, card().used, PROT_READ | PROT_WRITE);
}
extern "C" void emulator_close() {
    if (!--card().open && card().used) mprotect(card().memory, card().used, PROT_NONE);
    card().alone.unlock();
}
namespace {
struct Open {
    Open() { emulator_open(); }
    ~Open() { emulator_close(); }
};
}  // namespace

// The driver: Jittor asks for the kind of card.
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 9 : 0; return 0; }
}

cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int) {
    std::memset(to, 0, sizeof *to);
    std::snprintf(to->name, sizeof to->name, "this processor");
    to->major = 9, to->multiProcessorCount = 16, to->totalGlobalMem = card().most, to->warpSize = 32;
    to->maxThreadsPerBlock = 1024, to->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 0; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return error ? "an emulated error" : "none"; }
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    *total = card().most, *left = card().most - card().held;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** at, size_t bytes) {
    *at = card().allocate(bytes);
    if (!*at) return cudaErrorMemoryAllocation;
    Open open;
    mprotect(card().memory, card().used, PROT_READ | PROT_WRITE);  // it may have grown
    std::memset(*at, 0xFF, bytes);  // NaN
    return cudaSuccess;
}
cudaError_t cudaFree(void* at) { return !at || card().free(at) ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaMallocHost(void** at, size_t bytes) { *at = std::malloc(bytes); return cudaSuccess; }
cudaError_t cudaFreeHost(void* at) { std::free(at); return cudaSuccess; }
cudaError_t cudaMallocManaged(void** at, size_t bytes, unsigned) { return cudaMallocHost(at, bytes); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const auto on_card = [](const void* p) { return p >= card().memory && p < card().memory + all; };
    const bool to_card = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_card = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (bytes && kind != cudaMemcpyDefault && (on_card(to) != to_card || on_card(from) != from_card))
        return cudaErrorInvalidValue;
    Open open;
    std::memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    Open open;
    std::memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { *stream = nullptr; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* given) { function(given); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { *event = nullptr; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { *event = nullptr; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// cuBLAS. Matrices stand column by column.
namespace {
float number(const void* from, cudaDataType type, int64_t i) {
    if (type == CUDA_R_16BF) return __bfloat162float(((const __nv_bfloat16*)from)[i]);
    if (type == CUDA_R_16F) return __half2float(((const __half*)from)[i]);
    if (type == CUDA_R_64F) return ((const double*)from)[i];
    return ((const float*)from)[i];
}
void put(void* to, cudaDataType type, int64_t i, float x) {
    if (type == CUDA_R_16BF) ((__nv_bfloat16*)to)[i] = __float2bfloat16(x);
    else if (type == CUDA_R_16F) ((__half*)to)[i] = __float2half(x);
    else if (type == CUDA_R_64F) ((double*)to)[i] = x;
    else ((float*)to)[i] = x;
}
int size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : type == CUDA_R_64F ? 8 : 2; }
}  // namespace
extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) { *handle = (cublasHandle_t)1; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
        const void* alpha, const void* a, cudaDataType at, int lda, long long next_a, const void* b, cudaDataType bt, int ldb,
        long long next_b, const void* beta, void* c, cudaDataType ct, int ldc, long long next_c, int count,
        cublasComputeType_t, cublasGemmAlgo_t) {
    if (ct == CUDA_R_64F) return CUBLAS_STATUS_NOT_SUPPORTED;
    Open open;
    const float times = *(const float*)alpha, keep = *(const float*)beta;
    std::vector<float> left((size_t)m * k), column(k), sums(m);
    for (int batch = 0; batch < count; batch++) {
        const char* x = (const char*)a + batch * next_a * size_of(at);
        const char* y = (const char*)b + batch * next_b * size_of(bt);
        char* z = (char*)c + batch * next_c * size_of(ct);
        for (int l = 0; l < k; l++)  // column by column
            for (int i = 0; i < m; i++)
                left[(size_t)l * m + i] = number(x, at, ta == CUBLAS_OP_N ? i + (int64_t)l * lda : l + (int64_t)i * lda);
        for (int j = 0; j < n; j++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int l = 0; l < k; l++) {
                const float by = number(y, bt, tb == CUBLAS_OP_N ? l + (int64_t)j * ldb : j + (int64_t)l * ldb);
                for (int i = 0; i < m; i++) sums[i] += left[(size_t)l * m + i] * by;
            }
            for (int i = 0; i < m; i++) {
                const int64_t to = i + (int64_t)j * ldc;
                put(z, ct, to, times * sums[i] + (keep != 0 ? keep * number(z, ct, to) : 0.0f));
            }
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
        const void* alpha, const void* a, cudaDataType at, int lda, const void* b, cudaDataType bt, int ldb, const void* beta,
        void* c, cudaDataType ct, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, a, at, lda, 0, b, bt, ldb, 0, beta, c, ct, ldc, 0, 1, compute, algo);
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
        const float* alpha, const float* a, int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
    return cublasGemmEx(h, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c, CUDA_R_32F, ldc,
        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
}

// cuRAND: other numbers than the card's.
namespace {
std::mt19937_64 numbers;
template <typename T, typename Draw>
curandStatus_t fill(T* to, size_t count, Draw draw) {
    Open open;
    for (size_t i = 0; i < count; i++) to[i] = draw();
    return CURAND_STATUS_SUCCESS;
}
double uniform() { return ((numbers() >> 40) + 1) / 16777216.0; }  // (0, 1], as cuRAND's
}  // namespace
extern "C" {
curandStatus_t curandCreateGenerator(curandGenerator_t* made, curandRngType_t) { *made = (curandGenerator_t)1; return CURAND_STATUS_SUCCESS; }
curandStatus_t curandDestroyGenerator(curandGenerator_t) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t, unsigned long long seed) { numbers.seed(seed); return CURAND_STATUS_SUCCESS; }
curandStatus_t curandGenerateUniform(curandGenerator_t, float* to, size_t n) { return fill(to, n, uniform); }
curandStatus_t curandGenerateUniformDouble(curandGenerator_t, double* to, size_t n) { return fill(to, n, uniform); }
curandStatus_t curandGenerateNormal(curandGenerator_t, float* to, size_t n, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    return n % 2 ? CURAND_STATUS_LENGTH_NOT_MULTIPLE : fill(to, n, [&] { return normal(numbers); });
}
curandStatus_t curandGenerateNormalDouble(curandGenerator_t, double* to, size_t n, double mean, double deviation) {
    std::normal_distribution<double> normal(mean, deviation);
    return n % 2 ? CURAND_STATUS_LENGTH_NOT_MULTIPLE : fill(to, n, [&] { return normal(numbers); });
}
}
