// Working memory of one call, aligned to a cache line and freed at its end.
#ifndef JAMBA_SCRATCH_H
#define JAMBA_SCRATCH_H

#include <stdint.h>
#include <stdlib.h>

namespace jamba {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t bytes = ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    data_ = (float *)aligned_alloc(64, bytes > 0 ? bytes : 64);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  // Null when there was no memory.
  float *data() const { return data_; }

 private:
  float *data_;
};

// Rounded up so that pieces laid end to end all start on a cache line.
inline int64_t cache_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace jamba
#endif
