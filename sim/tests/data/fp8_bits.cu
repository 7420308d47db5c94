// Which bits of its sums the device's tensor cores keep for wgmma of 8-bit operands.
//
//     nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o fp8_bits fp8_bits.cu && ./fp8_bits
//
// Prints one line for each question, with what the simulator (`wgmma::Fp8Sums::Hopper`) answers, and then how many of some
// hundred thousand random sums differ from models of it: the simulator's is "13 bits, as is".

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <utility>

constexpr int ROWS = 64, COLUMNS = 8, K = 32;

struct Problem {
    uint8_t a[ROWS][K], b[COLUMNS][K];
    float c[ROWS][COLUMNS], d[ROWS][COLUMNS];
};

// One warpgroup, one wgmma: d = a * b + c.
template <bool E5M2> __global__ void multiply(Problem *problem) {
    __shared__ __align__(1024) uint8_t a[ROWS * K];
    __shared__ __align__(1024) uint8_t b[COLUMNS * K];
    int thread = threadIdx.x;
    // K-major without swizzle: core matrices of 8 rows of 16 bytes.
    for (int i = thread; i < ROWS * K; i += blockDim.x)
        a[i / K / 8 * 256 + i % K / 16 * 128 + i / K % 8 * 16 + i % 16] = problem->a[i / K][i % K];
    for (int i = thread; i < COLUMNS * K; i += blockDim.x)
        b[i / K / 8 * 256 + i % K / 16 * 128 + i / K % 8 * 16 + i % 16] = problem->b[i / K][i % K];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    auto descriptor = [](void *from) {
        uint64_t address = (uint64_t)__cvta_generic_to_shared(from);
        return address >> 4 | (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32;
    };
    uint64_t of_a = descriptor(a), of_b = descriptor(b);
    int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float f0 = problem->c[row][column], f1 = problem->c[row][column + 1];
    float f2 = problem->c[row + 8][column], f3 = problem->c[row + 8][column + 1];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if (E5M2)
        asm volatile("{ .reg .pred p; setp.ne.u32 p, 1, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e5m2 {%0, %1, %2, %3}, %4, %5, p, 1, 1; }"
                     : "+f"(f0), "+f"(f1), "+f"(f2), "+f"(f3) : "l"(of_a), "l"(of_b) : "memory");
    else
        asm volatile("{ .reg .pred p; setp.ne.u32 p, 1, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1; }"
                     : "+f"(f0), "+f"(f1), "+f"(f2), "+f"(f3) : "l"(of_a), "l"(of_b) : "memory");
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
                 : "+f"(f0), "+f"(f1), "+f"(f2), "+f"(f3) : : "memory");
    problem->d[row][column] = f0;
    problem->d[row][column + 1] = f1;
    problem->d[row + 8][column] = f2;
    problem->d[row + 8][column + 1] = f3;
}

static void check(cudaError_t error) {
    if (error != cudaSuccess) {
        fprintf(stderr, "%s\n", cudaGetErrorString(error));
        exit(1);
    }
}

static void run(Problem &problem, bool e5m2) {
    static Problem *device = nullptr;
    if (!device)
        check(cudaMalloc(&device, sizeof(Problem)));
    check(cudaMemcpy(device, &problem, sizeof(Problem), cudaMemcpyHostToDevice));
    if (e5m2)
        multiply<true><<<1, 128>>>(device);
    else
        multiply<false><<<1, 128>>>(device);
    check(cudaGetLastError());
    check(cudaMemcpy(&problem, device, sizeof(Problem), cudaMemcpyDeviceToHost));
}

// The byte of a power of two with a sign in e4m3: exponents -9 to 8.
static uint8_t power(int exponent, bool negative = false) {
    int bits = exponent >= -6 ? (exponent + 7) << 3 : 1 << (exponent + 9);
    return bits | negative << 7;
}

struct Product {
    uint8_t a, b;
};

// +-2^exponent as a product of e4m3 numbers: exponents -18 to 16.
static Product product(int exponent, bool negative = false) {
    int half = exponent / 2;
    return {power(exponent - half, negative), power(half)};
}

// Sum of products at the given places of k, and of an old value.
static float sum_at(std::initializer_list<std::pair<int, Product>> products, float old) {
    Problem problem;
    memset(&problem, 0, sizeof problem);
    for (auto [k, p] : products) {
        for (auto &row : problem.a)
            row[k] = p.a;
        for (auto &column : problem.b)
            column[k] = p.b;
    }
    for (auto &row : problem.c)
        for (float &c : row)
            c = old;
    run(problem, false);
    for (auto &row : problem.d)
        for (float d : row)
            if (memcmp(&d, &problem.d[0][0], 4) != 0)
                printf("  rows or columns differ: %a %a\n", d, problem.d[0][0]);
    return problem.d[0][0];
}

