// Where the time of a thread goes, for a caller who asks: by part of the model, and by what the
// thread does there. For everybody else it costs a test of a pointer.
#ifndef JAMBA_TIMELINE_H
#define JAMBA_TIMELINE_H

#include "jamba_kernels.h"

namespace jamba {

// Since whenever. A function of its own: one of <chrono> would be compiled with the flags of one
// instruction set and might be linked into another.
int64_t nanoseconds_now();

// What one thread is doing, and since when. All of its time is somewhere.
class Timeline {
 public:
  Timeline() = default;

  // Of thread `member`; `spent` is [thread][JAMBA_PARTS][JAMBA_ACTIVITIES], or null.
  Timeline(int64_t *spent, int64_t member)
      : spent_(spent == nullptr ? nullptr : spent + member * JAMBA_PARTS * JAMBA_ACTIVITIES),
        since_(spent == nullptr ? 0 : nanoseconds_now()) {}

  inline __attribute__((always_inline)) void turn_to(int32_t part,
                                                     int32_t activity = JAMBA_COMPUTES) {
    if (spent_ == nullptr) return;
    charge();
    part_ = part;
    activity_ = activity;
  }

  // The time until now goes to what it was spent on.
  void charge() {
    if (spent_ == nullptr) return;
    const int64_t now = nanoseconds_now();
    spent_[part_ * JAMBA_ACTIVITIES + activity_] += now - since_;
    since_ = now;
  }

 private:
  friend class Doing;

  int64_t *spent_ = nullptr;
  int64_t since_ = 0;
  int32_t part_ = 0, activity_ = JAMBA_COMPUTES;
};

// An activity that lasts as long as this lives, in whatever part it is.
class Doing {
 public:
  inline __attribute__((always_inline)) Doing(Timeline &timeline, int32_t activity)
      : timeline_(timeline), before_(timeline.activity_) {
    timeline.turn_to(timeline.part_, activity);
  }
  inline __attribute__((always_inline)) ~Doing() { timeline_.turn_to(timeline_.part_, before_); }
  Doing(const Doing &) = delete;
  Doing &operator=(const Doing &) = delete;

 private:
  Timeline &timeline_;
  int32_t before_;
};

}  // namespace jamba
#endif
