// CUDA C++ as nvcc 13 compiles it: `nvcc -arch=sm_90a -ptx nvcc.cu`, run by tests/nvcc.rs.
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// out[0] += the sum of in[0..n].
extern "C" __global__ void reduce(const float* in, float* out, int n) {
    __shared__ float part[32];
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
    for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
        for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
        if (threadIdx.x == 0) atomicAdd(out, sum);
    }
}

// c = a * b, n x n, in tiles of 16 x 16.
extern "C" __global__ void product(const float* a, const float* b, float* c, int n) {
    __shared__ float tile_a[16][17], tile_b[16][17];
    int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
    float sum = 0;
    for (int k = 0; k < n; k += 16) {
        tile_a[y][x] = row < n && k + x < n ? a[row * n + k + x] : 0;
        tile_b[y][x] = column < n && k + y < n ? b[(k + y) * n + column] : 0;
        __syncthreads();
        for (int i = 0; i < 16; i++) sum += tile_a[y][i] * tile_b[i][x];
        __syncthreads();
    }
    if (row < n && column < n) c[row * n + column] = sum;
}

// The mathematical library, 64-bit integers, 16-bit floats, groups of active lanes.
extern "C" __global__ void functions(double* d, unsigned long long* u, float* f, int n, __half* h, __nv_bfloat16* b) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    d[i] = sin(d[i]) + exp(d[i]) / sqrt(fabs(d[i]) + 1);
    f[i] = sinf(f[i]) * expf(f[i]) + powf(fabsf(f[i]), 0.3f) + logf(1 + fabsf(f[i])) + tanhf(f[i]);
    u[i] = u[i] / (i + 3) % 1000003 + __popcll(u[i]) + __clzll(u[i]) + (__brevll(u[i]) ^ __umul64hi(u[i], u[i] * 77));
    h[i] = __hfma(h[i], h[i], __float2half(0.5f));
    b[i] = __hadd(b[i], __float2bfloat16(1.25f));
    auto group = cooperative_groups::coalesced_threads();
    if (group.thread_rank() == 0) atomicAdd(&u[n], (unsigned long long)group.size());
    atomicMax(&u[n + 1], (unsigned long long)__popc(__match_any_sync(__activemask(), i % 5)));
}

// out[i] = in[i] + i % 256, by bulk copies through shared memory.
extern "C" __global__ void bulk(const int* in, int* out) {
    namespace device = cuda::device::experimental;
    using barrier = cuda::barrier<cuda::thread_scope_block>;
    __shared__ alignas(128) int buffer[256];
#pragma nv_diag_suppress static_var_with_dynamic_init
    __shared__ barrier full;
    if (threadIdx.x == 0) {
        init(&full, blockDim.x);
        device::fence_proxy_async_shared_cta();
    }
    __syncthreads();
    barrier::arrival_token token;
    if (threadIdx.x == 0) {
        device::cp_async_bulk_global_to_shared(buffer, in + blockIdx.x * 256, sizeof(buffer), full);
        token = cuda::device::barrier_arrive_tx(full, 1, sizeof(buffer));
    } else {
        token = full.arrive();
    }
    full.wait(std::move(token));
    for (int i = threadIdx.x; i < 256; i += blockDim.x) buffer[i] += i;
    device::fence_proxy_async_shared_cta();
    __syncthreads();
    if (threadIdx.x == 0) {
        device::cp_async_bulk_shared_to_global(out + blockIdx.x * 256, buffer, sizeof(buffer));
        device::cp_async_bulk_commit_group();
        device::cp_async_bulk_wait_group_read<0>();
    }
}
