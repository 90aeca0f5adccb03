/* Runs fused multiply-adds on registers alone, on every core, and prints the operations of all cores in a second.
 *
 * Compiled once for each arithmetic, with one of FP32_256, FP32_512, BF16_512 and INT8_512 defined:
 * `peak THREADS SECONDS`. An operation is a multiplication or an addition.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define ITERATIONS 20000 /* between two looks at the clock: some 0.1 ms */
#define MAX_THREADS 1024

/* Enough sums at once to hide the latency of each. Narrow registers are 16, wide ones 32; two hold the factors. */
#if defined(FP32_512)
#define STEP(sum) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" sum "\n"
#define OPERATIONS 32
#elif defined(BF16_512)
#define STEP(sum) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" sum "\n"
#define OPERATIONS 64
#elif defined(INT8_512)
#define STEP(sum) "vpdpbusd %%zmm30, %%zmm31, %%zmm" sum "\n"
#define OPERATIONS 128
#elif defined(FP32_256)
#define STEP(sum) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" sum "\n"
#define OPERATIONS 16
#else
#error "define the arithmetic"
#endif

#define STEPS_12(macro) \
    macro("0") macro("1") macro("2") macro("3") macro("4") macro("5") \
    macro("6") macro("7") macro("8") macro("9") macro("10") macro("11")
#define STEPS_24(macro) \
    STEPS_12(macro) macro("12") macro("13") macro("14") macro("15") macro("16") macro("17") \
    macro("18") macro("19") macro("20") macro("21") macro("22") macro("23")

#if defined(FP32_256)
#define SUMS 12
#define STEPS STEPS_12(STEP)
#define ZERO(sum) "vpxor %%ymm" sum ", %%ymm" sum ", %%ymm" sum "\n"
#define PREPARE STEPS_12(ZERO) "vpbroadcastd %1, %%ymm14\nvpbroadcastd %1, %%ymm15\n"
#define REGISTERS
#define TARGET __attribute__((noinline, target("avx2")))
#else
#define SUMS 24
#define STEPS STEPS_24(STEP)
#define ZERO(sum) "vpxord %%zmm" sum ", %%zmm" sum ", %%zmm" sum "\n"
#define PREPARE STEPS_24(ZERO) "vpbroadcastd %1, %%zmm30\nvpbroadcastd %1, %%zmm31\n"
#define REGISTERS \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm30", "xmm31"
#define TARGET __attribute__((noinline, target("avx512f")))
#endif

/* 0.0078 as two bf16, about the same as one float, and small bytes: not zero, with which hardware is faster. */
static const unsigned factor = 0x3c003c00;

TARGET static void run(long iterations) {
    __asm__ volatile(PREPARE "1:\n" STEPS "dec %0\njnz 1b\nvzeroupper\n"
                     : "+r"(iterations)
                     : "m"(factor)
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" REGISTERS);
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double duration;
static pthread_barrier_t all_ready;

static void *measure(void *rate) {
    double began, now;
    long rounds = 0;
    run(ITERATIONS); /* wakes the wide units */
    pthread_barrier_wait(&all_ready);
    began = now = seconds_now();
    for (; now - began < duration; now = seconds_now()) {
        run(ITERATIONS);
        rounds++;
    }
    *(double *)rate = (double)rounds * ITERATIONS * SUMS * OPERATIONS / (now - began);
    return NULL;
}

int main(int count, char **arguments) {
    static double rates[MAX_THREADS];
    static pthread_t threads[MAX_THREADS];
    int index, num_threads = count == 3 ? atoi(arguments[1]) : 0;
    double total = 0;
    if (num_threads < 1 || num_threads > MAX_THREADS)
        return 2;
    duration = atof(arguments[2]);
    pthread_barrier_init(&all_ready, NULL, (unsigned)num_threads);
    for (index = 0; index < num_threads; index++)
        if (pthread_create(&threads[index], NULL, measure, &rates[index]))
            return 3;
    for (index = 0; index < num_threads; index++) {
        pthread_join(threads[index], NULL);
        total += rates[index];
    }
    printf("%.0f\n", total);
    return 0;
}
