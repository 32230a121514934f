// Lets processes compile different operators at the same time. Jittor locks the whole of its lock file
// while it compiles any, so that a second process waits with nothing to do. Here an operator locks one
// byte of that file: it is still compiled once, by whoever comes first, and a Jittor without this, which
// locks the whole file, still waits for all and is waited for.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <string>
#include <system_error>

// Of Jittor's headers, which take a second to read.
namespace jittor {
struct JitKey;
struct Op {
    std::string get_jit_key(JitKey& key);
};
using jit_op_entry_t = void (*)(Op*);
JitKey& get_jk();
jit_op_entry_t do_compile_inner(Op* op);
extern jit_op_entry_t (*do_compile_hook)(Op*);
extern bool disable_lock;
}  // namespace jittor

namespace {

std::string path;
int file = -1;
pid_t owner = 0;

// Anew after a fork: a lock in the file that parent and child share would keep neither from the other.
int opened() {
    if (owner != getpid()) {
        if (file >= 0) close(file);
        file = open(path.c_str(), O_RDWR | O_CLOEXEC);
        owner = getpid();
    }
    return file;
}

class Lock {
   public:
    explicit Lock(off_t byte) : byte_(byte) {
        if (!set(F_WRLCK)) throw std::system_error(errno, std::generic_category(), "cannot lock Jittor's cache");
    }
    ~Lock() { set(F_UNLCK); }

   private:
    // OFD: a lock of this open file, which nothing else that the process does with the file releases.
    bool set(short type) const {
        struct flock lock = {};
        lock.l_type = type, lock.l_whence = SEEK_SET, lock.l_start = byte_, lock.l_len = 1;
        while (fcntl(file_, F_OFD_SETLKW, &lock) != 0)
            if (errno != EINTR) return false;
        return true;
    }
    const int file_ = opened();
    const off_t byte_;
};

jittor::jit_op_entry_t compile(jittor::Op* op) {
    std::string key = op->get_jit_key(jittor::get_jk());
    key.resize(std::min(key.size(), key.find("«choices:")));  // Jittor adds those while it compiles
    const Lock lock(std::hash<std::string>()(key) >> 2);      // an off_t is positive
    return jittor::do_compile_inner(op);
}

}  // namespace

// From now on this process compiles so. Returns whether it does.
extern "C" bool jlora_lock_operators(const char* lock_file) {
    if (jittor::do_compile_hook || jittor::disable_lock) return false;  // somebody else has other plans
    path = lock_file;
    struct flock asked = {};
    asked.l_type = F_WRLCK, asked.l_whence = SEEK_SET, asked.l_len = 1;
    if (opened() < 0 || fcntl(file, F_OFD_GETLK, &asked) != 0) return false;  // no such locks here
    jittor::do_compile_hook = compile;
    jittor::disable_lock = true;
    return true;
}
