#!/bin/sh
# Called as: sh compile_operator.sh .../asm_tuner.py --cc_path=COMPILER FILE_op.cc FLAGS...
#
# Jittor compiles each operator through asm_tuner.py, a Python process that costs half as much as
# compiling. It would turn aligned stores into non-temporal ones between marks in the source; g++
# has never made such a store there, because it knows nothing of the arrays' alignment.
compiler=${2#--cc_path=}
shift 2
exec "$compiler" "$@"