static float sum(std::initializer_list<Product> products, float old) {
    static Problem problem;
    memset(&problem, 0, sizeof problem);
    int k = 0;
    for (Product p : products) {
        for (auto &row : problem.a)
            row[k] = p.a;
        for (auto &column : problem.b)
            column[k] = p.b;
        k++;
    }
    for (auto &row : problem.c)
        for (float &c : row)
            c = old;
    run(problem, false);
    return problem.d[0][0];
}

static float filled(Product first, Product second, Product others, float old) {
    static Problem problem;
    memset(&problem, 0, sizeof problem);
    for (int k = 0; k < K; k++) {
        Product p = k == 0 ? first : k == 1 ? second : others;
        for (auto &row : problem.a)
            row[k] = p.a;
        for (auto &column : problem.b)
            column[k] = p.b;
    }
    for (auto &row : problem.c)
        for (float &c : row)
            c = old;
    run(problem, false);
    return problem.d[0][0];
}

static void line(const char *question, float found, float expected) {
    printf("%-74s %-16a %-16a %s\n", question, found, expected, found == expected ? "" : "DIFFERS");
}

// Models for random sums.
struct Model {
    const char *name;
    int bits;        // Kept behind the point of the largest exponent.
    bool normalised; // Exponents of products are those of their values, not sums of exponents.
    bool down;       // Cut towards minus infinity.
    int groups;      // Parts of k that are added one after the other.
};

static double value(uint8_t byte, bool e5m2) {
    int mantissa_bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7;
    int exponent = (byte & 127) >> mantissa_bits, mantissa = byte & ((1 << mantissa_bits) - 1);
    double magnitude = exponent == 0 ? ldexp(mantissa, 1 - bias - mantissa_bits)
                                     : ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    return byte & 128 ? -magnitude : magnitude;
}

static int exponent_of(uint8_t byte, bool e5m2) {
    int mantissa_bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7, exponent = (byte & 127) >> mantissa_bits;
    return (exponent == 0 ? 1 : exponent) - bias;
}

static float predicted(const Model &model, const uint8_t *a, const uint8_t *b, float old, bool e5m2) {
    double sum = old;
    for (int group = 0; group < model.groups; group++) {
        double values[K + 1];
        int exponents[K + 1], largest = -10000, count = 0;
        auto add = [&](double value, int exponent) {
            if (value == 0)
                return;
            values[count] = value;
            exponents[count++] = exponent;
            largest = exponent > largest ? exponent : largest;
        };
        for (int k = group * K / model.groups; k < (group + 1) * K / model.groups; k++) {
            double p = value(a[k], e5m2) * value(b[k], e5m2);
            add(p, model.normalised ? ilogb(p) : exponent_of(a[k], e5m2) + exponent_of(b[k], e5m2));
        }
        add(sum, sum == 0 ? 0 : ilogb(sum));
        sum = 0;
        for (int i = 0; i < count; i++) {
            double units = ldexp(values[i], model.bits - largest);
            sum += model.down ? floor(units) : trunc(units);
        }
        sum = ldexp(sum, largest - model.bits);
        if (sum != 0) {
            int exponent = ilogb(sum);
            sum = ldexp(trunc(ldexp(sum, 13 - exponent)), exponent - 13);
        }
    }
    return sum + 0.0;
}

