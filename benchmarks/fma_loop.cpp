// Prints the nanoseconds that one vector multiply-add takes when nothing else limits it.
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));

int main() {
  constexpr int CHAINS = 12;  // more than latency times throughput on any processor of today
  constexpr long ROUNDS = 2000000;
  Vec x[CHAINS] = {};
  Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  double best = 1e9;
  for (int repeat = 0; repeat < 5; repeat++) {
    const auto start = std::chrono::steady_clock::now();
    for (long i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 12
      for (int c = 0; c < CHAINS; c++) {
        x[c] = x[c] * a + b;
        asm volatile("" : "+v"(x[c]));  // keeps every chain in its register, and in the loop
      }
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    const double each = taken.count() / (ROUNDS * CHAINS);
    if (each < best) best = each;
  }
  std::printf("%.5f\n", best);
}
