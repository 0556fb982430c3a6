// Freed weights go back to the system: malloc keeps what it can reuse, and an inference copy is made once.
#pragma once

#include <cstdint>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace sign_fast {

inline void return_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// Counts what is freed and returns it now and then: a trim walks the whole heap.
class FreedMemory {
 public:
  void add(int64_t bytes) {
    if ((pending_ += bytes) < kEnough) return;
    return_freed_memory();
    pending_ = 0;
  }

 private:
  static constexpr int64_t kEnough = 16 << 20;
  int64_t pending_ = 0;
};

}  // namespace sign_fast
