// The clock of a timeline.
#include "timeline.h"

#include <time.h>

int64_t jamba::nanoseconds_now() {
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
