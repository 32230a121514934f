// Where the processor's time goes, part by part, for benchmarks/profile.py: JLORA_PART(name, operations) counts
// from there to the end of its scope, without the parts inside it, which are called OUTER/INNER. Compiled in with
// JLORA_PROFILE alone; for one thread.
#pragma once
#if defined(JLORA_PROFILE)
#include <time.h>
#include <cstdint>
#include <map>
#include <string>

namespace jlora::profile {
struct Time {
    double seconds = 0, operations = 0;
    int64_t calls = 0;
};
inline std::map<std::string, Time>& times() {
    static std::map<std::string, Time> all;
    return all;
}
inline double now() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
class Part {
public:
    explicit Part(const std::string& name, double operations = 0) : outer_(current()) {
        const double time = now();
        if (outer_) outer_->take(time);
        own_ = &times()[path_ = outer_ ? outer_->path_ + "/" + name : name];
        own_->operations += operations, own_->calls++;
        begun_ = time, current() = this;
    }
    ~Part() {
        const double time = now();
        take(time);
        if (outer_) outer_->begun_ = time;
        current() = outer_;
    }

private:
    void take(double time) { own_->seconds += time - begun_; }
    static Part*& current() {
        static Part* part = nullptr;
        return part;
    }
    Part* outer_;
    std::string path_;
    Time* own_;
    double begun_;
};
}  // namespace jlora::profile
#define JLORA_PART(...) const jlora::profile::Part part(__VA_ARGS__)
#else
#define JLORA_PART(...)
#endif