int main() {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    printf("%s\n%-74s %-16s %-16s\n", properties.name, "products and the old value c", "device", "simulator");
    Product one = product(0), minus_one = product(0, true);
    char text[128];
    for (int k = 11; k <= 17; k++) {
        snprintf(text, sizeof text, "1 - 1 + 2^-%d", k);
        line(text, sum({one, minus_one, product(-k)}, 0), k <= 13 ? ldexpf(1, -k) : 0);
    }
    for (int k = 12; k <= 15; k++) {
        snprintf(text, sizeof text, "1 + 2^-%d", k);
        line(text, sum({one, product(-k)}, 0), k <= 13 ? 1 + ldexpf(1, -k) : 1);
    }
    line("1 - 1 - 2^-14 (0: cut towards zero; -2^-13: down)", sum({one, minus_one, product(-14, true)}, 0), 0);
    line("1 - 1 + 30 * 2^-14 (each cut on its own?)", filled(one, minus_one, product(-14), 0), 0);
    line("1 - 1 + 30 * 2^-13", filled(one, minus_one, product(-13), 0), 30 * ldexpf(1, -13));
    printf("1 - 1 at k = 0, 1 and 2^-14 at k = ...: survives at");
    for (int k = 2; k < K; k++)
        if (sum_at({{0, one}, {1, minus_one}, {k, product(-14)}}, 0) != 0)
            printf(" %d", k);
    printf(" (simulator: nowhere)\n1 - 1 at k = 30, 31 and 2^-14 at k = ...: survives at");
    for (int k = 0; k < 30; k++)
        if (sum_at({{30, one}, {31, minus_one}, {k, product(-14)}}, 0) != 0)
            printf(" %d", k);
    printf(" (simulator: nowhere)\n");
    line("c = 1 + 2^-13, no product", sum({}, 1 + ldexpf(1, -13)), 1 + ldexpf(1, -13));
    line("c = 1 + 2^-13 + 2^-14, no product", sum({}, 1 + ldexpf(3, -14)), 1 + ldexpf(1, -13));
    line("c = -1 - 2^-13 - 2^-14, no product", sum({}, -1 - ldexpf(3, -14)), -1 - ldexpf(1, -13));
    line("c = 2^-14, 1 - 1", sum({one, minus_one}, ldexpf(1, -14)), 0);
    line("c = 2^-13, 1 - 1", sum({one, minus_one}, ldexpf(1, -13)), ldexpf(1, -13));
    line("c = -2^-14, 1 - 1", sum({one, minus_one}, -ldexpf(1, -14)), 0);
    line("c = 1, -1 + 2^-14 (c's exponent counts)", sum({minus_one, product(-14)}, 1), 0);
    line("c = 1, -1 + 2^-13", sum({minus_one, product(-13)}, 1), ldexpf(1, -13));
    line("c = 2^-13, 1 + 1 (the sum is cut)", sum({one, one}, ldexpf(1, -13)), 2);
    line("c = 3 * 2^-13, 1 + 1", sum({one, one}, ldexpf(3, -13)), 2 + ldexpf(1, -12));
    line("c = -3 * 2^-13, -1 - 1", sum({minus_one, minus_one}, -ldexpf(3, -13)), -2 - ldexpf(1, -12));
    Product large = {0x3C, 0x3C}, minus_large = {0xBC, 0x3C};
    line("1.5 * 1.5 - 1.5 * 1.5 + 2^-13 (0: exponents of values count)", sum({large, minus_large, product(-13)}, 0),
         ldexpf(1, -13));
    line("1.5 * 1.5 + 2^-12", sum({large, product(-12)}, 0), 2.25f + ldexpf(1, -12));
    Product tiny = {0x01, 0x40}, minus_tiny = {0x81, 0x40};
    line("2^-9 * 2 - 2^-9 * 2 + 2^-18 (0: subnormals have exponent -6)", sum({tiny, minus_tiny, product(-18)}, 0),
         ldexpf(1, -18));
    line("2^-9 * 2 - 2^-9 * 2 + c = 2^-19", sum({tiny, minus_tiny}, ldexpf(1, -19)), 0);
    float zero = sum({product(-18, true), one, minus_one}, 0), minus_zero = sum({}, -0.0f);
    printf("sign of 1 - 1 - 2^-18: %d (simulator 0); of c = -0 alone: %d (simulator 0)\n", std::signbit(zero),
           std::signbit(minus_zero));

    const Model models[] = {
        {"13 bits, as is", 13, false, false, 1},    {"12 bits", 12, false, false, 1},
        {"14 bits", 14, false, false, 1},           {"13 bits, exponents of values", 13, true, false, 1},
        {"13 bits, down", 13, false, true, 1},      {"13 bits, two halves of 16", 13, false, false, 2},
        {"13 bits, four parts of 8", 13, false, false, 4},
    };
    constexpr int COUNT = sizeof models / sizeof *models, PROBLEMS = 400;
    std::mt19937 random(1);
    for (bool e5m2 : {false, true}) {
        int wrong[COUNT] = {};
        static Problem problem;
        for (int i = 0; i < PROBLEMS; i++) {
            // Exponents of all sizes, or of few.
            auto byte = [&] {
                uint8_t byte = i % 2 ? random() : (random() & 0x9F) | 0x20;
                bool special = e5m2 ? (byte & 0x7C) == 0x7C : (byte & 0x7F) == 0x7F;
                return (uint8_t)(special ? byte & 0xBF : byte);
            };
            for (auto &row : problem.a)
                for (uint8_t &x : row)
                    x = byte();
            for (auto &column : problem.b)
                for (uint8_t &x : column)
                    x = byte();
            for (auto &row : problem.c)
                for (float &c : row)
                    c = random() % 4 == 0 ? 0 : ldexpf((int)random(), (int)(random() % 50) - 50);
            run(problem, e5m2);
            for (int m = 0; m < COUNT; m++)
                for (int row = 0; row < ROWS; row++)
                    for (int column = 0; column < COLUMNS; column++)
                        wrong[m] += problem.d[row][column] != predicted(models[m], problem.a[row], problem.b[column],
                                                                        problem.c[row][column], e5m2);
        }
        printf("%s: of %d random sums differ from\n", e5m2 ? "e5m2" : "e4m3", PROBLEMS * ROWS * COLUMNS);
        for (int m = 0; m < COUNT; m++)
            printf("  %-32s %d\n", models[m].name, wrong[m]);
    }
}
