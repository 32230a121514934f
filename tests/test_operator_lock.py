"""Processes compile different operators at the same time, and each operator once."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys

import pytest

from jlora.system import operator_compiler
from jlora.system.runtime import jt

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or jt.flags.cc_type != "g++", reason="for g++ on Linux"
)

# What operator_lock.cc uses of Jittor, and a compiler that takes until it is told to end.
JITTOR = """
#include <sys/wait.h>
#include <unistd.h>
#include <iostream>
#include <string>
namespace jittor {
struct JitKey {};
struct Op {
    std::string key;
    std::string get_jit_key(JitKey& key);
};
std::string Op::get_jit_key(JitKey&) { return key; }
using jit_op_entry_t = void (*)(Op*);
JitKey& get_jk() { static JitKey one; return one; }
bool disable_lock = false;
jit_op_entry_t (*do_compile_hook)(Op*) = nullptr;
jit_op_entry_t do_compile_inner(Op*) {
    std::cout << "compiling" << std::endl;
    std::cin.get();
    throw 1;
}
}
extern "C" bool jlora_lock_operators(const char* path);
int main(int, char** argv) {
    if (!jlora_lock_operators(argv[1]) || !jittor::disable_lock) return 2;
    jittor::Op op{argv[2]};
    if (argv[3]) {
        if (fork()) wait(nullptr), std::cout << "ended" << std::endl, std::cin.get(), _exit(0);
        std::cout << getpid() << std::endl;
    }
    try { jittor::do_compile_hook(&op); } catch (int) { std::cout << "done" << std::endl; }
    std::cin.get();
}
"""
LOCK = "hhqqi4x"  # the C struct flock: type, whence, start, length, process


def locked(path):
    """Kind, start and length of the first lock that keeps others from locking the file."""
    with open(path, "rb+") as handle:
        asked = struct.pack(LOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, _ = struct.unpack(LOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))
    return kind, start, length


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lock")
    (folder / "jittor.cc").write_text(JITTOR)
    sources = [str(folder / "jittor.cc"), str(operator_compiler.LOCK)]
    command = [jt.flags.cc_path, "-std=c++14", *sources, "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    return folder / "program"


def test_an_operator_locks_itself_alone(program, popen, tmp_path):
    path = tmp_path / "jittor.lock"
    path.touch()

    def start(key):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = popen([str(program), str(path), key], **pipes)
        assert process.stdout.readline() == "compiling\n"
        return process

    def end(process):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"  # the compiler failed, the lock is open

    places = []
    for key in ("add«T:float32", "add«T:float32«choices:a:1,", "add«T:int32"):
        process = start(key)
        kind, place, length = locked(path)
        assert (kind, length) == (fcntl.F_WRLCK, 1)
        places.append(place)
        end(process)
        assert locked(path)[0] == fcntl.F_UNLCK  # while the process lives
    assert places[0] == places[1] != places[2]
    one, other = start("add«T:float32"), start("add«T:int32")  # at the same time
    end(one)
    assert locked(path)[1] == places[2]
    other.kill()
    other.wait()
    assert locked(path)[0] == fcntl.F_UNLCK


def test_a_forked_process_has_locks_of_its_own(program, popen, tmp_path):
    path = tmp_path / "jittor.lock"
    path.touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = popen([str(program), str(path), "add", "forked"], **pipes)
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "compiling\n" and locked(path)[0] == fcntl.F_WRLCK
    os.kill(child, signal.SIGKILL)
    assert parent.stdout.readline() == "ended\n"
    assert locked(path)[0] == fcntl.F_UNLCK  # it was not the parent's


@pytest.mark.skipif(bool(jt.flags.nvcc_path), reason="with CUDA Jittor compiles on many threads")
@pytest.mark.skipif(jt.__version__.startswith("1.3.8."), reason="this Jittor has no such hook")
def test_jittor_compiles_so():
    assert jt.flags.disable_lock
