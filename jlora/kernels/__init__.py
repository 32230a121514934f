"""C++ operators compiled by Jittor's own JIT; the plain modules in ``jlora.models`` define them."""
