// A product on mma.sync with ldmatrix and cp.async, as nvcc 13 compiles it: `nvcc -arch=sm_90a -ptx nvcc_mma.cu`, run by tests/nvcc.rs.
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

constexpr int TILE_M = 32, TILE_N = 32, TILE_K = 32, STAGES = 2;
// Rows are padded so that ldmatrix meets no bank conflicts.
constexpr int PITCH = TILE_K + 8;

// c [m][n] = a [m][k] times the transpose of b [n][k]; a block of four warps makes 32 x 32 of c, a warp 16 x 16. Sizes are multiples of 32.
extern "C" __global__ void mma_product(const __half* a, const __half* b, float* c, int m, int n, int k) {
    __shared__ __align__(16) __half tile_a[STAGES][TILE_M][PITCH];
    __shared__ __align__(16) __half tile_b[STAGES][TILE_N][PITCH];
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int row = blockIdx.x * TILE_M, column = blockIdx.y * TILE_N;
    auto load = [&](int stage, int first) {
        // 32 rows of four 16-byte pieces: one piece a thread.
        int r = thread / 4, piece = thread % 4 * 8;
        __pipeline_memcpy_async(&tile_a[stage][r][piece], a + (row + r) * k + first + piece, 16);
        __pipeline_memcpy_async(&tile_b[stage][r][piece], b + (column + r) * k + first + piece, 16);
        __pipeline_commit();
    };
    float sums[2][4] = {};
    int blocks = k / TILE_K;
    load(0, 0);
    for (int block = 0; block < blocks; ++block) {
        if (block + 1 < blocks) {
            load((block + 1) % STAGES, (block + 1) * TILE_K);
            __pipeline_wait_prior(1);
        } else {
            __pipeline_wait_prior(0);
        }
        __syncthreads();
        int stage = block % STAGES;
        for (int step = 0; step < TILE_K; step += 16) {
            unsigned fa[4], fb[4];
            auto at = [](const void* p) { return (unsigned)__cvta_generic_to_shared(p); };
            unsigned pa = at(&tile_a[stage][warp / 2 * 16 + lane % 16][step + lane / 16 * 8]);
            unsigned pb = at(&tile_b[stage][warp % 2 * 16 + lane / 16 * 8 + lane % 8][step + lane / 8 % 2 * 8]);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(pa) : "memory");
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(fb[0]), "=r"(fb[1]), "=r"(fb[2]), "=r"(fb[3]) : "r"(pb) : "memory");
            for (int half = 0; half < 2; ++half) {
                float* s = sums[half];
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                             : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                             : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[2 * half]), "r"(fb[2 * half + 1]));
            }
        }
        __syncthreads();
    }
    for (int half = 0; half < 2; ++half) {
        int r = row + warp / 2 * 16 + lane / 4, col = column + warp % 2 * 16 + half * 8 + lane % 4 * 2;
        *(float2*)(c + r * n + col) = make_float2(sums[half][0], sums[half][1]);
        *(float2*)(c + (r + 8) * n + col) = make_float2(sums[half][2], sums[half][3]);
    }
}
